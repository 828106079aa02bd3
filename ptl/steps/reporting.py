"""What a step reports to MLflow: its attempts, why they failed, and the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ptl.address import without_login
from ptl.config.flat_settings import flat_settings
from ptl.lineage import tracking
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.report import run_page
from ptl.steps import attempts, metrics
from ptl.steps.call import Metadata, Step
from ptl.storage.store import Pointer, Record


@contextmanager
def noting_errors(run: StepRun) -> Iterator[None]:
    """Keep on the step's page why an attempt failed; another one may follow."""
    try:
        yield
    except attempts.NoAttemptLeftError:
        raise  # the page has the reason of the last one
    except Exception as error:
        tracking.note_error(run, without_login(f"{type(error).__name__}: {error}"))
        raise


def begin(run: StepRun) -> None:
    """Count an attempt, in the store and on the step's page. Raises NoAttemptLeftError, with the last one's reason."""
    # The step's process dies with a crash: only what is counted before the work counts.
    try:
        attempt = attempts.claim(run.root, run.run, run.step)
    except attempts.NoAttemptLeftError as error:
        # Whoever reads this looks for why, not for how often.
        reason = tracking.error_of(run)
        last = f"; the last one failed: {reason}" if reason else ""
        raise attempts.NoAttemptLeftError(
            f"{error.problem}{last}",
            remedy=error.remedy,
        ) from None
    tracking.tag(run, {"attempt": attempt})
    number = "" if attempt == 1 else f", attempt {attempt} of {attempts.policy().attempts}"
    say(run.step, f"started{number}")


def track(
    step: Step,
    run: StepRun,
    parent: Pointer | None,
    settings: Metadata,
    record: Record,
) -> None:
    """Report to MLflow what a record says; repeating it changes nothing."""
    metadata = record["metadata"]
    evaluated = metadata["stage"] == "evaluate"
    # An evaluation makes no model; its scores belong to the run's own page too. First, since whoever watches the step
    # reads its verdict as soon as it has finished.
    if parent and evaluated:
        _track_evaluation(step, run, parent, metadata)
    tracking.finish(
        run,
        params=flat_settings(settings),
        metrics=metrics.metrics(metadata),
        inputs=[parent.model_id] if parent else [],
        output=None if evaluated else record["pointer"]["model_id"],
        step=step.iteration,
    )


def _track_evaluation(step: Step, run: StepRun, scored: Pointer, metadata: Metadata) -> None:
    """The scores and the verdict of an evaluation, on the pages of the pipeline run and of the step."""
    scores = metadata["scores"]
    first = scores["tasks"][0]
    removed = scored.original_params - scores["params"]
    tracking.log_progress(run, removed, first["accuracy"], low=first["low"], high=first["high"])
    if step.iteration == 0:
        # Known from the start on, beside which the page shows the final model at the end.
        run_page.log_result(run, {"dense/accuracy": first["accuracy"]})
    tags = {"verdict": metadata["verdict"]["decision"]}
    # `ptl status` and the run's page say where and why the loop ended.
    state = metadata["accepted"]["gate"]
    if state.get("stopped") and state.get("reason"):
        tags["loop_ended"] = state["reason"]
    tracking.tag(run, tags)
