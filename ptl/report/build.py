"""The committed records of a run's steps -> its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ptl.config.dag import export_step
from ptl.config.export import Export
from ptl.config.run import Evaluate
from ptl.errors import InputError
from ptl.evaluation.paired import Item, Paired, match, paired
from ptl.log import say
from ptl.report.result import (
    Change,
    Decontaminated,
    Examples,
    ExportRow,
    Final,
    Goal,
    Missing,
    Result,
    Row,
    Sequences,
    Source,
    StepRow,
    Tracking,
)

STAGES = ("import", "prune", "recover", "evaluate", "export")
LOOP = ("prune", "recover", "evaluate")
MAX_CHANGED = 250  # regressions, and improvements, that a page shows: a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer
NOT_MADE = "its step has left no record"
OTHERWISE_MADE = "the run has made it with other settings before: restore them, or begin a new run"


@dataclass(frozen=True)
class StepRecord:
    """A record as this module reads it: what the step reports, and the pointer to what it passed on."""

    name: str
    metadata: dict[str, Any]
    pointer: dict[str, Any]

    @property
    def stage(self) -> str:
        return str(self.metadata["stage"])

    @property
    def arm(self) -> str:
        return str(self.metadata["arm"])


Steps = dict[str, StepRecord]  # by the step's name, in the order of the report


def steps_of(records: Mapping[str, Any]) -> Steps:
    """Records by arm, iteration and stage: the arms run at the same time, so that no other order is always the same."""
    steps = [StepRecord(name, record["metadata"], record["pointer"]) for name, record in records.items()]
    steps.sort(key=lambda it: (it.arm == "control", it.metadata["iteration"], STAGES.index(it.stage), it.name))
    return {step.name: step for step in steps}


def build(
    records: Mapping[str, Any],
    config: dict[str, Any],
    *,
    run_id: str = "",
    mlflow_run_id: str = "",
    experiment_id: str = "",
    mlflow_url: str = "",
    control_failed: str = "",  # why the control arm did not finish
    exports_failed: Mapping[str, str] | None = None,  # step -> why an export was not made
) -> Result:
    """Everything that the report shows, from the committed records of the steps and the effective config.

    The record of an evaluation may carry its `items` in its metadata: paired comparisons and examples are made of them.
    """
    steps = steps_of(records)
    imported = steps["import-model"].metadata
    params = imported["params"]
    rows = _rows(steps, params)
    final = _final(steps, params)
    scored = [row for row in rows if row.arm == "loop" and row.digest == final.digest]
    final_row = scored[-1] if scored else None
    failed = _control_failed(steps, control_failed)
    outcomes = {"dense": _outcomes(steps, "evaluate-0", final_row)}
    outcomes["control"] = _outcomes(steps, "control-evaluate", final_row)
    return Result(
        run_id=run_id,
        mlflow_run_id=mlflow_run_id,
        seed=config["seed"],
        versions=dict(sorted(imported["versions"].items())),
        rows=rows,
        final=final,
        name=config["name"],
        model=Source(**imported),
        original_params=params,
        host=imported["host"],
        started=imported["started"],
        wall_seconds=_wall_seconds(steps),
        confidence=Evaluate.confidence,
        mlflow=Tracking(url=mlflow_url, experiment_id=experiment_id),
        steps=[_step_row(step) for step in steps.values()],
        not_needed=_not_needed(steps, config["schedule"]["iterations"]),
        control_failed=failed,
        not_finished=_not_finished(steps, failed),
        speed=next((step.metadata["speed"] for step in _evaluations(steps) if step.metadata["speed"]), {}),
        goal=_goal(imported.get("goal"), final_row),
        exports=[_export(Export(**export), steps, exports_failed or {}) for export in config.get("export", [])],
        decontaminated=_decontaminated(steps),
        sequences=_sequences(steps),
        curves={name: step.metadata["curve"] for name, step in steps.items() if step.metadata.get("curve")},
        paired=_paired(outcomes, [score.task for score in rows[0].scores.tasks], config["gate"]),
        examples=_examples(steps, final_row, outcomes["dense"]),
        settings=config,
    )


def _evaluations(steps: Steps, *arms: str) -> list[StepRecord]:
    """The evaluate steps of these arms (the loop)."""
    return [step for step in steps.values() if step.stage == "evaluate" and step.arm in (arms or ("loop",))]


def _rows(steps: Steps, original: int) -> list[Row]:
    """A row for each evaluation; `original` is the number of parameters of the dense model."""
    removed = _removed_layers(steps)
    rows = []
    for step in _evaluations(steps, "loop", "control"):
        scores, verdict = step.metadata["scores"], step.metadata["verdict"]
        first = scores["tasks"][0]
        # The dense model was neither pruned nor recovered.
        recover = steps.get(step.name.replace("evaluate", "recover"))
        row = Row(
            arm=step.arm,
            iteration=step.metadata["iteration"],
            params=scores["params"],
            **{key: first[key] for key in ("accuracy", "low", "high", "items", "task")},
            recovery_tokens=recover.metadata["tokens"] if recover else 0,
            verdict=verdict["decision"],
            uri=step.metadata["checkpoint"]["uri"],
            digest=step.metadata["checkpoint"]["digest"],
            share_removed=_share_removed(scores["params"], original),
            step=step.name,
            reason=verdict["reason"],
            numbers=verdict.get("numbers", {}),
            removed_layers=removed.get(step.name.replace("evaluate", "prune"), []),
            scores=scores,
        )
        rows.append(row)
    return rows


def _removed_layers(steps: Steps) -> dict[str, list[int]]:
    """What each prune step removed, in the dense model's numbers: a step counts the layers that its input had."""
    num_layers = len(steps["evaluate-0"].metadata["scores"]["widths"])
    remaining = {steps["import-model"].pointer["digest"]: list(range(num_layers))}  # by the checkpoint's digest
    removed: dict[str, list[int]] = {}
    for name, step in steps.items():
        layers = remaining.get(step.pointer["parent_digest"])
        if layers is None or step.stage not in ("prune", "recover"):
            continue
        # A recover step has none, but the next iteration begins from its checkpoint.
        removed[name] = [layers[index] for index in sorted(step.metadata.get("removed_layers", ()))]
        remaining[step.pointer["digest"]] = [layer for layer in layers if layer not in removed[name]]
    return removed


def _final(steps: Steps, original: int) -> Final:
    """What the last evaluation of the loop passed on."""
    pointer = _evaluations(steps)[-1].metadata["accepted"]
    return Final(**pointer, share_removed=_share_removed(pointer["params"], original))


def _share_removed(params: int, original: int) -> float:
    return round(1 - params / original, 6)


def _step_row(step: StepRecord) -> StepRow:
    return StepRow(**{**step.metadata.get("verdict", {}), **step.metadata, **step.pointer, "step": step.name})


def _wall_seconds(steps: Steps) -> float:
    """From the first start to the last end; a record has the times of the attempt that committed it."""
    starts = [step.metadata["started"] for step in steps.values()]
    ends = [step.metadata["started"] + step.metadata["whole_seconds"] for step in steps.values()]
    return round(max(ends) - min(starts), 1)


def _control_failed(steps: Steps, reason: str) -> str:
    """Why the control has no score, on one line; empty where its evaluation was committed, whatever failed later."""
    if "control-evaluate" in steps:
        return ""
    return _shortened(" ".join(reason.split())).rstrip(".")


def _not_finished(steps: Steps, control_failed: str) -> list[Missing]:
    """Steps of a failed control without a record."""
    names = [f"control-{stage}" for stage in LOOP if control_failed and f"control-{stage}" not in steps]
    return [Missing(step=name, iteration=1, reason=control_failed) for name in names]


def _not_needed(steps: Steps, num_iterations: int) -> list[Missing]:
    """Steps of the plan that passed their input through, with the reason from the gate's state at the loop's end."""
    states = [step.metadata["accepted"]["gate"] for step in _evaluations(steps)]
    reason = next((state["reason"] for state in states if state.get("stopped")), "its record was not found")
    planned = [(f"{stage}-{iteration}", iteration) for iteration in range(1, num_iterations + 1) for stage in LOOP]
    return [Missing(step=name, iteration=iteration, reason=reason) for name, iteration in planned if name not in steps]


def _goal(goal: dict[str, Any] | None, final: Row | None) -> Goal | None:
    """The goal in the import's record with what the final checkpoint needs, by its own shapes."""
    if not goal:
        return None
    asked = Goal(**goal)
    if final is None:
        return asked
    # Keys and values of a layer are as many as before: heads are not pruned.
    cached_numbers = asked.sequences * asked.tokens * asked.cached_numbers_per_layer * len(final.scores.widths)
    return asked.model_copy(update={"final": (final.params + cached_numbers) * asked.itemsize})


def _export(export: Export, steps: Steps, failed: Mapping[str, str]) -> ExportRow:
    """An export of the config with what its step reports, or why there is none."""
    name = export_step(export)
    row = ExportRow(name=export.name, format=export.format, type=export.type, limit=export.limit, step=name)
    step = steps.get(name)
    if step is None:
        return row.model_copy(update={"failed": failed.get(name) or NOT_MADE})
    if step.metadata["export"] != {**export.model_dump(), "name": export.name}:
        return row.model_copy(update={"failed": failed.get(name) or OTHERWISE_MADE})
    return ExportRow(**{**step.metadata, **step.pointer, **row.model_dump(exclude_unset=True)})


def _decontaminated(steps: Steps) -> Decontaminated | None:
    """The loop's counts; None where nothing was to be compared."""
    in_loop = [step.metadata for step in steps.values() if step.arm == "loop" and "rows_compared" in step.metadata]
    if not in_loop:
        return None
    # Each iteration reads the data from its start: the longest has read all that others have.
    longest = max(in_loop, key=lambda counts: int(counts["rows_compared"]))
    return Decontaminated(
        rows=longest["rows_compared"],
        dropped=longest["rows_dropped"],
        items=longest["benchmark_items"],
        short=longest["benchmark_items_short"],
        not_compared=longest["not_compared"],
    )


def _sequences(steps: Steps) -> Sequences:
    in_loop = [step.metadata for step in steps.values() if step.arm == "loop" and "cut_sequences" in step.metadata]
    totals = {name: sum(counts[name] for counts in in_loop) for name in ("sequences", "cut_sequences")}
    return Sequences(**totals, passes=max((counts["passes"] for counts in in_loop), default=None))


Outcomes = dict[str, tuple[list[int], list[int]]]  # task -> 0/1 of each item in two evaluations


def _items(steps: Steps, name: str) -> list[Item]:
    """The items of an evaluation; none where it has no record, or its record no items."""
    return steps[name].metadata.get("items", []) if name in steps else []


def _outcomes(steps: Steps, reference: str, final: Row | None) -> Outcomes:
    """The items that a reference and the final checkpoint's evaluation have; none of a task that asked otherwise."""
    # Where no iteration passed, the dense model is the final one.
    if final is None or final.step == reference:
        return {}
    before, after = _items(steps, reference), _items(steps, final.step)
    scored = {item["task"] for item in after}
    outcomes = {}
    for task in dict.fromkeys(item["task"] for item in before if item["task"] in scored):
        try:
            outcomes[task] = match(before, after, task)
        except InputError as error:
            say("report", f"warning: {task} is not compared: {error.problem}")
    return outcomes


def _paired(by_reference: dict[str, Outcomes], tasks: list[str], gate: dict[str, Any]) -> dict[str, dict[str, Paired]]:
    """The final checkpoint against the dense one and the control, item by item.

    The first task is tested as the gate tests it. The others share the significance level as in `ptl compare`.
    """
    shared = gate["alpha"] / max(1, *(len(outcomes) for outcomes in by_reference.values()))
    comparisons: dict[str, dict[str, Paired]] = {task: {} for task in tasks}
    for reference, outcomes in by_reference.items():
        for task, pair in outcomes.items():
            alpha = gate["alpha"] if task == tasks[0] else shared
            comparisons[task][reference] = paired(*pair, gate["margin"], alpha)
    return comparisons


def _examples(steps: Steps, final: Row | None, outcomes: Outcomes) -> Examples | None:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    if final is None or not outcomes:
        return None
    answers = {(item["task"], item["id"]): item for item in _items(steps, final.step)}
    dense = [item for item in _items(steps, "evaluate-0") if item["task"] in outcomes]
    compared = [(old, answers[old["task"], old["id"]]) for old in dense]
    regressions = [_change(old, new) for old, new in compared if old["correct"] > new["correct"]]
    improvements = [_change(old, new) for old, new in compared if old["correct"] < new["correct"]]
    return Examples(
        step=final.step,
        compared=len(compared),
        num_regressions=len(regressions),
        num_improvements=len(improvements),
        regressions=_mixed(regressions)[:MAX_CHANGED],
        improvements=_mixed(improvements)[:MAX_CHANGED],
    )


def _change(old: Item, new: Item) -> Change:
    texts = (old["prompt"], old["target"], old["answer"], new["answer"])
    prompt, target, before, after = map(_shortened, texts)
    return Change(
        task=old["task"],
        id=old["id"],
        prompt=prompt,
        target=target,
        before=before,
        after=after,
        before_truncated=old["truncated"],
        after_truncated=new["truncated"],
    )


def _mixed(changes: list[Change]) -> list[Change]:
    """The first of each task, then the second of each, so that a handful has something of every task."""
    by_task: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        by_task[change.task].append(change)
    return [change for change in chain(*zip_longest(*by_task.values())) if change]


def _shortened(value: Any) -> str:
    """A text, or the number of a choice, with at most `MAX_TEXT` characters."""
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} […]"
