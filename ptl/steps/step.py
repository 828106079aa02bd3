"""A step at work: all that it does with the store, with MLflow and with this machine's disk.

    with Step(call, key=settings) as step:       # finds the committed record, or opens an attempt
        if step.record is None:
            source = step.fetch_model()
            ...                                  # fills step.folder
            step.publish(report)

A step is identified by the pipeline run and its name, and its record by a key over everything that it depends on. So a
step that is repeated, on the same machine or another, does no finished work again and reads nothing half-written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from ptl import __version__, processes
from ptl.config.base import flat_settings
from ptl.errors import InputError, PtlError, WorkError
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.recovery.job import NODES, is_node, machines
from ptl.steps import records
from ptl.steps.call import Call, Key, Metadata, check_same_files, key_of, withdraw_outdated
from ptl.storage import local_files, store
from ptl.storage.manifest import FILES, digest_of
from ptl.storage.store import Pointer, Record, pointer_of

NO_MODEL = ("evaluate", "answers")  # stages that make none
SMALL_MODEL = 5_000_000  # parameters below which more threads than one only wait for each other


class Step:
    """One attempt of a step. What it starts from is the call's input `model`, if it has one.

    `key` is all that the result depends on beside that; None: the work is done each time. `reads` names records of
    earlier steps whose files it depends on too.
    """

    run: StepRun  # in MLflow
    key: Key
    record: Record | None = None  # of the finished step
    folder: Path  # to fill, of this attempt alone

    def __init__(self, call: Call, *, key: Metadata | None, reads: Sequence[str] = ()) -> None:
        self.call = call
        self.parent = call.inputs.get("model")
        self.settings: Any = key
        self._reads = reads
        self._started = time.time()
        self._taken_over_from = ""  # id of an earlier run
        self._damaged: Record | None = None  # a record of this key whose files are to be made again

    def __enter__(self) -> Step:
        self.run = self.call.start()
        try:
            self._open()
        except Exception as error:
            records.note_error(self.run, error)
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None and machines().first:
            shutil.rmtree(scratch(self.run.step), ignore_errors=True)
            records.note_end(self.run.step, self.record, self._taken_over_from)
        elif isinstance(error, Exception):
            records.note_error(self.run, error)

    def _open(self) -> None:
        """Find the record of an earlier attempt, take over that of an earlier run, or begin an attempt."""
        run = self.run
        if self.settings is None:
            self.folder = empty_folder(run.step)
            records.begin(run)
            return
        self.settings = self.settings | {
            name: self.committed(name).pointer.digest for name in self._reads
        }
        self.key = key_of(self.parent.digest if self.parent else "", self.settings)
        # Another command, an earlier pod or a retry may have finished the step.
        record = self.find(run.step)
        if record is not None and record.key == self.key.digest and self._is_intact(record):
            self.record = record
            say(run.step, "done before: taken as it is")
            # It may have been killed between the record and MLflow.
            if machines().first:
                self._report()
            return
        check_same_files(run, self.call.stage, self.key)
        if record is not None and record.key != self.key.digest:
            withdraw_outdated(run, record, self.key)
        self.folder = empty_folder(run.step)
        # A node's attempt is its coordinator's, which has looked for earlier results, and begins later.
        if is_node():
            return
        # The import is itself a copy, and an evaluation's verdict names checkpoints of its own run.
        earlier = (
            None if self.call.stage in ("import", "evaluate") else self.take_over(self.key.digest)
        )
        if earlier is not None:
            self.publish(earlier)
        elif not is_coordinator():
            records.begin(run)

    def _is_intact(self, record: Record) -> bool:
        """Whether the files of a finished step are as they were, also where a later step could not fetch them."""
        if not record.damaged:
            return True
        run = self.run
        try:
            store.fetch(record.pointer, scratch("cache"))
        except WorkError as damage:
            say(run.step, f"done again, since its files are damaged: {damage}")
            self._damaged = record
            return False
        # As after an outage.
        say(run.step, "its files were verified")
        store.commit(run.root, run.run, run.step, dataclasses.replace(record, damaged=False))
        return True

    def take_over(self, key: str) -> Metadata | None:
        """Copy what an earlier run has committed for this step under the same key; returns its metadata, or None."""
        step = self.run.step
        for run in self.run.earlier:
            try:
                record = store.committed(self.run.root, run, step)
                if record is None or key not in (record.key, record.metadata.get("scores_key")):
                    continue
                folder = store.fetch(record.pointer, scratch("cache"))
            except WorkError as error:
                # Damaged files of another run are no reason to fail: the step does the work itself.
                say(step, f"not taken over from run {run}: {error}")
                continue
            # Without the list of files: the copy is published with one of its own.
            local_files.copy_tree(folder, self.folder, FILES)
            say(step, f"taken over from run {run}: same inputs, same settings")
            tracking.tag(self.run, {"taken_over_from": run})
            self._taken_over_from = run
            return {name: value for name, value in record.metadata.items() if name != "started"}
        return None

    def fetch_model(self) -> Path:
        """The verified folder of what the step starts from, for work on it."""
        import torch

        assert self.parent is not None
        if self.parent.params < SMALL_MODEL:
            torch.set_num_threads(1)
        return self.fetch(self.parent)

    def fetch(self, pointer: Pointer) -> Path:
        """The verified folder of a pointer. Raises WorkError naming the step that made it, which a rerun does again."""
        print(f"fetching {pointer.step or 'a checkpoint'} from {pointer.uri}", flush=True)
        try:
            return store.fetch(pointer, scratch("cache"))
        except WorkError as error:
            # On a cluster a finished step is not started again, and a pointer that was made by hand names no step.
            if processes.on_a_cluster() or not pointer.step:
                raise
            # where the store does not answer, the error is that
            with contextlib.suppress(PtlError):
                store.mark_damaged(self.run.root, self.run.run, pointer)
            again = f"run the same command again: it checks step {pointer.step}, and repeats it if need be"
            remedy = f"{error.remedy}; or {again}" if error.remedy else again
            raise WorkError(error.problem, field=error.field, remedy=remedy) from error

    def fetch_items(self, record: Record) -> list[Metadata]:
        """Each item of an evaluation with its task, id, digest of the prompt and outcome, by the step's record."""
        from ptl.evaluation.evaluate import read_items

        return read_items(self.fetch(record.pointer))

    def find(self, step: str, key: str | None = None) -> Record | None:
        """The record of a step of this run, with `key` only one that has it; None where it has none."""
        return store.committed(self.run.root, self.run.run, step, key)

    def committed(self, step: str) -> Record:
        """The record of an earlier step of this run. Raises WorkError where it is gone."""
        record = self.find(step)
        if record is None:
            raise WorkError(
                f"the record of {step} is gone, and this step needs what it made",
                field=f"run {self.run.run}",
                remedy="start a new run"
                if processes.on_a_cluster()
                else "run the same command again",
            )
        return record

    def evaluation_of(self, checkpoint: Pointer, iterations: int) -> Record:
        """The record of the loop's first evaluation of a checkpoint, among those of iterations 0 to `iterations`."""
        for iteration in range(iterations + 1):
            record = self.find(f"evaluate-{iteration}")
            # One that passed its input through has none.
            if record and record.metadata["checkpoint"]["digest"] == checkpoint.digest:
                return record
        raise WorkError(
            f"no evaluation of this run has scored {checkpoint.uri}",
            field="model",
            remedy="start a new run, or restore the records of this one",
        )

    def publish(self, report: Any) -> Record:
        """Publish the folder, commit the record with this report of the work (a dataclass or JSON), tell MLflow.

        In this order: whatever kills the step, the next attempt finds all of it or does it again.
        """
        run, call = self.run, self.call
        # with the libraries' imports and the fetch of the parent
        elapsed = time.time() - self._started
        metadata = {
            "stage": call.stage,
            "arm": call.arm,
            "iteration": call.iteration,
            "started": self._started,
            "seconds": elapsed,  # a work that reports its own `seconds` leaves those out
            **(dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report),  # type: ignore[arg-type]
            "whole_seconds": elapsed,
        }
        pointer = (
            self._repaired(self._damaged.pointer) if self._damaged else self._published(metadata)
        )
        record = Record(
            self.key.digest, pointer, metadata, version=__version__, files=self.key.files
        )
        # Another process may be first: then its record is the step's.
        self.record = store.commit(run.root, run.run, run.step, record)
        # What it has fetched: the next step may need as much room, and finds what it reads in the store.
        shutil.rmtree(scratch("cache"), ignore_errors=True)
        committed = self.record.metadata
        say(run.step, f"done in {committed['seconds']:.0f} s: {records.summary(committed)}")
        self._report()
        return self.record

    def once(self, key: str, work: Callable[[Path], Any]) -> Metadata:
        """Run `work` on an empty folder, copy that into the step's, and return its report, a dataclass, as a mapping.

        What is done is kept on this machine's disk: an attempt that fails later does not have it repeated.
        """
        folder = scratch(self.call.step) / f"done-{key[:12]}"
        report_file = folder.with_suffix(".json")
        if not report_file.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            local_files.replace(report_file, json.dumps(dataclasses.asdict(work(folder))).encode())
        local_files.copy_tree(folder, self.folder)
        return dict(json.loads(report_file.read_bytes()))

    def take_result_of_nodes(self) -> None:
        """The record that other machines have committed. Raises InputError without one: it would be the same again."""
        self.record = self.find(self.run.step, self.key.digest)
        if self.record is None:
            raise InputError(
                "its nodes have ended without a result in the store",
                field=self.run.step,
                remedy="compare PTL_ARTIFACT_ROOT and the version of their image with this step's",
            )
        self._report()

    def _published(self, metadata: Metadata) -> Pointer:
        """Publish the folder under a fresh location; the pointer to it."""
        run, parent = self.run, self.parent
        if self.call.stage in NO_MODEL:
            # It belongs to the model that it scores or lets answer, and its files to its own run.
            assert parent is not None
            params = parent.params
            model_id, location = parent.model_id, fresh_location(run)
        else:
            params = int(metadata["params"])
            tags = {
                "step": run.step,
                "params": params,
                "digest_of_parent": parent.digest if parent else "",
            }
            model_id, location = tracking.new_model(run, run.step, {"params": params}, tags)
        return Pointer(
            uri=location,
            digest=digest_of(store.publish(self.folder, location)),
            params=params,
            original_params=parent.original_params if parent else params,
            parent_digest=parent.digest if parent else "",
            run_id=run.run_id,
            model_id=model_id,
            gate=parent.gate if parent else {},
            step=run.step,
            chosen=metadata.get("chosen") or (parent.chosen if parent else {}),
        )

    def _repaired(self, pointer: Pointer) -> Pointer:
        """Put the same bytes in the place of damaged files, to which all pointers stay right.

        Raises WorkError where the work comes out otherwise now.
        """
        # Published in the scratch folder first: the damaged files go only once the same bytes are there.
        copy = scratch(self.run.step) / f"copy-{uuid.uuid4().hex[:12]}"
        if digest_of(store.publish(self.folder, copy.as_uri())) != pointer.digest:
            raise WorkError(
                "its files are damaged, and doing it again gave others, as on another machine or with other versions",
                field=self.run.step,
                remedy="start a new run with --new",
            )
        store.delete(pointer.uri, below=self.run.root.removesuffix("/ptl"))
        store.publish(self.folder, pointer.uri)
        return pointer

    def _report(self) -> None:
        """Report the record to MLflow, whose run of the step ends, and hand on its checkpoint; it may be repeated."""
        record, parent, iteration = self.record, self.parent, self.call.iteration
        assert record is not None
        output: str | None = record.pointer.model_id
        pointer = record.pointer
        if self.call.stage in NO_MODEL:
            output = None
        if self.call.stage == "evaluate":
            assert parent is not None
            # First, since whoever watches the step reads its verdict as soon as it has finished.
            records.track_evaluation(self.run, iteration, parent, record.metadata)
            pointer = pointer_of(record.metadata["accepted"])
        tracking.finish(
            self.run,
            params=flat_settings(to_jsonable_python(self.settings)),
            metrics=records.metrics(record.metadata),
            inputs=[parent.model_id] if parent else [],
            output=output,
            step=iteration,
        )
        self.call.write(pointer)


def is_coordinator(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this pod only coordinates: its step asks for several nodes, on a cluster, and it is none of them."""
    is_step = processes.on_a_cluster() and not is_node(environment)
    return is_step and int(environment.get(NODES, "1")) > 1


def scratch(name: str) -> Path:
    """A folder for temporary work; with PTL_SCRATCH it survives a kill, so that training resumes from it."""
    # By the run: two runs on one machine must not share their checkpoints' folders.
    base = os.environ.get("PTL_SCRATCH") or f"{tempfile.gettempdir()}/ptl-{tracking.pipeline_run()}"
    return Path(base, name)


def empty_folder(step: str) -> Path:
    """An empty folder of this attempt alone; those of killed attempts are removed."""
    for abandoned in scratch(step).glob("out-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # A name of its own: what a killed attempt still writes does not land in it.
    folder = scratch(step) / f"out-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    return folder


def fresh_location(run: StepRun) -> str:
    """Where a step publishes files that are no model: in its own MLflow run."""
    return f"{run.artifact_uri}/{uuid.uuid4().hex[:12]}"
