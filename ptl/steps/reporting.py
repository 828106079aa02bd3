"""What a step reports while it works and at its end: to MLflow, to Kubeflow's table of metrics, and to its log."""

from __future__ import annotations

from ptl.address import mlflow_ui, runs_page, without_login
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.report import run_page
from ptl.steps import attempts
from ptl.steps.call import Metadata
from ptl.storage.store import Pointer
from ptl.units import size

NOT_METRICS = ("iteration", "started")  # numbers of a record that are no results
COSTS = ("params", "bytes", "flops_per_token", "kv_bytes_per_token")  # of an evaluation's scores
ACCURACY = ("accuracy", "low", "high", "items")  # of a task's score


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
    say(run.step, f"started{number}")


def note_error(run: StepRun, error: Exception) -> None:
    """Keep on the step's page why an attempt failed; another one may follow."""
    # Where none is left the page has the reason of the last one.
    if not isinstance(error, attempts.NoAttemptLeftError):
        tracking.note_error(run, without_login(f"{type(error).__name__}: {error}"))


def track_evaluation(run: StepRun, iteration: int, scored: Pointer, metadata: Metadata) -> None:
    """The scores and the verdict of an evaluation, on the pages of the pipeline run and of the step."""
    first = metadata["scores"]["tasks"][0]
    removed = scored.original_params - scored.params
    tracking.log_progress(
        run,
        removed,
        first["accuracy"],
        low=first["low"],
        high=first["high"],
    )
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
    ui = mlflow_ui()
    return {
        **accuracy(scores["tasks"][0]),
        "params": scores["params"],
        "verdict": metadata["verdict"]["decision"],
        **({"mlflow": runs_page(ui, run.experiment_id, run.run_id)} if ui else {}),
    }


def summary(metadata: Metadata) -> str:
    """What a step has done, for its last line in the log."""
    match metadata["stage"]:
        case "evaluate":
            return f"{_score(metadata['scores']['tasks'][0])}, {metadata['verdict']['decision']}"
        case "recover":
            return f"{metadata['tokens']:,} tokens in {metadata['steps']} steps"
        case "export":
            return f"{size(metadata['bytes'])}, {_score(metadata['models']['final']['tasks'][0])}"
    # Of an import or a prune the size is what there is to say.
    return f"{metadata['params']:,} parameters"


def _score(task: Metadata) -> str:
    return f"{task['metric']} {task['accuracy']:.3f} on {task['items']} items"
