"""How any step runs: take the committed record of an earlier try, or work, publish, commit; then report it to MLflow.

A step is identified by the pipeline run and its name, and its record by a key over everything that it depends on. So a
step that is repeated, on the same machine or another, does no finished work again and reads nothing half-written.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from ptl.errors import InputError, WorkError
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.recovery import machines
from ptl.steps import metrics, takeover
from ptl.steps.call import Metadata, Step
from ptl.steps.inputs import damage_report, fetch
from ptl.steps.machine import empty_folder, scratch
from ptl.steps.reporting import begin, noting_errors, track
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer, Record

# Reads the parent's folder (None: the step has no parent), fills the folder to publish, returns the step's metadata.
Work = Callable[[Any, Path, StepRun], Metadata]


@dataclasses.dataclass(frozen=True)
class Execution:
    """A step at work."""

    step: Step
    run: StepRun  # in MLflow
    parent: Pointer | None  # the checkpoint that the step starts from
    work: Work
    key: takeover.Key


def execute(
    step: Step,
    parent: Pointer | None,
    settings: Metadata,
    work: Work,
    *,
    by_nodes: Callable[[Callable[[], None]], None] | None = None,
) -> Record:
    """Do a step's work unless this run has committed it, and record it in MLflow; both can be repeated after a kill.

    `by_nodes` has other machines do and commit the step; it is given what counts an attempt. Raises NoAttemptLeftError
    where earlier attempts have used all.
    """
    run = step.start()
    with noting_errors(run):
        key = _key(parent, settings)
        execution = Execution(step, run, parent, work, key)
        # Another command, an earlier pod or a retry may have finished the step.
        record = store.committed(run.root, run.run, step.name, key.digest)
        if record is None:
            takeover.check_same_files(run, step.stage, key)
            takeover.withdraw_outdated(run, key)
            record = _do(execution, by_nodes)
        elif damage_report(record["pointer"]["digest"]).exists():
            # A later step could not fetch what this one has published.
            _check_or_repair(execution, Pointer(**record["pointer"]))
        else:
            say(step.name, "done before: taken as it is")
        # Again for a step that was done before: it may have been killed between the record and MLflow.
        track(step, run, parent, to_jsonable_python(settings), record)
    shutil.rmtree(scratch(step.name), ignore_errors=True)
    return record


def take_part(step: Step, parent: Pointer, settings: Metadata, work: Work) -> None:
    """The part of a node that is not the first, which publishes and commits; nothing where that is done."""
    run = step.start()
    if store.committed(run.root, run.run, step.name, _key(parent, settings).digest) is None:
        work(fetch(parent), empty_folder(step.name), run)


def _do(execution: Execution, by_nodes: Callable[[Callable[[], None]], None] | None) -> Record:
    """Take over or work, publish, commit; or have other machines do it."""
    step, run, key = execution.step, execution.run, execution.key
    folder = empty_folder(step.name)
    started = time.time()
    metadata = _take_over(execution, folder)
    if metadata is None and by_nodes is not None:
        by_nodes(lambda: begin(run))
        return _committed_by_nodes(run, key.digest)
    if metadata is None:
        # A node's attempt is the coordinator's.
        if not machines.is_node():
            begin(run)
        metadata = _fetch_and_work(execution, folder)
    metadata = _with_times(step, metadata, started)
    pointer = _publish(execution, folder, metadata)
    # Another process may be first: then its record is the step's.
    record = store.commit(run.root, run.run, step.name, takeover.record(key, pointer, metadata))
    # What it has fetched: the next step may need as much room, and finds what it reads in the store.
    shutil.rmtree(scratch("cache"), ignore_errors=True)
    committed = record["metadata"]
    say(step.name, f"done in {committed['seconds']:.0f} s: {metrics.summary(committed)}")
    return record


def _committed_by_nodes(run: StepRun, key: str) -> Record:
    """What other machines have committed. Raises InputError where that is nothing: it would be the same again."""
    record = store.committed(run.root, run.run, run.step, key)
    if record is None:
        raise InputError(
            "its nodes have ended without a result in the store",
            field=run.step,
            remedy="compare PTL_ARTIFACT_ROOT and the version of their image with this step's",
        )
    return record


def _key(parent: Pointer | None, settings: Metadata) -> takeover.Key:
    return takeover.key(parent.digest if parent else "", settings)


def _with_times(step: Step, metadata: Metadata, started: float) -> Metadata:
    """The metadata of a step's record, with its times in seconds."""
    elapsed = time.time() - started  # with the libraries' imports and the fetch of the parent
    return {
        "stage": step.stage,
        "arm": step.arm,
        "iteration": step.iteration,
        "started": started,
        "seconds": elapsed,  # a work that reports its own `seconds` leaves those out
        **metadata,
        "whole_seconds": elapsed,
    }


def _take_over(execution: Execution, folder: Path) -> Metadata | None:
    """An earlier run's result, where it can be taken over as a whole."""
    # The import is itself a copy, and an evaluation's verdict names checkpoints of its own run. Nodes wait for each
    # other, and their coordinator has looked.
    if execution.step.stage in ("import", "evaluate") or machines.is_node():
        return None
    return takeover.take(execution.run, execution.key.digest, folder)


def _fetch_and_work(execution: Execution, folder: Path) -> Metadata:
    """The metadata of the work on the fetched parent."""
    parent = execution.parent
    return execution.work(fetch(parent) if parent else None, folder, execution.run)


def _publish(execution: Execution, folder: Path, metadata: Metadata) -> Pointer:
    """Publish the files under a fresh location; the pointer to them."""
    step = execution.step
    run = execution.run
    parent = execution.parent
    if step.stage == "evaluate":
        # An evaluation makes no model: it belongs to the one that it scores, and its files to its own run.
        assert parent is not None
        params = metadata["scores"]["params"]
        model_id = parent.model_id
        location = f"{run.artifact_uri}/{os.urandom(6).hex()}"
    else:
        params = metadata["params"]
        tags = {"step": step.name, "params": params, "digest_of_parent": parent.digest if parent else ""}
        model_id, location = tracking.new_model(run, step.name, {"params": params}, tags)
    return Pointer(
        uri=location,
        digest=digest_of(store.publish(folder, location)),
        params=int(params),
        original_params=parent.original_params if parent else params,
        parent_digest=parent.digest if parent else "",
        run_id=run.run_id,
        model_id=model_id,
        gate=parent.gate if parent else {},
        step=step.name,
        target_params=parent.target_params if parent else metadata.get("target_params", 0),
    )


def _check_or_repair(execution: Execution, pointer: Pointer) -> None:
    """Do the work of a committed step again where its files are damaged; the same bytes take their place.

    The record stays, and so do all pointers to the files. Raises WorkError where the work comes out otherwise now.
    """
    run = execution.run
    try:
        store.fetch(pointer, scratch("cache"))
        say(run.step, "done before: its files were verified")
    except WorkError as damage:
        say(run.step, f"done again, since its files are damaged: {damage}")
        begin(run)
        folder = empty_folder(run.step)
        if _take_over(execution, folder) is None:
            _fetch_and_work(execution, folder)
        # Published in the scratch folder first: the damaged files go only once the same bytes are there.
        copy = scratch(run.step) / f"copy-{uuid.uuid4().hex[:12]}"
        if digest_of(store.publish(folder, copy.as_uri())) != pointer.digest:
            raise WorkError(
                "its files are damaged, and doing it again gave others, as on another machine or with other versions",
                field=run.step,
                remedy="start a new run with --new",
            ) from damage
        store.delete(pointer.uri, below=run.root.removesuffix("/ptl"))
        store.publish(folder, pointer.uri)
    damage_report(pointer.digest).unlink()
