"""The committed records of a run's steps -> its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ptl.config.dag import export_step
from ptl.config.export import Export
from ptl.config.run import Evaluate
from ptl.data import decontamination
from ptl.errors import InputError
from ptl.evaluation import retention
from ptl.evaluation.paired import (
    Item,
    Outcomes,
    Paired,
    by_item,
    match,
    p_longer,
    paired,
    pass_at_n,
)
from ptl.log import say
from ptl.model.widths import ComparedWidths
from ptl.report.result import (
    Change,
    Decontaminated,
    Examples,
    ExportRow,
    Final,
    Missing,
    Result,
    Row,
    Sequences,
    Source,
    StepRow,
    Tracking,
)
from ptl.storage.store import Record

LOOP = ("prune", "recover", "evaluate")
MAX_CHANGED = 250  # regressions, and improvements, that a page shows: a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer
NOT_MADE = "the run has no record of it with these settings"

Records = Mapping[str, Record]  # by the step's name, in the order of the DAG
Metadata = dict[str, Any]  # of a record


def build(
    steps: Records,
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
    imported = steps["import-model"].metadata
    # Of a control that was evaluated the score is in its record, whatever failed later.
    if "control-evaluate" in steps:
        control_failed = ""
    one_line = " ".join(control_failed.split())
    failed = _shortened(one_line).rstrip(".")
    control_steps = {f"control-{stage}": 1 for stage in LOOP}
    step_rows = []
    for name, step in steps.items():
        fields = step.metadata | asdict(step.pointer) | {"step": name}
        step_rows.append(StepRow(**fields))
    measured = [metadata["speed"] for metadata in _evaluations(steps).values() if metadata["speed"]]
    exports = [Export(**export) for export in config.get("export", [])]
    result = Result(
        run_id=run_id,
        mlflow_run_id=mlflow_run_id,
        seed=config["seed"],
        versions=dict(sorted(imported["versions"].items())),
        rows=_rows(steps),
        final=_final(steps),
        name=config["name"],
        model=Source(**imported),
        original_params=imported["params"],
        host=imported["host"],
        started=imported["started"],
        wall_seconds=_wall_seconds(steps),
        confidence=Evaluate.confidence,
        mlflow=Tracking(url=mlflow_url, experiment_id=experiment_id),
        steps=step_rows,
        not_needed=_not_needed(steps, config),
        control_failed=failed,
        not_finished=_missing(steps, control_steps, failed) if failed else [],
        speed=measured[0] if measured else {},
        exports=[_export(export, steps, exports_failed or {}) for export in exports],
        decontaminated=_decontaminated(steps),
        sequences=_sequences(steps),
        paired={},
        pass_at_n={},
        longer={},
        retained=None,
        examples=None,
        settings=config,
    )
    return _compared(result, steps)


def _evaluations(steps: Records, arm: str = "loop") -> dict[str, Metadata]:
    """The metadata of an arm's evaluate steps."""
    of_arm = {}
    for name, step in steps.items():
        metadata = step.metadata
        if (metadata["stage"], metadata["arm"]) == ("evaluate", arm):
            of_arm[name] = metadata
    return of_arm


def _rows(steps: Records) -> list[Row]:
    """A row for each evaluation."""
    rows = []
    for arm in ("loop", "control"):
        # A prune step counts the layers that its input had; a row has the dense model's numbers.
        layers = list(range(len(steps["evaluate-0"].metadata["scores"]["widths"])))
        for name, evaluation in _evaluations(steps, arm).items():
            # The dense model was neither pruned nor recovered.
            prune = steps.get(name.replace("evaluate", "prune"))
            pruned = prune.metadata if prune else {}
            removed = sorted(layers[index] for index in pruned.get("removed_layers", ()))
            compared = [ComparedWidths(**candidate) for candidate in pruned.get("candidates", ())]
            rows.append(_row(steps, name, removed, compared))
            # After a rejection the next iteration begins from what this one began from.
            if evaluation["accepted"]["digest"] == evaluation["checkpoint"]["digest"]:
                layers = [layer for layer in layers if layer not in removed]
    return rows


def _row(
    steps: Records, name: str, removed_layers: list[int], compared: list[ComparedWidths]
) -> Row:
    evaluation = steps[name].metadata
    scores, verdict = evaluation["scores"], evaluation["verdict"]
    first = scores["tasks"][0]
    recover = steps.get(name.replace("evaluate", "recover"))
    return Row(
        arm=evaluation["arm"],
        iteration=evaluation["iteration"],
        params=scores["params"],
        accuracy=first["accuracy"],
        low=first["low"],
        high=first["high"],
        items=first["items"],
        task=first["task"],
        recovery_tokens=recover.metadata["tokens"] if recover else 0,
        verdict=verdict["decision"],
        uri=evaluation["checkpoint"]["uri"],
        digest=evaluation["checkpoint"]["digest"],
        share_removed=_share_removed(steps, scores["params"]),
        step=name,
        reason=verdict["reason"],
        numbers=verdict.get("numbers", {}),
        removed_layers=removed_layers,
        compared=compared,
        scores=scores,
    )


def _final(steps: Records) -> Final:
    """What the last evaluation of the loop passed on."""
    pointer = list(_evaluations(steps).values())[-1]["accepted"]
    return Final(**pointer, share_removed=_share_removed(steps, pointer["params"]))


def _share_removed(steps: Records, params: int) -> float:
    return round(1 - params / steps["import-model"].metadata["params"], 6)


def _wall_seconds(steps: Records) -> float:
    """From the first start to the last end; a record has the times of the attempt that committed it."""
    all_metadata = [step.metadata for step in steps.values()]
    last_end = max(metadata["started"] + metadata["whole_seconds"] for metadata in all_metadata)
    return round(last_end - min(metadata["started"] for metadata in all_metadata), 1)


def _missing(steps: Records, iterations: dict[str, int], reason: str) -> list[Missing]:
    """Those of the steps (name -> iteration) that have no record."""
    missing = {name: iteration for name, iteration in iterations.items() if name not in steps}
    return [
        Missing(step=name, iteration=iteration, reason=reason)
        for name, iteration in missing.items()
    ]


def _not_needed(steps: Records, config: Metadata) -> list[Missing]:
    """Steps of the plan that passed their input through, with the reason from the gate's state at the loop's end."""
    reason = "its record was not found"
    for evaluation in _evaluations(steps).values():
        state = evaluation["accepted"]["gate"]
        if state.get("stopped"):
            reason = state["reason"]
            break
    planned: dict[str, int] = {}
    for number in range(1, config["schedule"]["iterations"] + 1):
        planned |= {f"{stage}-{number}": number for stage in LOOP}
    return _missing(steps, planned, reason)


def _export(export: Export, steps: Records, failed: Mapping[str, str]) -> ExportRow:
    """An export of the config with what its step reports, or why there is none."""
    step = export_step(export)
    asked = {**export.model_dump(), "name": export.name}
    record = steps.get(step)
    # The run may have made it with other settings before.
    if record is None or record.metadata["export"] != asked:
        return ExportRow(**asked, step=step, failed=failed.get(step) or NOT_MADE)
    return ExportRow(**{**record.metadata, **asdict(record.pointer), **asked, "step": step})


def _of_loop(steps: Records, field: str) -> list[Metadata]:
    """The metadata of the loop's steps that report this field."""
    all_metadata = [step.metadata for step in steps.values()]
    return [
        metadata for metadata in all_metadata if metadata["arm"] == "loop" and field in metadata
    ]


def _decontaminated(steps: Records) -> Decontaminated | None:
    """The loop's counts; None where nothing was to be compared."""
    counts = _of_loop(steps, "rows_compared")
    # Each iteration reads the data from its start: the longest has read all that others have.
    return Decontaminated(**decontamination.most(counts)) if counts else None


def _sequences(steps: Records) -> Sequences:
    counts = _of_loop(steps, "cut_sequences")
    return Sequences(
        sequences=sum(step["sequences"] for step in counts),
        cut_sequences=sum(step["cut_sequences"] for step in counts),
        passes=max((step["passes"] for step in counts), default=None),
    )


def _compared(result: Result, steps: Records) -> Result:
    """The result with what follows from the final checkpoint's evaluation: paired comparisons and examples."""
    final = result.final_row
    if final is None:
        return result
    dense = _outcomes(steps, "evaluate-0", final.step)
    control = _outcomes(steps, "control-evaluate", final.step)
    pairs = _paired({"dense": dense, "control": control}, result.tasks, result.settings["gate"])
    examples = _examples(steps, final.step, dense) if dense else None
    before, after = _items(steps, "evaluate-0"), _items(steps, final.step)
    longer = {task: p_longer(before, after, task) for task in dense}
    longer = {task: p for task, p in longer.items() if p is not None}
    retained = retention.compare(
        result.dense_row.scores.retention, final.scores.retention, 1 - Evaluate.confidence
    )
    passed = pass_at_n(dense, {task: pairs[task]["dense"] for task in dense})
    comparisons = {
        "paired": pairs,
        "pass_at_n": passed,
        "longer": longer,
        "retained": retained,
        "examples": examples,
    }
    return result.model_copy(update=comparisons)


def _items(steps: Records, name: str) -> list[Item]:
    """The items of an evaluation; none where it has no record, or its record no items."""
    return steps[name].metadata.get("items", []) if name in steps else []


def _outcomes(steps: Records, reference: str, final: str) -> dict[str, Outcomes]:
    """The items that a reference and the final checkpoint's evaluation have; none of a task that asked otherwise."""
    # Where no iteration passed, the dense model is the final one.
    if final == reference:
        return {}
    before, after = _items(steps, reference), _items(steps, final)
    scored = {item["task"] for item in after}
    outcomes = {}
    for task in dict.fromkeys(item["task"] for item in before if item["task"] in scored):
        try:
            outcomes[task] = match(before, after, task)
        except InputError as error:
            say("report", f"warning: {task} is not compared: {error.problem}")
    return outcomes


def _paired(
    by_reference: dict[str, dict[str, Outcomes]], tasks: list[str], gate: dict[str, Any]
) -> dict[str, dict[str, Paired]]:
    """The final checkpoint against the dense one and the control, item by item.

    The first task is tested as the gate tests it. The others share the significance level as in `ptl compare`.
    """
    most = max(len(outcomes) for outcomes in by_reference.values())
    comparisons: dict[str, dict[str, Paired]] = {task: {} for task in tasks}
    for reference, outcomes in by_reference.items():
        for task, of_task in outcomes.items():
            alpha = gate["alpha"] if task == tasks[0] else gate["alpha"] / most
            comparisons[task][reference] = paired(of_task, gate["margin"], alpha)
    return comparisons


def _examples(steps: Records, final: str, outcomes: dict[str, Outcomes]) -> Examples:
    """Items whose outcome changed from the dense model to the final one."""
    answers = by_item(_items(steps, final))
    compared = {
        key: old for key, old in by_item(_items(steps, "evaluate-0")).items() if key[0] in outcomes
    }
    regressions: list[Change] = []
    improvements: list[Change] = []
    for key, old in compared.items():
        new = answers[key]
        change = sum(answer["correct"] for answer in new) - sum(answer["correct"] for answer in old)
        if change:
            # Of several samples a right one beside a wrong one
            change_of = _change(_first(old, right=change < 0), _first(new, right=change > 0))
            (regressions if change < 0 else improvements).append(change_of)
    return Examples(
        step=final,
        compared=len(compared),
        num_regressions=len(regressions),
        num_improvements=len(improvements),
        regressions=regressions[:MAX_CHANGED],
        improvements=improvements[:MAX_CHANGED],
    )


def _first(answers: Sequence[Item], *, right: bool) -> Item:
    return next(answer for answer in answers if bool(answer["correct"]) == right)


def _change(old: Item, new: Item) -> Change:
    return Change(
        task=old["task"],
        id=old["id"],
        prompt=_shortened(old["prompt"]),
        target=_shortened(old["target"]),
        before=_shortened(old["answer"]),
        after=_shortened(new["answer"]),
        before_truncated=old["truncated"],
        after_truncated=new["truncated"],
        before_thought=_both_ends(old["thought"]),
        after_thought=_both_ends(new["thought"]),
    )


def _shortened(value: Any) -> str:
    """A text, or the number of a choice, with at most `MAX_TEXT` characters."""
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} […]"


def _both_ends(thought: str) -> str:
    """A thought without its middle, where it is long: its end says how the model came to its answer."""
    if len(thought) <= 2 * MAX_TEXT:
        return thought
    return f"{thought[:MAX_TEXT]} […] {thought[-MAX_TEXT:]}"
