"""The inputs and outputs of a step: its position in the run, settings, pointers to read and files to write."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from ptl.config import dag
from ptl.config.base import Section
from ptl.config.run import check
from ptl.config.schedule import BY_GOAL, Iteration, Prune, Schedule, plan
from ptl.errors import InputError
from ptl.evaluation import gate
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps import attempts
from ptl.storage.store import Pointer

S = TypeVar("S", bound=Section)
Metadata = dict[str, Any]  # JSON

# Of a pointer, what Kubeflow's page of an artifact shows: every task that takes it carries these bytes.
SHOWN = ("uri", "params")
BENCHMARK_ITEMS = "items"  # record of the benchmarks' items, by import-model: recoveries do not train on them
MODELS = ("out", "accepted")  # outputs that are pointers to checkpoints
# Of the schedule, what may be among a step's settings: prune has the sizes, recover the tokens, import all of it.
SCHEDULE = ("iterations", "target", "cuts", "recovery_tokens", "tokens")
# For the fields that have no default, in steps that have no use for them.
UNUSED = {"target": 0.5, "recovery_tokens": 0}


@dataclasses.dataclass(frozen=True)
class Output:
    """An artifact of a step."""

    path: Path  # the file to write
    metadata: Metadata = dataclasses.field(default_factory=dict)  # what Kubeflow shows of it


@dataclasses.dataclass(frozen=True)
class Call:
    """A step with the arguments of its component."""

    step: str  # prune-3 or control-evaluate, for example
    experiment: str  # in MLflow
    settings: Metadata = dataclasses.field(default_factory=dict)  # parameters of the component
    inputs: dict[str, Pointer] = dataclasses.field(default_factory=dict)  # by the artifact's name
    outputs: dict[str, Output] = dataclasses.field(default_factory=dict)

    @property
    def stage(self) -> str:
        """`doctor`, `import`, `prune`, `recover`, `evaluate`, `export` or `report`."""
        return dag.stage_of(self.step)

    @property
    def arm(self) -> dag.Arm:
        """`loop`, `control` or, of a step without which both are complete, `export`."""
        return dag.arm_of(self.step)

    @property
    def iteration(self) -> int:
        """From 1; 0 outside of the iterations."""
        return dag.iteration_of(self.step)

    @property
    def stopped(self) -> bool:
        """Whether the gate has ended this arm: its state travels with the model that the loop continues with."""
        return gate.State.load(self.inputs["model"].gate).stopped

    def pass_through(self) -> None:
        """Make the input the output: nothing is left to do."""
        model = self.inputs["model"]
        say(self.step, f"not needed, its input is passed through: {gate.State.load(model.gate).reason}")
        self.write(model)

    def write(self, pointer: Pointer) -> None:
        """Make a pointer the model that this step hands on: the artifact's file; its uri is never touched."""
        shown = {name: getattr(pointer, name) for name in SHOWN if getattr(pointer, name)}
        for name in self.outputs.keys() & set(MODELS):
            output = self.outputs[name]
            output.path.parent.mkdir(parents=True, exist_ok=True)
            output.path.write_text(pointer.dump())
            output.metadata.update(shown)

    def dump(self) -> Metadata:
        """The call as a step's process on another machine reads it, which has outputs of its own."""
        return {
            "settings": {"step": self.step, "experiment": self.experiment, **self.settings},
            "inputs": {name: pointer.dump() for name, pointer in self.inputs.items()},
        }

    @staticmethod
    def load(call: Metadata) -> Call:
        """The call that `dump` or the supervisor wrote, whose outputs are files. Raises InputError for no pointers."""
        settings = dict(call["settings"])
        # These two name the step; the other parameters are its settings.
        return Call(
            settings.pop("step"),
            settings.pop("experiment"),
            settings,
            {name: Pointer.load(text) for name, text in call["inputs"].items()},
            {name: Output(Path(file)) for name, file in call["outputs"].items()},
        )

    def section(self, kind: type[S], name: str) -> S:
        """A section of the config among the settings, checked. Raises InputError naming each wrong field."""
        return check(kind, self.settings[name], name)

    def start(self) -> StepRun:
        """The step's run in MLflow, below the pipeline run's own, which the first step makes and names."""
        return tracking.start(
            self.experiment,
            self.step,
            arm=self.arm,
            iteration=self.iteration,
            # Without the variable the MLflow server decides where a new experiment keeps its artifacts.
            artifact_location=os.environ.get("PTL_ARTIFACT_ROOT"),
            # On one machine the run's id is its title.
            title=self.settings.get("run_name") if attempts.on_a_cluster() else None,
        )


def schedule_of(call: Call) -> Schedule:
    """The schedule among a step's settings, checked; the import's may have a goal. Raises InputError."""
    settings = schedule_settings(call.settings)
    # Only the import sees the goal and the dense model: what it found travels with the checkpoints.
    if settings.get("target") == BY_GOAL and "model" in call.inputs:
        settings["target"] = call.inputs["model"].target_params
    return check(Schedule, UNUSED | settings, "schedule")


def schedule_settings(settings: Metadata) -> Metadata:
    """The schedule's fields among a step's settings, with the goal in the place of `target`. Raises InputError."""
    fields = {name: settings[name] for name in SCHEDULE if name in settings}
    goal = settings.get("goal")
    if goal and fields["target"] != BY_GOAL:
        raise InputError(
            f"{fields['target']:g}, and the run has the goal {goal}",
            field="target",
            remedy="set target to 0, or goal to {}",
        )
    return fields | {"target": goal} if goal else fields


def iterations_until(iteration: int, schedule: Schedule, prune: Prune) -> list[Iteration]:
    """The plan of a run, from its first iteration to this one. Raises InputError for one outside of it."""
    iterations = plan(schedule, prune)
    if not 1 <= iteration <= len(iterations):
        raise InputError(
            f"{iteration} is outside 1..{len(iterations)}, the iterations of this schedule",
            field="iteration",
        )
    return iterations[:iteration]
