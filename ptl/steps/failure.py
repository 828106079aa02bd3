"""A step that failed for good is reported wherever somebody may look; nothing here hides why it failed."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl import address
from ptl.errors import WorkError
from ptl.evaluation import gate
from ptl.lineage import mlflow_client, tracking
from ptl.lineage.run_status import kubeflow_page
from ptl.log import say
from ptl.steps.attempts import Failure
from ptl.steps.call import Output, Step, write_pointer
from ptl.storage import local_files
from ptl.storage.store import Pointer

WEBHOOK = "PTL_WEBHOOK_URL"
SECONDS = 10  # to wait for the webhook's answer


def leave_for_runner(step: str, failure: Failure) -> None:
    """Leave the reason for the command on this machine that the step ends: KFP itself only says that a task failed."""
    folder = os.environ.get("PTL_RUN_DIR")
    if folder:
        error = {"step": step, "message": failure.reason, "exit_code": failure.exit_code}
        local_files.replace(Path(folder, "error.json"), json.dumps(error).encode())


def announce(step: str, experiment: str, failure: Failure) -> None:
    """Report it in MLflow and to the webhook; what cannot be reached is a line in the log.

    A step whose attempts are used up has posted to the webhook before.
    """
    # What failed may be MLflow itself: waiting for it would only delay the webhook.
    with mlflow_client.briefly():
        _try(step, "MLflow", lambda: _fail_in_mlflow(Step(step, experiment), failure))
    url = os.environ.get(WEBHOOK)
    # Every pod that follows used-up attempts would post the same again.
    if url and not failure.exhausted:
        _try(step, "the webhook", lambda: _post(url, step, failure.reason))


def pass_on(step: str, reason: str, arguments: dict[str, Any]) -> None:
    """Let a control or export step that failed end as after a stop by the gate: its outputs point to its input.

    A failed task would fail the run and keep its report from being written, and the loop can do without either.
    """
    pointer = Pointer.load(Path(arguments["model"].path).read_text())
    stopped = gate.State(stopped=True, reason=f"{step} failed: {reason}")
    onward = dataclasses.asdict(pointer) | {"gate": stopped.dump()}
    # The outputs of prune, recover and evaluate; a step has some of them. Kubeflow keeps what is beside the file.
    for name in ("out", "accepted"):
        if name in arguments:
            artifact = arguments[name]
            write_pointer(Output(Path(artifact.path), artifact.metadata), onward)
    say(step, f"failed: {reason}; the run continues without it")


def _fail_in_mlflow(step: Step, failure: Failure) -> None:
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
            f"it points to {address.page(response.headers['location'])}",
            remedy=f"set {WEBHOOK} to that address",
        )


def _try(step: str, receiver: str, report: Callable[[], None]) -> None:
    """Nothing that goes wrong with a report may hide the failure itself."""
    try:
        report()
    except Exception as error:
        message = str(error)
        url = os.environ.get(WEBHOOK)
        if url:  # libraries quote the address, which may be a secret
            message = message.replace(url, "***")
        say(step, f"warning: the failure could not be reported to {receiver}: {message}")
