"""The DAG of a run as data: which steps there are, what each takes from which other, and what else it waits for.

The pipeline is built from it, the local runners take their order from it, and forecast and status their lists of steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ptl.config.export import TYPES, Export
from ptl.config.run import Config
from ptl.errors import InputError

Arm = Literal["loop", "control", "export"]
ANSWERS = "answers"  # the step that writes the dense model's own answers, and its record
_NAME = re.compile(
    r"(control-)?(?:(doctor|import|answers|prune|recover|evaluate|report)(?:-model)?(?:-(\d+))?|(export)-[a-z0-9-]+)"
)


@dataclass(frozen=True)
class Source:
    """An output of another step."""

    step: str  # for example prune-1
    output: str  # name of the artifact


@dataclass(frozen=True)
class Node:
    """One step: `inputs` are its artifacts by name, `after` the steps that it waits for without taking anything."""

    name: str  # for example control-recover
    inputs: Mapping[str, Source]  # artifact's name in this step -> where it comes from
    after: tuple[str, ...] = ()  # steps that are waited for

    @property
    def needs(self) -> tuple[str, ...]:
        """All steps that must have ended before this one starts."""
        makers = [source.step for source in self.inputs.values()]
        return tuple(dict.fromkeys([*makers, *self.after]))  # each once, in order


def stage_of(name: str) -> str:
    """`doctor`, `import`, `answers`, `prune`, `recover`, `evaluate`, `export` or `report`."""
    return _name_parts(name)[1]


def kind_of(name: str) -> str:
    """As `resources.steps` and the images name what a step takes, for example export-gguf.

    A doctor looks where prune will run; answers are made as those of an evaluation.
    """
    stage = stage_of(name)
    if stage == "export":
        return next(f"export-{format}" for format in TYPES if name.startswith(f"export-{format}-"))
    return {"import": "import-model", "doctor": "prune", ANSWERS: "evaluate"}.get(stage, stage)


def arm_of(name: str) -> Arm:
    """The arm that a step belongs to: what both arms need is of the loop, and an export of neither."""
    before, stage, _ = _name_parts(name)
    if stage == "export":
        return "export"
    return "control" if before else "loop"


def iteration_of(name: str) -> int:
    """`prune-3` is of iteration 3, the control's steps are of its only one, all others of 0."""
    control, _, number = _name_parts(name)
    if number:
        return int(number)
    return 1 if control else 0


def _name_parts(name: str) -> tuple[str, ...]:
    """`control-` or nothing, stage and iteration of a step; what its name does not say is empty."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r} is no step", field="step", remedy="name it as ptl does, for example prune-1"
        )
    control, stage, number, export = match.groups(default="")
    return control, stage or export, number


def export_step(export: Export) -> str:
    """The step that makes and evaluates this export of the final model, for example export-gguf-q4-k-m."""
    return f"export-{export.name}".replace("_", "-")


def nodes(config: Config) -> list[Node]:
    """All steps of a run, in an order in which one machine can execute them.

    Only data makes dependencies: the control arm starts from the imported model, beside the loop, and with the gate off
    an iteration starts from the recovered model while that is still being evaluated. The dense model's scores are
    waited for where they are compared with: by the gate, by the exports and by the report. The items that recovery must
    not train on are not among them: import-model commits those, as `items`.
    """
    # The dense model, and its scores.
    steps = [Node("doctor", {})] if config.resources.doctor else []
    dense = Source("import-model", "out")
    steps += [Node("import-model", {}, after=_ends(steps)), Node("evaluate-0", {"model": dense})]

    # What calibration and recoveries read of it: the loop and the control begin after it.
    own_answers: tuple[str, ...] = (ANSWERS,) if config.training.answers == "self" else ()
    steps += [Node(name, {"model": dense}) for name in own_answers]

    # The loop.
    gated = config.gate.enabled
    parent = dense
    for number in range(1, config.schedule.iterations + 1):
        # Later verdicts come after the first one.
        dense_scores = ("evaluate-0",) if gated and number == 1 else ()
        after = own_answers if number == 1 else ()
        iteration = _iteration_nodes(
            f"{{}}-{number}", parent, fallback=gated, after=after, dense_scores=dense_scores
        )
        steps += iteration
        _, recover, evaluate = iteration
        # With the gate the next iteration waits for the verdict, which decides what it starts from.
        accepted = Source(evaluate.name, "accepted")
        parent = accepted if gated else Source(recover.name, "out")
    results = {"final": accepted}

    # The control arm.
    if config.control:
        after = _ends(steps) if config.resources.control == "after" else own_answers
        control = _iteration_nodes("control-{}", dense, fallback=False, after=after)
        steps += control
        results["control"] = Source(control[-1].name, "accepted")

    # Exports of the final model; each is compared with the same export of the dense model.
    exports = [export_step(export) for export in config.export]
    dense_scores = () if gated else ("evaluate-0",)
    steps += [Node(export, {"model": accepted, "dense": dense}, dense_scores) for export in exports]

    # The report waits for evaluations whose output it does not take, too: it reads them from MLflow.
    inputs = {source.step for source in results.values()}
    others = [name for name in _ends(steps) if name not in inputs]
    steps.append(Node("report", results, after=tuple(others)))
    return steps


def _ends(steps: Sequence[Node]) -> tuple[str, ...]:
    """The steps that no other one waits for: with the gate off each evaluation is one."""
    needed = {name for node in steps for name in node.needs}
    return tuple(node.name for node in steps if node.name not in needed)


def _iteration_nodes(
    name: str,  # template of the steps' names
    parent: Source,
    *,
    fallback: bool,  # whether the evaluation may return to where the iteration started
    after: tuple[str, ...] = (),
    dense_scores: tuple[str, ...] = (),  # the step whose scores the evaluation compares with
) -> list[Node]:
    """Prune, recover and evaluate."""
    prune, recover, evaluate = (name.format(stage) for stage in ("prune", "recover", "evaluate"))
    inputs = {"model": Source(recover, "out")}
    if fallback:
        inputs["fallback"] = parent
    return [
        Node(prune, {"model": parent}, after),
        Node(recover, {"model": Source(prune, "out")}),
        Node(evaluate, inputs, dense_scores),
    ]
