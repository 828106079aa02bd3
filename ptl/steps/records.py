"""What a step reports while it works and at its end: to MLflow, to Kubeflow's table of metrics, and to its log.

One that failed for good is reported wherever somebody may look; nothing here hides why it failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ptl import address, connections, processes
from ptl.errors import PtlError, WorkError
from ptl.evaluation import gate
from ptl.evaluation.retention import TextLosses
from ptl.lineage import mlflow_client, run_page, tracking
from ptl.lineage.run_status import TAG, StepRun, kubeflow_page
from ptl.local import progress
from ptl.log import say
from ptl.steps import attempts
from ptl.steps.call import Call, Metadata
from ptl.storage import local_files
from ptl.storage.store import Pointer, Record
from ptl.units import size

NOT_METRICS = ("iteration", "started")  # numbers of a record that are no results
# Of an evaluation's scores
COSTS = ("params", "bytes", "flops_per_token", "kv_bytes_per_token", "hidden_size", "kv_heads")
ACCURACY = ("accuracy", "low", "high", "items")  # of a task's score
ANSWERS = ("answer_tokens", "answer_tokens_p95", "truncated")  # of one whose answers are generated
WEBHOOK = "PTL_WEBHOOK_URL"
SECONDS = 10  # to wait for the webhook's answer


def begin(run: StepRun) -> None:
    """Count an attempt, in the store and on the step's page. Raises NoAttemptLeftError, with the last one's reason."""
    # The step's process dies with a crash: only what is counted before the work counts.
    try:
        attempt = attempts.claim(run.root, run.run, run.step)
    except attempts.NoAttemptLeftError as error:
        # Whoever reads this looks for why, not for how often.
        reason = tracking.error_of(run)
        last = f"; the last one failed: {reason}" if reason else ""
        raise attempts.NoAttemptLeftError(f"{error.problem}{last}", remedy=error.remedy) from None
    tracking.tag(run, {"attempt": attempt})
    number = "" if attempt == 1 else f", attempt {attempt} of {attempts.policy().retries + 1}"
    say(run.step, f"started{number}{progress.position_of(run.step)}")


def note_nodes(run: StepRun, text: str) -> None:
    """Keep on the step's page what its nodes are at, as tag `ptl.nodes`; empty where they all train."""
    # The training does not need MLflow for that.
    with contextlib.suppress(PtlError), mlflow_client.briefly():
        tracking.tag(run, {"nodes": text})


def note_error(run: StepRun, error: Exception) -> None:
    """Keep on the step's page why an attempt failed, as tag `ptl.error`; another one may follow."""
    # Where none is left the page has the reason of the last one.
    if not isinstance(error, attempts.NoAttemptLeftError):
        message = address.without_login(f"{type(error).__name__}: {error}")
        with _no_reason_to_fail(run.step, "MLflow"), mlflow_client.briefly():
            tracking.tag(run, {"error": message[:TAG]})


def track_evaluation(run: StepRun, iteration: int, scored: Pointer, metadata: Metadata) -> None:
    """The scores and the verdict of an evaluation, on the pages of the pipeline run and of the step."""
    first = metadata["scores"]["tasks"][0]
    removed = scored.original_params - scored.params
    tracking.log_progress(run, removed, first["accuracy"], low=first["low"], high=first["high"])
    if iteration == 0:
        # Known from the start on, beside which the page shows the final model at the end.
        run_page.log_result(run, {"dense/accuracy": first["accuracy"]})
    tags = {"verdict": metadata["verdict"]["decision"]}
    # `ptl status` and the run's page say where and why the loop ended.
    state = metadata["accepted"]["gate"]
    if state.get("stopped"):
        tags["loop_ended"] = state["reason"]
    tracking.tag(run, tags)


def metrics(metadata: Metadata) -> dict[str, float]:
    """The numbers of a step's metadata that MLflow shows; of an evaluation what the model costs, and each benchmark."""
    shown = {name: value for name, value in metadata.items() if name not in NOT_METRICS}
    scores = metadata.get("scores")
    if scores:
        shown |= {name: scores[name] for name in COSTS}
        if scores["experts"]:
            shown["active_params"] = scores["active_params"]
        for task in scores["tasks"]:
            shown |= {f"{task['task']}/{name}": value for name, value in accuracy(task).items()}
            shown |= {
                f"{task['task']}/{name}": task[name] for name in ANSWERS if task["answer_tokens"]
            }
            if task["samples"] > 1:  # MLflow's names have no @
                shown[f"{task['task']}/pass_at_{task['samples']}"] = task["pass_at_n"]
        shown["retention/perplexity"] = TextLosses(**scores["retention"]).perplexity
        # The first benchmark is the run's accuracy.
        shown["accuracy"] = scores["tasks"][0]["accuracy"]
    return {name: float(value) for name, value in shown.items() if isinstance(value, int | float)}


def accuracy(task: Metadata) -> dict[str, float]:
    """A task's score with its interval and number of items, which metrics other than an accuracy do not have."""
    return {name: task[name] for name in ACCURACY if task[name] is not None}


def score_tags(scores: Metadata, checkpoint: Pointer) -> Metadata:
    """The tags of a registered version that say how good and how small it is."""
    first = scores["tasks"][0]
    # Tags are texts: more digits would only be noise.
    numbers = {name: f"{value:.4g}" for name, value in accuracy(first).items() if name != "items"}
    removed = 1 - checkpoint.params / checkpoint.original_params
    return {
        "task": first["task"],
        "items": first["items"],
        **numbers,
        "share_removed": f"{removed:.4f}",
    }


def kubeflow_metrics(metadata: Metadata, run: StepRun) -> Metadata:
    """What Kubeflow's table of a run's metrics has of an evaluation; with the way to its run in MLflow."""
    scores = metadata["scores"]
    ui = address.mlflow_ui()
    return {
        **accuracy(scores["tasks"][0]),
        "params": scores["params"],
        "verdict": metadata["verdict"]["decision"],
        **({"mlflow": address.runs_page(ui, run.experiment_id, run.run_id)} if ui else {}),
    }


def summary(metadata: Metadata) -> str:
    """What a step has done, for its last line in the log."""
    match metadata["stage"]:
        case "evaluate":
            return f"{_score(metadata['scores']['tasks'][0])}, {metadata['verdict']['decision']}"
        case "recover":
            return f"{metadata['tokens']:,} tokens in {metadata['steps']} steps"
        case "answers":
            return f"{metadata['kept']:,} of {metadata['written']:,} answers kept"
        case "export":
            return f"{size(metadata['bytes'])}, {_score(metadata['models']['final']['tasks'][0])}"
    # Of an import or a prune the size is what there is to say.
    return f"{metadata['params']:,} parameters"


def note_end(step: str, record: Record | None, taken_over_from: str) -> None:
    """Note for `ptl status` of a local run that a step is done, and what came out."""
    if record is None:
        progress.note(step, progress.DONE)
        return
    metadata = record.metadata
    evaluated = {}
    if metadata["stage"] == "evaluate":
        evaluated = {
            "accuracy": metadata["scores"]["tasks"][0]["accuracy"],
            "verdict": metadata["verdict"]["decision"],
            "ends_loop": metadata["accepted"]["gate"].get("stopped", False),
        }
    progress.note(
        step,
        progress.DONE,
        since=metadata["started"] + metadata["whole_seconds"],
        seconds=max(metadata["seconds"], metadata["whole_seconds"]),
        summary="" if evaluated else summary(metadata),
        taken_over_from=taken_over_from,
        **evaluated,
    )


def _score(task: Metadata) -> str:
    return f"{task['metric']} {task['accuracy']:.3f} on {task['items']} items"


def give_up(
    call: Mapping[str, Any], failure: attempts.Failure, artifacts: Mapping[str, Any]
) -> None:
    """Report a failure wherever somebody may look, and end the process where the run must end with it.

    `call` is the step's as its process reads it, `artifacts` are Kubeflow's of its outputs.
    """
    # Without its inputs: one that is no pointer may be what failed.
    step = Call.load({**call, "inputs": {}})
    # A run reaches its report without an export, and on a cluster without its control: on one machine somebody sees
    # that fail, and the same command resumes it.
    dispensable = step.arm == "export" or (step.arm == "control" and processes.on_a_cluster())
    folder = os.environ.get("PTL_RUN_DIR")
    if folder and not dispensable:
        # For the command on this machine that the step ends: KFP itself only says that a task failed.
        error = {"step": step.step, "message": failure.reason, "exit_code": failure.exit_code}
        local_files.replace(Path(folder, "error.json"), json.dumps(error).encode())
    with _no_reason_to_fail(step.step, "`ptl status`"):
        progress.note(step.step, progress.FAILED, error=failure.reason)
    announce(step, failure)
    if not dispensable:
        sys.exit(failure.exit_code)
    # The step ends as after a stop by the gate: a failed task would keep the report from being written.
    stopped = gate.State(stopped=True, reason=f"{step.step} failed: {failure.reason}")
    step.write(
        dataclasses.replace(Pointer.load(call["inputs"]["model"]), gate=dataclasses.asdict(stopped))
    )
    for name, artifact in artifacts.items():
        artifact.metadata.update(step.outputs[name].metadata)
    say(step.step, f"failed: {failure.reason}; the run continues without it")


def announce(step: Call, failure: attempts.Failure) -> None:
    """Report it in MLflow and to the webhook; what cannot be reached is a line in the log."""
    # What failed may be MLflow itself: waiting for it would only delay the webhook.
    with _no_reason_to_fail(step.step, "MLflow"), mlflow_client.briefly():
        _fail_in_mlflow(step, failure)
    # A step whose attempts are used up has posted before: every pod that follows would post the same again.
    if os.environ.get(WEBHOOK) and not failure.exhausted:
        with _no_reason_to_fail(step.step, "the webhook"):
            _post(os.environ[WEBHOOK], step.step, failure.reason)


def _fail_in_mlflow(step: Call, failure: attempts.Failure) -> None:
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
    # A path may be the secret: requests' own messages, and what an address is redirected to, have it.
    try:
        response = requests.post(url, json=message, timeout=SECONDS, allow_redirects=False)
    except (requests.RequestException, ValueError) as error:
        if isinstance(error, ValueError):
            raise WorkError(f"{WEBHOOK} is no address") from None
        raise WorkError(
            f"it does not answer: {connections.failure(error) or type(error).__name__}"
        ) from None
    if response.is_redirect:
        # It may lead to any server, and a POST that is redirected loses its body.
        server = urlsplit(urljoin(url, response.headers["location"])).hostname
        raise WorkError(f"it redirects to {server}", remedy=f"set {WEBHOOK} to that address")
    if not response.ok:
        raise WorkError(f"it answers {connections.status_name(response.status_code)}")


@contextlib.contextmanager
def _no_reason_to_fail(step: str, receiver: str) -> Iterator[None]:
    """Nothing that goes wrong with a report may hide the failure itself."""
    try:
        yield
    except Exception as error:
        say(step, f"warning: the failure could not be reported to {receiver}: {error}")
