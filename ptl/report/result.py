"""What a run found, as result.json has it: the one truth from which pages, tables, cards and metrics are made."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from ptl.data.amount import Amount
from ptl.evaluation.evaluate import Scores
from ptl.evaluation.paired import Paired, rambles
from ptl.evaluation.retention import Retained
from ptl.evaluation.scoring import TaskScore
from ptl.model.widths import ComparedWidths

FORGETS = 1.2  # times the dense model's perplexity of held-out text


class Row(BaseModel):
    """A scored checkpoint; its accuracy is the score of the run's first benchmark."""

    arm: str  # loop or control
    iteration: int  # 0: the dense model
    params: int
    accuracy: float
    low: float | None  # interval of the accuracy
    high: float | None
    items: int
    task: str
    recovery_tokens: int  # of this iteration alone
    verdict: str  # baseline, accepted, rejected, stopped, gate off or control
    uri: str  # of what was scored: after a rejection it is not what the loop continues with
    digest: str
    share_removed: float
    step: str
    reason: str  # of the verdict
    numbers: dict[str, Any]  # that the gate decided by: sizes in parameters, and paired comparisons
    removed_layers: list[int]  # in this iteration, numbered as in the dense model
    compared: list[ComparedWidths]  # by its prune step; none where it had no choice
    scores: Scores

    @property
    def label(self) -> str:
        """What the tables call it."""
        return "control" if self.arm == "control" else str(self.iteration or "dense")

    @property
    def first(self) -> TaskScore:
        """The score that is the run's accuracy."""
        return self.scores.tasks[0]


class Final(BaseModel):
    """The checkpoint that the run ends with; never a rejected one."""

    uri: str
    digest: str
    params: int
    share_removed: float
    run_id: str
    model_id: str
    model_version: str


class StepRow(BaseModel):
    """A finished step: its checkpoint, and how long it worked."""

    step: str
    arm: str
    iteration: int
    stage: str
    seconds: float  # of work
    whole_seconds: float  # with the libraries' imports
    params: int
    tokens: int = 0  # of a recovery
    uri: str
    digest: str
    parent_digest: str
    run_id: str  # of the step in MLflow


class Missing(BaseModel):
    """A step that left no record."""

    step: str
    iteration: int
    reason: str


class ExportedModel(BaseModel):
    """A model in another format."""

    bytes: int  # of its weights
    tasks: list[TaskScore]


class ExportRow(BaseModel):
    """An export of the final checkpoint; without `models` it was not made."""

    name: str  # for example gguf-q4_k_m
    format: str
    type: str
    limit: int | None
    step: str
    failed: str = ""  # why there is none
    models: dict[str, ExportedModel] = {}  # dense (unless it is the final one) and final
    speed: dict[str, Any] = {}  # by model; {"reason": ...} where it was not measured
    notes: list[str] = []
    scored: dict[str, str] = {}  # the steps that scored dense and final as they are
    # task -> reference -> the final model's export against it
    pairs: dict[str, dict[str, Paired]] = {}
    uri: str = ""
    digest: str = ""


class Decontaminated(BaseModel):
    """Training rows of the loop that were compared with the benchmarks."""

    rows_compared: int
    rows_dropped: int
    benchmark_items: int
    benchmark_items_short: int  # too short to be found inside a row
    not_compared: list[str]  # benchmarks whose items are not known


class Sequences(BaseModel):
    """What the loop was trained on; reinforcement learning has none."""

    sequences: int = 0
    cut_sequences: int = 0  # by max_length
    passes: float | None = None  # over the rows


class Change(BaseModel):
    """An item that one of two models answered right."""

    task: str
    id: str
    prompt: str
    target: str
    before: str  # the dense model's answer
    after: str
    before_truncated: bool  # by the token limit
    after_truncated: bool
    before_thought: str  # of the dense model, before its answer; empty: it does not think
    after_thought: str


class Examples(BaseModel):
    """Answers that changed from the dense to the final model, as many as the pages have room for."""

    step: str  # that scored the final model
    compared: int
    num_regressions: int
    num_improvements: int
    regressions: list[Change]
    improvements: list[Change]


class Source(BaseModel):
    """The dense model."""

    model: str  # path or hub id
    revision: str
    base_model: str  # hub id of the model, or of what it was made from; empty: not known
    license: str  # as its model card names it; empty: it names none
    license_name: str
    license_link: str


class Tracking(BaseModel):
    """Where MLflow has the run."""

    url: str  # empty: no server
    experiment_id: str


class Result(BaseModel):
    """A run."""

    run_id: str
    mlflow_run_id: str
    seed: int
    versions: dict[str, str]
    # the loop's in the order of iterations, beginning with the dense model, then the control
    rows: list[Row]
    final: Final
    name: str
    model: Source
    original_params: int
    host: str
    started: float  # unix time
    wall_seconds: float  # from the first start to the last end, pauses included
    confidence: float  # of the intervals
    mlflow: Tracking
    steps: list[StepRow]
    not_needed: list[Missing]  # the loop had ended
    control_failed: str  # why the control has no score
    not_finished: list[Missing]  # steps of a failed control
    # of evaluation.speed.side_by_side; {"reason": ...} where it was not measured
    speed: dict[str, Any]
    exports: list[ExportRow]
    decontaminated: Decontaminated | None
    sequences: Sequences
    # task -> dense, control -> the final model against it, item by item
    paired: dict[str, dict[str, Paired]]
    # task with several samples -> pass@n, the final model against the dense one
    pass_at_n: dict[str, Paired]
    # task -> p of the paired test that the final model's answers have more tokens
    longer: dict[str, float]
    retained: Retained | None  # None: the dense model does not predict such text
    examples: Examples | None
    settings: dict[str, Any]  # the effective config

    @property
    def dense_row(self) -> Row:
        """The dense model's row."""
        return self.rows[0]

    @property
    def final_row(self) -> Row | None:
        """The final checkpoint's row; None where it was never scored."""
        # It may have been scored twice: the last time counts.
        scored = [row for row in self.rows if row.arm == "loop" and row.digest == self.final.digest]
        return scored[-1] if scored else None

    @property
    def control_row(self) -> Row | None:
        """The one-shot control's row; None where the run has none, or it did not finish."""
        return next((row for row in self.rows if row.arm == "control"), None)

    @property
    def tasks(self) -> list[str]:
        """The benchmarks, on which all checkpoints were scored."""
        return [task.task for task in self.dense_row.scores.tasks]

    def pair(self, reference: str, task: str = "") -> Paired | None:
        """The final model against `dense` or `control` on a task (the first one); None without items."""
        return self.paired.get(task or self.dense_row.task, {}).get(reference)

    def metrics(self) -> dict[str, float]:
        """The final model in numbers for MLflow: its score, the removed share, and p beside the dense model."""
        metrics = {"final/removed": self.final.share_removed}
        # The final model has no score of its own where the run ended with another checkpoint than it scored.
        if self.final_row is not None:
            metrics["final/accuracy"] = self.final_row.accuracy
        pair = self.pair("dense")
        return metrics | {"final/p": pair.p_different} if pair else metrics

    def rambles(self, task: str) -> bool:
        """Whether the final model's answers are longer than the dense model's, and not by chance."""
        position = self.tasks.index(task)
        final = self.final_row
        if final is None:
            return False
        before, after = (
            row.scores.tasks[position].answer_tokens for row in (self.dense_row, final)
        )
        return rambles(before, after, self.longer.get(task))

    @property
    def forgets(self) -> bool:
        """Whether the final model predicts held-out text far worse than the dense one."""
        return self.retained is not None and self.retained.ratio > FORGETS

    def total_tokens(self, arm: str) -> int:
        """Recovery tokens of all steps of an arm, rejected iterations included."""
        return sum(step.tokens for step in self.steps if step.arm == arm)

    @property
    def work_seconds(self) -> float:
        """Of all steps together, as if one had run after another."""
        return sum(step.seconds for step in self.steps)

    @property
    def amount(self) -> Amount:
        """What the loop trained beside what it removed."""
        tokens = self.total_tokens("loop") if self.sequences.sequences else 0
        return Amount(tokens, self.original_params - self.final.params, self.sequences.passes)
