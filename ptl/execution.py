"""How any step runs: take the committed record of an earlier try, or work, publish, commit; then say so in MLflow.

A step is identified by the pipeline run and its name, and its record by a key over everything that it depends on. So a
step that is repeated, on the same machine or another, does no finished work again and reads nothing half-written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ptl import __version__, attempts, dag, run_page, store, tracking
from ptl.address import without_login
from ptl.errors import WorkError
from ptl.log import say
from ptl.run_status import StepRun
from ptl.store import Pointer

Metadata = dict[str, Any]
Record = dict[str, Any]
Work = Callable[[Path, StepRun], Metadata]  # fills the folder to publish, returns the step's metadata

# Of a pointer, what Kubeflow's page of an artifact shows: every task that takes it carries these bytes.
SHOWN = ("uri", "digest", "params", "run_id")
SMALL_MODEL = 5_000_000  # parameters below which a second thread costs more than it gives


@dataclasses.dataclass(frozen=True)
class Step:
    """Which step of which run this is; everything here shows in MLflow."""

    name: str
    experiment: str

    @property
    def stage(self) -> str:
        """`doctor`, `import`, `prune`, `recover`, `evaluate` or `report`."""
        return dag.stage_of(self.name)

    @property
    def arm(self) -> dag.Arm:
        """`loop` or `control`."""
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
            artifact_location=artifact_root(),
            title=title,
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to write for the steps that follow, and what Kubeflow shows beside it."""

    path: Path
    metadata: Metadata = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Call:
    """A step with everything that its component was given."""

    step: Step
    settings: Metadata  # parameters of the component
    inputs: dict[str, Pointer]
    outputs: dict[str, Output]


def execute(step: Step, parent: Pointer | None, settings: Metadata, work: Work, *, title: str | None = None) -> Record:
    """Do a step's work unless this run has committed it, and record it in MLflow; both can be repeated after a kill.

    `title` is what people call the pipeline run. Raises NoAttemptLeftError where earlier attempts have used all.
    """
    settings = {name: _plain(value) for name, value in settings.items()}
    run = step.start(title)
    key = _key(step, parent, settings)
    with noting_errors(run):
        record = store.committed(run.root, run.run, step.name, key)
        if record is None:
            begin(run)
            record = _work_and_commit(step, run, parent, settings, key, work)
            say(step.name, f"done in {record['metadata']['seconds']:.0f} s: {_summary(record['metadata'])}")
        elif _doubtful(record["pointer"]["digest"]).exists():
            _check_or_repair(run, Pointer(**record["pointer"]), work)
        else:
            say(step.name, "done before: taken as it is")
        _track(step, run, parent, settings, record)
    shutil.rmtree(scratch(step.name), ignore_errors=True)
    return record


def begin(run: StepRun) -> None:
    """Count an attempt, in the store and on the step's page. Raises NoAttemptLeftError, with the last one's reason."""
    allowed = attempts.policy().attempts
    try:
        attempt = attempts.claim(run.root, run.run, run.step)
    except attempts.NoAttemptLeftError as error:
        last = tracking.error_of(run)
        raise attempts.NoAttemptLeftError(f"{error}{'. The last one failed: ' + last if last else ''}") from None
    tracking.tag(run, {"attempt": attempt})
    say(run.step, "started" if attempt == 1 else f"started, attempt {attempt} of {allowed}")


@contextmanager
def noting_errors(run: StepRun) -> Iterator[None]:
    """Keep on the step's page why an attempt failed; another one may follow."""
    try:
        yield
    except attempts.NoAttemptLeftError:
        raise  # the page has the reason of the last one
    except Exception as error:
        tracking.note_error(run, without_login(f"{type(error).__name__}: {error}"))
        raise


def _work_and_commit(
    step: Step, run: StepRun, parent: Pointer | None, settings: Metadata, key: str, work: Work
) -> Record:
    folder = _out(step.name)
    started = time.time()
    metadata = work(folder, run)
    metadata = {"stage": step.stage, "arm": step.arm, "iteration": step.iteration, "started": started, **metadata}
    whole = time.time() - started  # with the libraries' imports and the fetch of the parent, which `seconds` leaves out
    metadata = {"seconds": whole, **metadata, "whole_seconds": whole}
    if step.stage == "evaluate":
        assert parent is not None
        model_id, location = parent.model_id, f"{run.artifact_uri}/{os.urandom(6).hex()}"
    else:
        tags = {"step": step.name, "params": metadata["params"], "digest_of_parent": parent.digest if parent else ""}
        model_id, location = tracking.new_model(run, step.name, {"params": metadata["params"]}, tags)
    files = store.publish(folder, location)
    pointer = Pointer(
        uri=location,
        digest=store.digest_of(files),
        params=int(metadata["params"] if "params" in metadata else metadata["scores"]["params"]),
        original_params=parent.original_params if parent else metadata["params"],
        parent_digest=parent.digest if parent else "",
        run_id=run.run_id,
        model_id=model_id,
        gate=parent.gate if parent else {},
        step=step.name,
    )
    record = {
        "key": key,
        "pointer": dataclasses.asdict(pointer),
        "metadata": metadata,
    }
    return store.commit(run.root, run.run, step.name, record)


def _out(step: str) -> Path:
    """An empty folder of this attempt alone."""
    for left in scratch(step).glob("out-*"):  # by killed attempts
        shutil.rmtree(left, ignore_errors=True)
    folder = scratch(step) / f"out-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    return folder


def _check_or_repair(run: StepRun, pointer: Pointer, work: Work) -> None:
    """Do the work of a committed step again where its files are damaged; the same bytes take their place.

    The record stays, and so do all pointers to the files. Raises WorkError where the work comes out otherwise now.
    """
    try:
        store.fetch(pointer, scratch("cache"))
        say(run.step, "done before: its files were verified")
    except WorkError as error:
        say(run.step, f"done again, since its files are damaged: {error}")
        begin(run)
        folder = _out(run.step)
        work(folder, run)
        copy = store.publish(folder, (scratch(run.step) / f"copy-{uuid.uuid4().hex[:12]}").as_uri())
        if store.digest_of(copy) != pointer.digest:
            raise WorkError(
                f"{run.step}: its files are damaged, and doing it again gave others, as on another machine or with "
                "other versions; start a new run with --new"
            ) from error
        store.delete(pointer.uri, below=run.root.removesuffix("/ptl"))
        store.publish(folder, pointer.uri)
    _doubtful(pointer.digest).unlink()


def _doubtful(digest: str) -> Path:
    """A file that says that a checkpoint could not be fetched: the step that made it checks it when it runs again."""
    return scratch("doubtful") / digest.removeprefix("sha256:")


def _track(step: Step, run: StepRun, parent: Pointer | None, settings: Metadata, record: Record) -> None:
    """Say in MLflow what a record says; repeating it changes nothing."""
    metadata, pointer = record["metadata"], record["pointer"]
    inputs = [parent.model_id] if parent else []
    output = pointer["model_id"] if step.stage != "evaluate" else None
    tracking.finish(
        run, params=flat(settings), metrics=_metrics(metadata), inputs=inputs, output=output, step=step.iteration
    )
    if step.stage == "evaluate":
        first = metadata["scores"]["tasks"][0]
        bounds = {"low": first["low"], "high": first["high"]}
        tracking.log_progress(run, metadata["scores"]["params"], first["accuracy"], **bounds)
        if step.iteration == 0:
            run_page.log_result(run, {"dense/accuracy": first["accuracy"]})
        ended = metadata["accepted"]["gate"].get("reason", "") if metadata["accepted"]["gate"].get("stopped") else ""
        tracking.tag(run, {"verdict": metadata["verdict"]["decision"]} | ({"loop_ended": ended} if ended else {}))


def _key(step: Step, parent: Pointer | None, settings: Metadata) -> str:
    """What a step's result depends on; the same key means that a committed result may be taken."""
    metadata = {"version": __version__, "step": step.name, "parent": parent and parent.digest, "settings": settings}
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Sections of the config as plain values, the same however KFP passed them."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _metrics(metadata: Metadata) -> dict[str, float]:
    """The numbers of a step's metadata that MLflow shows."""
    metrics = {
        k: float(v) for k, v in metadata.items() if isinstance(v, int | float) and k not in ("iteration", "started")
    }
    if "scores" in metadata:
        scores = metadata["scores"]
        metrics |= {k: float(scores[k]) for k in ("params", "bytes", "flops_per_token", "kv_bytes_per_token")}
        for task in scores["tasks"]:
            metrics |= {
                f"{task['task']}/{k}": float(task[k])
                for k in ("accuracy", "low", "high", "items")
                if task[k] is not None
            }
        metrics["accuracy"] = float(scores["tasks"][0]["accuracy"])
    return metrics


def flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as MLflow shows parameters; what is unset is left out."""
    if isinstance(settings, dict):
        entries: Any = settings.items()
    elif isinstance(settings, list) and any(isinstance(each, dict) for each in settings):
        entries = enumerate(settings)
    else:
        return {} if settings is None else {name: settings}
    dotted: dict[str, Any] = {}
    for key, value in entries:
        dotted |= flat(value, f"{name}.{key}" if name else str(key))
    return dotted


def _summary(metadata: Metadata) -> str:
    if metadata["stage"] == "evaluate":
        first = metadata["scores"]["tasks"][0]
        return f"{first['metric']} {first['accuracy']:.3f} on {first['items']} items, {metadata['verdict']['decision']}"
    if metadata["stage"] == "recover":
        return f"{metadata['tokens']:,} tokens in {metadata['steps']} steps"
    return f"{metadata['params']:,} parameters"


def write(output: Output, pointer: Metadata) -> None:
    """The pointer is the artifact's file and, for the lineage view, its metadata; its uri is never touched."""
    output.path.parent.mkdir(parents=True, exist_ok=True)
    output.path.write_text(Pointer(**pointer).dump())
    output.metadata.update({name: pointer[name] for name in SHOWN if pointer.get(name)})


def fetch(pointer: Pointer) -> Path:
    """The verified folder of a pointer. Raises WorkError naming the step that made it, which a rerun does again."""
    try:
        return store.fetch(pointer, scratch("cache"))
    except WorkError as error:
        doubt = _doubtful(pointer.digest)
        doubt.parent.mkdir(parents=True, exist_ok=True)
        doubt.touch()
        if attempts.on_a_cluster() or not pointer.step:
            raise
        raise WorkError(
            f"{error}. The same command checks step {pointer.step}, and does it again if need be"
        ) from error


def scratch(name: str) -> Path:
    """A folder for temporary work; with PTL_SCRATCH it survives a kill, so that training goes on from it."""
    base = os.environ.get("PTL_SCRATCH") or f"{tempfile.gettempdir()}/ptl-{tracking.pipeline_run()}"
    return Path(base) / name


def artifact_root() -> str | None:
    """Where a new experiment keeps its artifacts; None: where the MLflow server says."""
    return os.environ.get("PTL_ARTIFACT_ROOT")


def limit_threads(params: int) -> None:
    """One thread for a small model: more only wait for each other."""
    import torch

    if params < SMALL_MODEL:
        torch.set_num_threads(1)
