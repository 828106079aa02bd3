"""The aliases `best` and `smallest` of a registered model: they move only to versions compared with their holder.

`best`: the highest accuracy; it moves to a checkpoint that is shown to be not inferior to its holder, and that has a
higher accuracy, or the same accuracy with fewer parameters. `smallest`: the fewest parameters; it moves to a smaller
checkpoint that the gate would accept against the dense model of the holder's run too. Both on the same items. What no
gate has tested must be shown to be not inferior to the dense model: an unclear comparison gives it no alias.
Versions are compared by their scores, never by their numbers: steps that run side by side number them out of order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl.config.run import Gate
from ptl.errors import InputError, PtlError, WorkError
from ptl.evaluation import paired
from ptl.lineage import mlflow_client, registry
from ptl.lineage.run_status import StepRun
from ptl.steps import versions
from ptl.steps.inputs import fetch_items
from ptl.storage import store
from ptl.storage.store import Pointer, Record

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class ScoredRun:
    """A run whose checkpoints may take an alias."""

    run: StepRun
    records: dict[str, Record]  # by step; those of evaluations with their items
    registered_model: str
    gate: Gate


@dataclass(frozen=True)
class Candidate:
    """A registered checkpoint of this run, and the record of the step that scored it."""

    version: str  # in the registry
    step: str
    params: int
    accuracy: float  # of the first task, 0..1
    record: Record

    def describe(self) -> str:
        """The candidate as sentences name it."""
        return f"version {self.version} ({self.step}: {self.accuracy:.1%}, {self.params:,} parameters)"


def set_aliases(
    run: StepRun,
    records: dict[str, Record],
    registered_model: str,
    settings: Gate,
) -> list[str]:
    """Move both aliases to this run's versions where the comparisons allow it; returns a sentence for each outcome.

    `records` are those of the run's steps; an evaluate record carries its items in its metadata as `items`. Where two
    runs end at the same moment the last one to look at an alias decides: it is read again right before it is moved.
    """
    scored = ScoredRun(run, records, registered_model, settings)
    candidates, sentences = _candidates(scored)
    if not candidates:
        return sentences
    # Of equal ones the smaller is the best, and of equally small ones the better is the smallest.
    best = max(candidates, key=lambda candidate: (candidate.accuracy, -candidate.params))
    smallest = min(candidates, key=lambda candidate: (candidate.params, -candidate.accuracy))
    return [
        *sentences,
        _move(scored, "best", best),
        _move(scored, "smallest", smallest),
    ]


def _candidates(scored: ScoredRun) -> tuple[list[Candidate], list[str]]:
    """The registered checkpoints of a run that may have an alias; sentences about the others."""
    candidates = []
    sentences = []
    worse = []  # not shown as good as the dense model
    for step, record in scored.records.items():
        if not versions.is_registered(record):
            continue
        try:
            candidate = _candidate(scored, step, record)
        except WorkError as error:
            # MLflow refuses some sources of models that it has lost.
            sentences.append(f"no alias for {step}: it cannot be registered: {error}")
            continue
        try:
            pair = _paired(scored.records["evaluate-0"], record, scored.gate)
        except InputError as error:
            sentences.append(f"no alias for {candidate.describe()}: {error}")
            continue
        # With the gate off nothing has compared it with the dense model before.
        if _acceptable(pair, scored.gate):
            candidates.append(candidate)
        else:
            worse.append(f"{candidate.version} ({step}: {candidate.accuracy:.1%})")
    # One sentence for all of them: in a run without the gate there may be many.
    if worse:
        plural = "s" if len(worse) > 1 else ""
        sentences.append(f"no alias for version{plural} {', '.join(worse)}: not shown as good as the dense model")
    return candidates, sentences


def _candidate(scored: ScoredRun, step: str, record: Record) -> Candidate:
    """The version that a step's checkpoint has now: of a registry that was lost, the record's is out of date."""
    metadata = record["metadata"]
    accepted = Pointer(**metadata["accepted"])
    tags = {"step": step, "params": accepted.params}
    scores = metadata["scores"]
    return Candidate(
        registry.register(scored.run, scored.registered_model, accepted, tags),
        step,
        scores["params"],
        scores["tasks"][0]["accuracy"],
        record,
    )


def _move(scored: ScoredRun, alias: str, candidate: Candidate) -> str:
    """Point the alias at the candidate, unless it stays with its holder; returns a sentence for the log."""
    registered_model = scored.registered_model
    name = f"alias {alias} of {registered_model}"
    # Until nobody else has moved it meanwhile.
    holder = _holder(registered_model, alias)
    while True:
        if holder is not None:
            if str(holder.version) == candidate.version:
                return f"{name}: {candidate.describe()}"
            reason = _reason_to_stay(scored, alias, candidate, holder)
            if reason:
                return f"{name}: stays at version {holder.version}; {candidate.describe()} {reason}"
        # Another run may have moved it while this one was compared with its holder.
        compared, holder = holder, _holder(registered_model, alias)
        if (compared and compared.version) == (holder and holder.version):
            registry.set_alias(registered_model, alias, candidate.version)
            before = f", was version {holder.version}" if holder else ""
            return f"{name}: {candidate.describe()}{before}"


def _holder(registered_model: str, alias: str) -> ModelVersion | None:
    """The version that has the alias now."""
    with mlflow_client.explained():
        client = mlflow_client.connect()
        holders: dict[str, Any] = client.get_registered_model(registered_model).aliases
        if alias not in holders:
            return None
        return client.get_model_version(registered_model, str(holders[alias]))


def _reason_to_stay(
    scored: ScoredRun,
    alias: str,
    candidate: Candidate,
    holder: ModelVersion,
) -> str:
    """Why the alias stays with its holder; empty where the candidate takes it."""
    # A person may know what the numbers cannot show.
    by_hand = (
        f"to move it by hand: MlflowClient().set_registered_model_alias({holder.name!r}, {alias!r}, "
        f"{candidate.version!r}), or Aliases on the version's page in MLflow"
    )
    try:
        own = _evaluation(scored, holder, holder.tags.get("ptl.step", ""))
        reference = own if alias == "best" else _evaluation(scored, holder, "evaluate-0")
        pair = _paired(reference, candidate.record, scored.gate)
    except (PtlError, OSError) as error:
        return f"cannot be compared with it: {error}; {by_hand}"
    smaller = candidate.params < own["metadata"]["scores"]["params"]
    if alias == "best":
        # A claim on `best` is a higher score, or the same one with fewer parameters.
        if pair.difference < 0 or (pair.difference == 0 and not smaller):
            return f"is not better: {paired.describe(pair)}"
        proven = pair.verdict == "not inferior"
        model = "it"
    else:
        if not smaller:
            return "is not smaller"
        # The gate would accept it against the dense model of the holder's run.
        proven = _acceptable(pair, scored.gate)
        model = f"the dense model of its run {holder.tags['ptl.run']}"
    if proven:
        return ""
    return f"is not shown to be as good as {model}: {paired.describe(pair)}; {by_hand}"


def _evaluation(scored: ScoredRun, holder: ModelVersion, step: str) -> Record:
    """The record of an evaluate step, with its items, of the run that registered the holder.

    Raises PtlError or OSError where they cannot be read.
    """
    root = holder.tags.get("ptl.root")
    run = holder.tags.get("ptl.run")
    if not root or not run or not step:
        # Somebody has registered it by hand.
        raise InputError(
            f"version {holder.version} has no tags ptl.run, ptl.step and ptl.root, which say what scored it",
        )
    # The records at hand have their items already.
    if run == scored.run.run and step in scored.records:
        return scored.records[step]
    record = store.committed(root, run, step)
    if record is None:
        raise WorkError(f"{root} has no record of {step} of run {run}, which scored version {holder.version}")
    record["metadata"]["items"] = fetch_items(record)
    return record


def _paired(reference: Record, candidate: Record, settings: Gate) -> paired.Paired:
    """Two evaluations on the first task. Raises InputError for another task or other items."""
    old = reference["metadata"]
    new = candidate["metadata"]
    old_task = old["scores"]["tasks"][0]
    new_task = new["scores"]["tasks"][0]
    # Scores of another benchmark, of another version of it or by another metric are other numbers.
    for field in ("task", "version", "metric"):
        # A record without one of them is compared by the others.
        old_value = old_task.get(field, "")
        new_value = new_task.get(field, "")
        if old_value != new_value:
            raise InputError(f"scored on another {field} ({old_value!r} and {new_value!r})")
    outcomes = paired.match(old["items"], new["items"], new_task["task"])
    return paired.paired(*outcomes, settings.margin, settings.alpha)


def _acceptable(pair: paired.Paired, settings: Gate) -> bool:
    """As the gate decides: inferior is refused; with `strict`, and with the gate off, also what is unclear."""
    # The gate has compared the checkpoint with its parent too; without it an unclear comparison proves nothing.
    # Nor does one with a model that solves too few items to fall by the margin.
    if pair.verdict == "unclear" and paired.can_fall(pair.reference, pair.margin):
        return settings.enabled and not settings.strict
    return pair.verdict == "not inferior"
