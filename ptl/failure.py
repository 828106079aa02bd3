"""A step that failed for good says so wherever somebody may look; nothing here hides why it failed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ptl import address, gate, localfs, tracking
from ptl.attempts import Failure
from ptl.call import Output, Step, write_pointer
from ptl.errors import WorkError
from ptl.log import say
from ptl.run_status import kubeflow_page
from ptl.store import Pointer

WEBHOOK = "PTL_WEBHOOK_URL"
SECONDS = 10


def announce(step: str, experiment: str, failure: Failure) -> None:
    """Report it to the local runner, in MLflow and to the webhook; what cannot be reached is a line in the log.

    A step whose attempts are used up has posted to the webhook before.
    """
    folder = os.environ.get("PTL_RUN_DIR")
    if folder:  # KFP's local runner itself only says that a task failed
        error = {"step": step, "message": failure.reason, "exit_code": failure.exit_code}
        localfs.replace(Path(folder, "error.json"), json.dumps(error).encode())
    with tracking.briefly():
        _try(step, "MLflow", lambda: _track(Step(step, experiment), failure))
    if os.environ.get(WEBHOOK) and not failure.exhausted:
        _try(step, "the webhook", lambda: _post(os.environ[WEBHOOK], step, failure.reason))


def pass_on(step: str, reason: str, arguments: dict[str, Any]) -> None:
    """Let a control step that failed end as after a stop by the gate: its outputs point to its input, and say why.

    A failed task would fail the run and keep its report from being written, and the loop can do without its control.
    """
    pointer = Pointer.load(Path(arguments["model"].path).read_text())
    stopped = gate.State(stopped=True, reason=f"{step} failed: {reason}")
    onward = replace(pointer, gate=stopped.dump())
    for name in ("out", "scores", "accepted"):
        if name in arguments:
            output = Output(Path(arguments[name].path))
            write_pointer(output, asdict(onward))
            arguments[name].metadata.update(output.metadata)
    say(step, f"failed: {reason}; the run continues without its control")


def _track(step: Step, failure: Failure) -> None:
    """Used-up attempts are no reason of their own: the page keeps why the last one failed, however many pods follow."""
    run = step.start()
    tracking.fail(run, (failure.exhausted and tracking.error_of(run)) or failure.reason)


def _post(url: str, step: str, reason: str) -> None:
    """A short JSON; `text` is what chat services show."""
    import requests

    run = tracking.pipeline_run()
    message = {"text": f"ptl: run {run} failed in {step}: {reason}", "run": run, "step": step, "reason": reason}
    page = kubeflow_page(run)
    body = message | ({"kubeflow": page} if page else {})
    answer = requests.post(url, json=body, timeout=SECONDS, allow_redirects=False)
    answer.raise_for_status()
    if answer.is_redirect:  # it may lead to anybody, and a POST that is redirected loses its body
        raise WorkError(f"it points to {address.page(answer.headers['location'])}; set {WEBHOOK} to that address")


def _try(step: str, what: str, report: Callable[[], None]) -> None:
    """Nothing that goes wrong with a report may hide the failure itself."""
    try:
        report()
    except Exception as error:
        message = str(error).replace(os.environ.get(WEBHOOK) or "\0", "***")  # the address may be a secret
        say(step, f"warning: the failure could not be reported to {what}: {message}")
