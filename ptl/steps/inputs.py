"""What a step reads: its input checkpoints, and what earlier steps of the run have committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptl.errors import WorkError
from ptl.lineage.run_status import StepRun
from ptl.steps import attempts
from ptl.steps.machine import scratch
from ptl.storage import store
from ptl.storage.store import Pointer, Record

Items = list[dict[str, Any]]  # of an evaluation: each with its task, id, digest of the prompt and outcome
BENCHMARK_ITEMS = "items"  # record of the benchmarks' items, by import-model


def fetch(pointer: Pointer) -> Path:
    """The verified folder of a pointer. Raises WorkError naming the step that made it, which a rerun does again."""
    print(f"fetching {pointer.step or 'a checkpoint'} from {pointer.uri}", flush=True)
    try:
        return store.fetch(pointer, scratch("cache"))
    except WorkError as error:
        # The step that made it does not notice: it finds its record and ends.
        report = damage_report(pointer.digest)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.touch()
        # On a cluster a finished step is not started again, and a pointer that was made by hand names no step.
        if attempts.on_a_cluster() or not pointer.step:
            raise
        again = f"run the same command again: it checks step {pointer.step}, and repeats it if need be"
        remedy = f"{error.remedy}; or {again}" if error.remedy else again
        raise WorkError(error.problem, field=error.field, remedy=remedy) from error


def damage_report(digest: str) -> Path:
    """The file that reports a checkpoint as not fetchable: the step that made it checks it when it runs again."""
    return scratch("doubtful") / digest.removeprefix("sha256:")


def dense_model(run: StepRun) -> Pointer | None:
    """The imported model of a run; None where its record is gone."""
    record = store.committed(run.root, run.run, "import-model")
    return Pointer(**record["pointer"]) if record else None


def benchmark_items(run: StepRun) -> Pointer:
    """The benchmarks' items that import-model has committed. Raises WorkError where their record is gone."""
    record = store.committed(run.root, run.run, BENCHMARK_ITEMS)
    if record is None:
        raise WorkError(
            "the record of the benchmarks' items is gone, and training rows are compared with them",
            field=f"run {run.run}",
            remedy="start a new run" if attempts.on_a_cluster() else "run the same command again",
        )
    return Pointer(**record["pointer"])


def fetch_items(record: Record) -> Items:
    """Each item of an evaluation with its outcome, by the record of the step."""
    from ptl.evaluation.evaluate import read_items

    return read_items(fetch(Pointer(**record["pointer"])))
