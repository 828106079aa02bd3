"""What a run will need, from the model's config alone: parameters, tokens, FLOPs, GPU memory and hours for each step.

Estimates, not measurements: forecast_model and forecast_steps say on what they rest. Steps that do not wait for each
other run at the same time on a cluster: the critical path through them is the time from start to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ptl.config.dag import Node, arm_of, critical_path, iteration_of, nodes, stage_of, times
from ptl.config.goal import Goal
from ptl.config.run import Config
from ptl.config.schedule import Schedule, one_shot, plan, removal
from ptl.errors import InputError
from ptl.model.dimensions import check_unit
from ptl.preflight import advice, forecast_warnings, target
from ptl.preflight.forecast_model import Shape, shape_of
from ptl.preflight.forecast_steps import Assumptions, StepForecast, evaluate_step, prune_step, recover_step
from ptl.preflight.gpus import GBIT, GPUS


@dataclass(frozen=True)
class Forecast:
    """A whole run."""

    gpu: str  # kind
    count: int  # GPUs of a recovery, on each of its nodes
    nodes: int  # of a recovery
    params: int  # of the dense model
    steps: tuple[StepForecast, ...]
    warnings: tuple[str, ...]
    critical_hours: float  # from start to end, where no step waits for a GPU
    critical_steps: tuple[str, ...]  # the chain of steps that takes it
    busiest: tuple[str, ...]  # the steps that then run at the same time where their GPUs are most
    busiest_gpus: int

    @property
    def hours(self) -> float:
        """Of all steps, one after another."""
        return sum(step.hours for step in self.steps)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the steps hold, whether they use them or not."""
        return sum(step.gpu_hours for step in self.steps)


def forecast(
    config: Config,
    gpu: str = "h100",
    count: int | None = None,
    num_nodes: int | None = None,
    network: float | None = None,
) -> Forecast:
    """Estimate every step of a run on `count` GPUs (none: what the config asks for recovery, at least one).

    `num_nodes`: machines of a recovery, in place of the config's; `network`: Gbit/s between them for each GPU. Raises
    InputError for an unknown GPU, a model whose config cannot be had, or a target that leaves nothing.
    """
    if gpu not in GPUS:
        raise InputError(f"{gpu!r} is not known; it must be one of {', '.join(GPUS)}", field="gpu")
    # What each step takes.
    config = target.with_number(config)
    dense = shape_of(config.model.path, config.model.revision)
    gpus = {stage: _gpus(config, stage, count) for stage in ("prune", "recover", "evaluate")}
    card = GPUS[gpu] if network is None else replace(GPUS[gpu], network=network * GBIT)
    assumed = Assumptions(config, dense, card, gpus, num_nodes or config.resources.nodes_of("recover"))
    dag = nodes(config)
    steps = _step_forecasts(dag, assumed)

    # When they run, and how many GPUs that needs at once.
    hours = {step.step: step.hours for step in steps}
    held = {step.step: step.gpus for step in steps}
    critical_hours, critical_steps = critical_path(dag, hours)
    concurrent_steps = busiest(dag, hours, held)

    # What would waste the run.
    return Forecast(
        gpu=gpu,
        count=max(1, gpus["recover"]),
        nodes=assumed.nodes,
        params=dense.params,
        steps=tuple(steps),
        warnings=(
            *advice.warnings(config),
            *advice.depth_warnings(config.schedule, dense.params),
            *forecast_warnings.warnings(steps, gpu, assumed),
            *forecast_warnings.left_out(config),
        ),
        critical_hours=critical_hours,
        critical_steps=tuple(critical_steps),
        busiest=concurrent_steps,
        busiest_gpus=sum(held[name] for name in concurrent_steps),
    )


def _gpus(config: Config, stage: str, count: int | None) -> int:
    """GPUs that a kind of step holds while it runs, by the config; `count` takes the place of `resources.accelerators`.

    A config without accelerators, for machines without GPUs, is forecast with one for each step.
    """
    resources = config.resources
    accelerators = count or resources.accelerators or 1
    return resources.model_copy(update={"accelerators": accelerators}).accelerators_of(stage)


def _step_forecasts(dag: Sequence[Node], assumed: Assumptions) -> list[StepForecast]:
    """What each step that computes takes, in the DAG's order."""
    config = assumed.config
    schedules = {"loop": config.schedule, "control": one_shot(config.schedule)}
    shapes = {arm: _shapes(schedule, assumed) for arm, schedule in schedules.items()}
    # The others take minutes without a GPU.
    steps: list[StepForecast] = []
    for node in dag:
        name = node.name
        stage = stage_of(name)
        if stage not in ("evaluate", "prune", "recover"):
            continue
        arm = arm_of(name)
        number = iteration_of(name)
        after = shapes[arm][number]
        if stage == "evaluate":
            steps.append(evaluate_step(name, after, assumed))
        elif stage == "prune":
            steps.append(prune_step(name, shapes[arm][number - 1], after.params, assumed))
        else:
            steps.append(recover_step(name, after, schedules[arm], number, assumed))
    return steps


def _shapes(schedule: Schedule, assumed: Assumptions) -> list[Shape]:
    """The model after each iteration of an arm; first the dense one, which is that after iteration 0."""
    dense = assumed.dense
    total = _removal(dense, schedule.target, assumed.config.prune.target)
    shapes = [dense]
    start, unit = dense, ""
    for iteration in plan(schedule, assumed.config.prune):
        # In a mixture the FLOPs depend on what is removed.
        if iteration.unit != unit:
            start, unit = shapes[-1], iteration.unit
        removed = int(iteration.progress * total)
        shapes.append(start.scaled(dense.params - removed, unit))
    return shapes


def _removal(dense: Shape, size: float | Goal, unit: str) -> int:
    """Parameters to remove in all. Raises InputError for more than the linear layers, or their experts, have."""
    total = removal(dense.params, size)
    check_unit(dense.experts, dense.narrowable, unit)
    most = _most(dense, unit)
    if not 0 < total <= most:
        raise InputError(
            f"{size:g} would remove {total:,} of {dense.params:,} parameters, and at most {most:,} can be removed",
            field="schedule.target",
            remedy="give a share between 0 and 1, or the number of parameters to end with",
        )
    return total


def _most(dense: Shape, unit: str) -> int:
    """The most parameters that can be removed."""
    if unit == "experts":
        return dense.removable_experts
    # Something must be left of the experts, or of the linear layers that it comes out of.
    if dense.experts and unit == "neurons":
        return dense.in_experts - 1
    return dense.matrices + dense.inactive - 1


def busiest(dag: Sequence[Node], hours: Mapping[str, float], gpus: Mapping[str, int]) -> tuple[str, ...]:
    """The steps that run at the same time when most GPUs are held, each step starting as soon as it can.

    Steps without hours (import, report) hold none. Of several such moments the first.
    """
    starts, ends = times(dag, hours)
    # The most are held at a moment when a step starts.
    working = [node.name for node in dag if hours.get(node.name)]
    moments = sorted({starts[name] for name in working})

    def running(moment: float) -> tuple[str, ...]:
        return tuple(name for name in working if starts[name] <= moment < ends[name])

    def held(names: tuple[str, ...]) -> int:
        return sum(gpus[name] for name in names)

    return max(map(running, moments), key=held, default=())
