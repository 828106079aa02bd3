"""A step that failed for good says so wherever somebody may look; nothing here hides why it failed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ptl import gate, tracking
from ptl.errors import PtlError
from ptl.execution import Output, Step, artifact_root, write
from ptl.log import say
from ptl.store import Pointer

WEBHOOK = "PTL_WEBHOOK_URL"
SECONDS = 10


def announce(step: str, experiment: str, reason: str, exit_code: int) -> None:
    """Report it to the local runner, in MLflow and to the webhook: what cannot be reached is a line in the log."""
    folder = os.environ.get("PTL_RUN_DIR")
    if folder and not step.startswith("control-"):  # KFP's local runner itself only says that a task failed
        Path(folder, "error.json").write_text(json.dumps({"step": step, "message": reason, "exit_code": exit_code}))
    _try(step, "MLflow", lambda: _track(Step(step, experiment), reason))
    if os.environ.get(WEBHOOK):
        _try(step, "the webhook", lambda: _post(os.environ[WEBHOOK], step, reason))


def pass_on(step: str, reason: str, arguments: dict[str, Any]) -> None:
    """Let a control step that failed end as after a stop by the gate: its outputs point to its input, and say why.

    Argo ends a whole run as soon as one task fails, and the loop must not end with its control.
    """
    pointer = Pointer.load(Path(arguments["model"].path).read_text())
    stopped = gate.State(stopped=True, reason=f"{step} failed: {reason}")
    onward = replace(pointer, gate=stopped.dump())
    for name in ("out", "scores", "accepted"):
        if name in arguments:
            output = Output(Path(arguments[name].path))
            write(output, asdict(onward))
            arguments[name].metadata.update(output.metadata)
    say(step, "the loop goes on without its control")


def _track(step: Step, reason: str) -> None:
    run = tracking.start(
        step.experiment, step.name, arm=step.arm, iteration=step.iteration, artifact_location=artifact_root()
    )
    tracking.fail(run, reason)


def _post(url: str, step: str, reason: str) -> None:
    """A short JSON; `text` is what chat services show."""
    import requests

    run = tracking.pipeline_run()
    message = {"text": f"ptl: run {run} failed in {step}: {reason}", "run": run, "step": step, "reason": reason}
    page = tracking.kubeflow_page(run)
    requests.post(url, json=message | ({"kubeflow": page} if page else {}), timeout=SECONDS).raise_for_status()


def _try(step: str, what: str, report: Callable[[], None]) -> None:
    try:
        report()
    except (PtlError, OSError) as error:  # of requests' errors OSError is the base
        said = str(error).replace(os.environ.get(WEBHOOK) or "\0", "***")  # the address may be a secret
        say(step, f"warning: the failure could not be reported to {what}: {said}")
