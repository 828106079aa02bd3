"""The aliases `best` and `smallest` of a registered model: they move only to what was compared with their holder.

`best`: the highest accuracy; it moves to a checkpoint that is shown to be not inferior to its holder, and that has a
higher accuracy, or the same accuracy with fewer parameters. `smallest`: the fewest parameters; it moves to a smaller
checkpoint that the gate would accept against the dense model of the holder's run too. Both on the same items. What no
gate has tested must be shown to be not inferior to the dense model: an unclear comparison gives it no alias.
Versions are compared by their scores, never by their numbers: steps that run side by side number them out of order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl import paired, store, tracking
from ptl.config import Gate
from ptl.errors import InputError, PtlError, WorkError
from ptl.execution import Record, fetch
from ptl.run_status import StepRun
from ptl.store import Pointer

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Candidate:
    """A registered checkpoint of this run, and the record of the step that scored it."""

    version: str
    step: str
    params: int
    accuracy: float  # of the first task, 0..1
    record: Record

    def describe(self) -> str:
        """For a sentence."""
        return f"version {self.version} ({self.step}: {self.accuracy:.1%}, {self.params:,} parameters)"


def set_aliases(run: StepRun, records: dict[str, Record], registered_model: str, rule: Gate) -> list[str]:
    """Move both aliases where this run has earned them; returns sentences that say what became of each.

    `records` are those of the run's steps; an evaluate record carries its items under the fact `items`. Where two runs
    end at the same moment the last one to look at an alias decides: it is read again right before it is moved.
    """
    candidates, sentences = _candidates(run, records, registered_model, rule)
    if candidates:
        best = max(candidates, key=lambda one: (one.accuracy, -one.params))
        smallest = min(candidates, key=lambda one: (one.params, -one.accuracy))
        for alias, candidate in (("best", best), ("smallest", smallest)):
            sentences.append(_move(run, records, registered_model, alias, candidate, rule))
    return sentences


def _candidates(
    run: StepRun, records: dict[str, Record], registered_model: str, rule: Gate
) -> tuple[list[Candidate], list[str]]:
    """The registered checkpoints of a run that may have an alias; sentences about the others."""
    candidates, sentences, worse = [], [], []
    for step, record in records.items():
        metadata = record["metadata"]
        accepted = metadata.get("accepted") or {}
        registered = metadata["stage"] == "evaluate" and accepted.get("model_version")
        if not registered or accepted["digest"] != metadata["checkpoint"]["digest"]:
            continue  # what is passed on after a rejection was scored by an earlier step
        # The number that it has now: of a registry that was lost, the record's is out of date.
        tags = {"step": step, "params": accepted["params"]}
        try:
            version = tracking.register(run, registered_model, Pointer(**accepted), tags)
        except WorkError as error:  # MLflow refuses some sources of models that it has lost
            sentences.append(f"no alias for {step}: it cannot be registered: {error}")
            continue
        accuracy, params = metadata["scores"]["tasks"][0]["accuracy"], metadata["scores"]["params"]
        candidate = Candidate(version, step, params, accuracy, record)
        try:
            pair = _paired(records["evaluate-0"], record, rule)
        except InputError as error:
            sentences.append(f"no alias for {candidate.describe()}: {error}")
            continue
        if _acceptable(pair, rule):
            candidates.append(candidate)
        else:
            worse.append(f"{candidate.version} ({step}: {accuracy:.1%})")
    if worse:
        plural = "s" * (len(worse) > 1)
        sentences.append(f"no alias for version{plural} {', '.join(worse)}: not shown as good as the dense model")
    return candidates, sentences


def _move(
    run: StepRun,
    records: dict[str, Record],
    registered_model: str,
    alias: str,
    candidate: Candidate,
    rule: Gate,
) -> str:
    """Point the alias at the candidate, unless its holder has better claims; says what was done."""
    name = f"alias {alias} of {registered_model}"
    holder = _holder(registered_model, alias)
    while True:
        if holder is not None and str(holder.version) == candidate.version:
            return f"{name}: {candidate.describe()}"
        why = _stays(run, records, alias, candidate, holder, rule) if holder is not None else ""
        if why and holder is not None:
            return f"{name}: stays at version {holder.version}; {candidate.describe()} {why}"
        seen, holder = holder, _holder(registered_model, alias)
        if (seen and seen.version) == (holder and holder.version):
            tracking.set_alias(registered_model, alias, candidate.version)
            before = f", was version {seen.version}" if seen else ""
            return f"{name}: {candidate.describe()}{before}"


def _stays(
    run: StepRun,
    records: dict[str, Record],
    alias: str,
    candidate: Candidate,
    holder: ModelVersion,
    rule: Gate,
) -> str:
    """Why the alias stays with its holder; empty where the candidate takes it."""
    by_hand = (
        f"to move it by hand: MlflowClient().set_registered_model_alias({holder.name!r}, {alias!r}, "
        f"{candidate.version!r}), or Aliases on the version's page in MLflow"
    )
    try:
        scored = _record(run, records, holder, holder.tags.get("ptl.step", ""))
        smaller = candidate.params < scored["metadata"]["scores"]["params"]
        if alias == "best":
            pair = _paired(scored, candidate.record, rule)
            better = pair.difference > 0 or (pair.difference == 0 and smaller)
            proven = pair.verdict == "not inferior"
        else:
            dense = _record(run, records, holder, "evaluate-0")
            pair, better = _paired(dense, candidate.record, rule), smaller
            proven = _acceptable(pair, rule)
    except (PtlError, OSError) as error:
        return f"cannot be compared with it: {error}; {by_hand}"
    if not better:
        return f"is not better: {paired.describe(pair)}" if alias == "best" else "is not smaller"
    against = "it" if alias == "best" else f"the dense model of its run {holder.tags['ptl.run']}"
    return "" if proven else f"is not shown to be as good as {against}: {paired.describe(pair)}; {by_hand}"


def _record(run: StepRun, records: dict[str, Record], holder: ModelVersion, step: str) -> Record:
    """An evaluate step of the run that registered the holder, with its items.

    Raises PtlError or OSError where they cannot be read.
    """
    from ptl.evaluate import read_items

    root, its_run = holder.tags.get("ptl.root"), holder.tags.get("ptl.run")
    if not root or not its_run or not step:
        raise InputError(
            f"version {holder.version} has no tags ptl.run, ptl.step and ptl.root, which say what scored it"
        )
    if its_run == run.run and step in records:
        return records[step]
    record = store.committed(root, its_run, step)
    if record is None:
        raise WorkError(f"{root} has no record of {step} of run {its_run}, which scored version {holder.version}")
    items = read_items(fetch(Pointer(**record["pointer"])))
    return {**record, "metadata": {**record["metadata"], "items": items}}


def _paired(reference: Record, candidate: Record, rule: Gate) -> paired.Paired:
    """Two evaluations on the first task. Raises InputError for another task or other items."""
    old, new = ({"metric": "", "version": ""} | one["metadata"]["scores"]["tasks"][0] for one in (reference, candidate))
    for field in ("task", "version", "metric"):
        if old[field] != new[field]:
            raise InputError(f"scored on another {field} ({old[field]!r} and {new[field]!r})")
    pairs = paired.match(reference["metadata"]["items"], candidate["metadata"]["items"], str(new["task"]))
    return paired.paired(*pairs, rule.margin, rule.alpha)


def _acceptable(pair: paired.Paired, rule: Gate) -> bool:
    """The gate's rule: inferior is refused; with `strict`, and with the gate off, also what is unclear."""
    return pair.verdict == "not inferior" or (pair.verdict == "unclear" and rule.enabled and not rule.strict)


def _holder(registered_model: str, alias: str) -> ModelVersion | None:
    """The version that has the alias now."""
    with tracking.explained():
        client = tracking.connect()
        aliases: dict[str, Any] = client.get_registered_model(registered_model).aliases
        return client.get_model_version(registered_model, str(aliases[alias])) if alias in aliases else None
