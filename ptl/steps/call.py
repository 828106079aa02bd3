"""The inputs and outputs of a step: its position in the run, settings, pointers to read and files to write.

Its key says what its result depends on: only what a change affects is done again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from ptl import __version__, processes
from ptl.config import dag
from ptl.config.base import Section
from ptl.config.data import DataSource
from ptl.config.parameters import schedule_settings
from ptl.config.recover import RecoverStage
from ptl.config.run import Evaluate, ModelSource, check
from ptl.config.schedule import Iteration, Prune, Schedule, plan
from ptl.data import sources
from ptl.errors import InputError
from ptl.evaluation import gate, tasks
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.local import progress
from ptl.log import say
from ptl.storage import store
from ptl.storage.manifest import file_digest
from ptl.storage.store import Pointer, Record

S = TypeVar("S", bound=Section)
Metadata = dict[str, Any]  # JSON

# Of a pointer, what Kubeflow's page of an artifact shows: every task that takes it carries these bytes.
SHOWN = ("uri", "params")
# record of the benchmarks' items, by import-model: recoveries do not train on them
BENCHMARK_ITEMS = "items"
MODELS = ("out", "accepted")  # outputs that are pointers to checkpoints
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
        """As of `dag.stage_of`."""
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
        return gate.State(**self.inputs["model"].gate).stopped

    def pass_through(self) -> None:
        """Make the input the output: nothing is left to do."""
        model = self.inputs["model"]
        reason = gate.State(**model.gate).reason
        say(self.step, f"not needed, its input is passed through: {reason}")
        self.write(model)
        progress.note(self.step, progress.NOT_NEEDED, summary=reason)

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
            title=self.settings.get("run_name") if processes.on_a_cluster() else None,
        )


def schedule_of(call: Call) -> Schedule:
    """The schedule among a step's settings, checked. Raises InputError."""
    return check(Schedule, UNUSED | schedule_settings(call.settings), "schedule")


def iterations_until(iteration: int, schedule: Schedule, prune: Prune) -> list[Iteration]:
    """The plan of a run, from its first iteration to this one. Raises InputError for one outside of it."""
    iterations = plan(schedule, prune)
    if not 1 <= iteration <= len(iterations):
        raise InputError(
            f"{iteration} is outside 1..{len(iterations)}, the iterations of this schedule",
            field="iteration",
        )
    return iterations[:iteration]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a result depends on; the same digest means that it may be taken."""

    digest: str
    files: dict[str, str]  # name of each local file that is read, and what changes with its content


def key_of(parent: str, settings: dict[str, Any]) -> Key:
    """The key of a step by its checkpoint's digest, its settings, and the content of the files that these name.

    Files count by name and content wherever they are: a run is resumed from any directory. Raises InputError for one
    that is not there.
    """
    files = list(_files(settings))
    contents = [(Path(name).name, content) for name, content in files]
    digest = store.digest(
        [__version__, parent, _without_folders(to_jsonable_python(settings)), contents]
    )
    return Key(
        digest,
        {name if "://" in name else str(Path(name).absolute()): content for name, content in files},
    )


def _without_folders(value: Any) -> Any:
    """JSON with the bare names of the local files and folders in it."""
    if isinstance(value, dict):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    is_path = isinstance(value, str) and "/" in value and os.path.exists(value)  # noqa: PTH110  # of any length
    return Path(value).name if is_path else value


def _files(settings: Any) -> Iterator[tuple[str, str]]:
    """Name of each file that settings read, and what changes with its content."""
    if isinstance(settings, DataSource):
        digest = sources.content_digest(settings)
        if digest is not None:
            yield settings.source, digest
    elif isinstance(settings, Evaluate):
        yield from ((str(path), file_digest(path)) for path in sorted(tasks.files(settings)))
    elif isinstance(settings, ModelSource):
        # Of weights a stamp will do, and saves reading them once more: after a new import of the same bytes, which have
        # the same digest, no other step is repeated.
        for path in _files_in(settings.path):
            stat = path.stat()
            is_large = path.suffix == ".safetensors"
            yield str(path), f"{stat.st_size} {stat.st_mtime_ns}" if is_large else file_digest(path)
    elif isinstance(settings, RecoverStage) and settings.teacher:
        yield from ((str(path), file_digest(path)) for path in _files_in(settings.teacher))
    elif isinstance(settings, Section | dict):
        yield from _files(list(dict(settings).values()))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _files(value)


def _files_in(model: str | None) -> list[Path]:
    """The files of a model's folder; none of a hub id."""
    if model is None or not Path(model).is_dir():
        return []
    return sorted(path for path in Path(model).iterdir() if path.is_file())


def withdraw_outdated(run: StepRun, record: Record, key: Key) -> None:
    """Withdraw this run's result of a step, which was made from other files or settings: it is made again.

    Raises InputError where another version of ptl made it, or where the run is finished.
    """
    field = f"step {record.step} of run {run.run}"
    if record.version != __version__:
        raise InputError(
            f"done by ptl {record.version}, and this is ptl {__version__}",
            field=field,
            remedy=f"resume the run with ptl {record.version}, or start a new one",
        )
    reason = f"{_changed(record, key) or 'its input'} has changed since it was done"
    if store.committed(run.root, run.run, "report"):
        remedy = "restore what has changed, or start a new run"
        raise InputError(f"{reason}, and the run is finished", field=field, remedy=remedy)
    say(record.step, f"{reason}: it is done again")
    store.withdraw(run.root, run.run, record.step)


def check_same_files(run: StepRun, stage: str, key: Key) -> None:
    """Raise InputError where the first step of this kind has read another content of the same files.

    On one machine that step has been done again by now. A cluster does not repeat what has succeeded.
    """
    firsts = {
        "answers": "answers",
        "prune": "prune-1",
        "recover": "recover-1",
        "evaluate": "evaluate-0",
    }
    first = firsts.get(stage)
    record = store.committed(run.root, run.run, first) if first and first != run.step else None
    changed = _changed(record, key) if record else ""
    if changed:
        raise InputError(
            f"{changed} has changed since {first} was done, whose result cannot be compared with this one's",
            field=run.step,
            remedy="restore it and retry, or start a new run, which takes over the steps that do not depend on it",
        )


def _changed(record: Record, key: Key) -> str:
    """Names of the files that have changed since a record was made, or were added or left out."""
    return ", ".join(sorted(dict(record.files.items() ^ key.files.items())))
