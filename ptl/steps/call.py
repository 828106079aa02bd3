"""The inputs and outputs of a step: its position in the run, settings, pointers to read and files to write."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, TypeVar

from ptl.config import dag
from ptl.config.base import Section
from ptl.config.run import check
from ptl.evaluation import gate
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.storage.store import Pointer

S = TypeVar("S", bound=Section)
Metadata = dict[str, Any]  # what a record says of its step

# Of a pointer, what Kubeflow's page of an artifact shows: every task that takes it carries these bytes.
SHOWN = ("uri", "params")


@dataclasses.dataclass(frozen=True)
class Step:
    """Which step of which run this is; everything here shows in MLflow."""

    name: str  # prune-3 or control-evaluate, for example
    experiment: str  # in MLflow

    @property
    def stage(self) -> str:
        """`doctor`, `import`, `prune`, `recover`, `evaluate`, `export` or `report`."""
        return dag.stage_of(self.name)

    @property
    def arm(self) -> dag.Arm:
        """`loop`, `control` or, of a step without which both are complete, `export`."""
        return dag.arm_of(self.name)

    @property
    def iteration(self) -> int:
        """From 1; 0 outside of the iterations."""
        return dag.iteration_of(self.name)

    def start(self, title: str | None = None) -> StepRun:
        """The step's run in MLflow; `title` names the pipeline run's own where there is none yet."""
        return tracking.start(
            self.experiment,
            self.name,
            arm=self.arm,
            iteration=self.iteration,
            # Without the variable the MLflow server decides where a new experiment keeps its artifacts.
            artifact_location=os.environ.get("PTL_ARTIFACT_ROOT"),
            title=title,
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """An artifact of a step."""

    path: Path  # the file to write
    metadata: Metadata = dataclasses.field(default_factory=dict)  # what Kubeflow shows of it


@dataclasses.dataclass(frozen=True)
class Call:
    """A step with the arguments of its component."""

    step: Step
    settings: Metadata  # parameters of the component
    inputs: dict[str, Pointer]  # by the artifact's name
    outputs: dict[str, Output]

    def section(self, kind: type[S], name: str) -> S:
        """A section of the config among the settings, checked. Raises InputError naming each wrong field."""
        return check(kind, self.settings[name], name)


def write_pointer(output: Output, pointer: Metadata) -> None:
    """The pointer is the artifact's file and, for the lineage view, its metadata; its uri is never touched."""
    output.path.parent.mkdir(parents=True, exist_ok=True)
    output.path.write_text(Pointer(**pointer).dump())
    output.metadata.update({name: pointer[name] for name in SHOWN if pointer.get(name)})


def passes_through(call: Call, *outputs: str) -> bool:
    """Whether the arm of the step has stopped: then its input becomes its outputs at once, and nothing is to do."""
    # The gate's state travels with the model that the loop continues with.
    model = call.inputs["model"]
    state = gate.State.load(model.gate)
    if state.stopped:
        say(call.step.name, f"not needed, its input is passed through: {state.reason}")
        for name in outputs:
            write_pointer(call.outputs[name], dataclasses.asdict(model))
    return state.stopped
