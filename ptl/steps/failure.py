"""A step that failed for good is reported wherever somebody may look; nothing here hides why it failed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptl import address
from ptl.errors import WorkError
from ptl.evaluation import gate
from ptl.lineage import mlflow_client, tracking
from ptl.lineage.run_status import kubeflow_page
from ptl.log import say
from ptl.steps.attempts import Failure, on_a_cluster
from ptl.steps.call import Call
from ptl.storage import local_files
from ptl.storage.store import Pointer

WEBHOOK = "PTL_WEBHOOK_URL"
SECONDS = 10  # to wait for the webhook's answer


def give_up(call: Mapping[str, Any], failure: Failure, artifacts: Mapping[str, Any]) -> None:
    """Report a failure wherever somebody may look, and end the process where the run must end with it.

    `call` is the step's as its process reads it, `artifacts` are Kubeflow's of its outputs.
    """
    # Without its inputs: one that is no pointer may be what failed.
    step = Call.load({**call, "inputs": {}})
    # A run reaches its report without an export, and on a cluster without its control: on one machine somebody sees
    # that fail, and the same command resumes it.
    dispensable = step.arm == "export" or (step.arm == "control" and on_a_cluster())
    if not dispensable:
        leave_for_runner(step.step, failure)
    announce(step, failure)
    if not dispensable:
        sys.exit(failure.exit_code)
    # The step ends as after a stop by the gate: a failed task would keep the report from being written.
    stopped = gate.State(stopped=True, reason=f"{step.step} failed: {failure.reason}")
    step.write(dataclasses.replace(Pointer.load(call["inputs"]["model"]), gate=stopped.dump()))
    for name, artifact in artifacts.items():
        artifact.metadata.update(step.outputs[name].metadata)
    say(step.step, f"failed: {failure.reason}; the run continues without it")


def leave_for_runner(step: str, failure: Failure) -> None:
    """Leave the reason for the command on this machine that the step ends: KFP itself only says that a task failed."""
    folder = os.environ.get("PTL_RUN_DIR")
    if folder:
        error = {"step": step, "message": failure.reason, "exit_code": failure.exit_code}
        local_files.replace(Path(folder, "error.json"), json.dumps(error).encode())


def announce(step: Call, failure: Failure) -> None:
    """Report it in MLflow and to the webhook; what cannot be reached is a line in the log."""
    # What failed may be MLflow itself: waiting for it would only delay the webhook.
    with _no_reason_to_fail(step.step, "MLflow"), mlflow_client.briefly():
        _fail_in_mlflow(step, failure)
    # A step whose attempts are used up has posted before: every pod that follows would post the same again.
    if os.environ.get(WEBHOOK) and not failure.exhausted:
        with _no_reason_to_fail(step.step, "the webhook"):
            _post(os.environ[WEBHOOK], step.step, failure.reason)


def _fail_in_mlflow(step: Call, failure: Failure) -> None:
    """Used-up attempts are no reason of their own: the page keeps why the last one failed, however many pods follow."""
    run = step.start()
    last_reason = tracking.error_of(run) if failure.exhausted else ""
    tracking.fail(run, last_reason or failure.reason)


def _post(url: str, step: str, reason: str) -> None:
    """A short JSON; `text` is what chat services show."""
    import requests

    run = tracking.pipeline_run()
    message = {
        "text": f"ptl: run {run} failed in {step}: {reason}",
        "run": run,
        "step": step,
        "reason": reason,
    }
    page = kubeflow_page(run)
    if page:
        message["kubeflow"] = page
    response = requests.post(url, json=message, timeout=SECONDS, allow_redirects=False)
    response.raise_for_status()
    if response.is_redirect:
        # It may lead to any server, and a POST that is redirected loses its body.
        raise WorkError(
            f"it points to {address.page(response.headers['location'])}", remedy=f"set {WEBHOOK} to that address"
        )


@contextlib.contextmanager
def _no_reason_to_fail(step: str, receiver: str) -> Iterator[None]:
    """Nothing that goes wrong with a report may hide the failure itself."""
    try:
        yield
    except Exception as error:
        message = str(error)
        url = os.environ.get(WEBHOOK)
        if url:  # libraries quote the address, which may be a secret
            message = message.replace(url, "***")
        say(step, f"warning: the failure could not be reported to {receiver}: {message}")
