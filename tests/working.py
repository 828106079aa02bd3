"""A step of tests: real store, real MLflow, and a function in the place of its work."""

import uuid

from ptl.steps.call import Call
from ptl.steps.step import Step


class OpenedError(Exception):
    """The step has its key now: it would look for its record, or fetch its model."""


def run_locally(monkeypatch, folder, database):
    """Be in a new pipeline run on one machine: its id. Its files are in `folder`, MLflow's in the folder `database`."""
    run = f"run-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}/mlflow.db")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{folder}/artifacts")
    monkeypatch.setenv("PTL_RUN_ID", run)
    monkeypatch.setenv("PTL_SCRATCH", f"{folder}/{run}")
    return run


def execute(call, parent, settings, work, reads=()):
    """Do a step as the pipeline's steps do: `work` gets the parent's folder, the step's and its MLflow run."""
    call = Call(call.step, call.experiment, {}, {"model": parent} if parent else {}, call.outputs)
    with Step(call, key=settings, reads=reads) as step:
        if step.record is None:
            source = step.fetch(parent) if parent else None
            step.publish(work(source, step.folder, step.run))
    return step.record


def fetch(call, pointer):
    """Fetch a checkpoint as a later step of the call's run does."""
    step = Step(Call("recover-9", call.experiment), key={})
    step.run = step.call.start()
    return step.fetch(pointer)
