"""The measured speed of the dense and the final model, as rows, sentences and metrics, for the report and MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class SpeedRow:
    """One measure of both models; `times` is how many times as fast the final one is, above 1 where it is faster."""

    kind: str  # prefill, decode or solved
    label: str  # for a reader, without the unit
    dense: float  # in `unit`
    final: float  # in `unit`
    unit: str  # tokens/s, s or ms
    times: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Label with unit, dense, final and speed-up, formatted."""
        return (
            f"{self.label} ({self.unit})",
            _three_digits(self.dense),
            _three_digits(self.final),
            f"{self.times:.2f} x",
        )


def rows(speed: dict[str, Any]) -> list[SpeedRow]:
    """From the metadata of speed.side_by_side; none where nothing was measured."""
    if "models" not in speed:
        return []
    dense = speed["models"]["dense"]
    final = speed["models"]["final"]
    measures = []
    for phase in PHASES:
        field = f"{phase}_tokens_per_s"
        for old, new in zip(dense["speed"], final["speed"], strict=True):
            label = f"{phase.capitalize()}, batch {old['batch']}"
            times = new[field] / old[field]
            measures.append(SpeedRow(phase, label, old[field], new[field], "tokens/s", times))
    before = dense["seconds_per_solved"]
    after = final["seconds_per_solved"]
    if before and after:
        scale, unit = (1, "s") if max(before, after) >= 1 else (1000, "ms")
        times = before / after
        measures.append(SpeedRow("solved", "Solved problem", before * scale, after * scale, unit, times))
    return measures


def sentence(speed: dict[str, Any]) -> str:
    """The speed in a sentence; empty where nothing was asked or measured."""
    measures = rows(speed)
    if not measures:
        reason = speed.get("reason")
        return f"Speed was not measured: {reason}." if reason else ""
    batches = ", ".join(str(row["batch"]) for row in speed["models"]["dense"]["speed"])
    parts = []
    for phase in PHASES:
        times = [row.times for row in measures if row.kind == phase]
        if times:
            parts.append(f"{phase} {_range(times)} times as fast (batch {batches})")
    for row in measures:
        if row.kind == "solved":
            before, after = _three_digits(row.dense), _three_digits(row.final)
            parts.append(f"{after} instead of {before} {row.unit} per solved problem")
    return f"Speed of the final model beside the dense one: {', '.join(parts)}. {disturbance(speed)}".rstrip()


def _range(times: list[float]) -> str:
    low, high = f"{min(times):.2f}", f"{max(times):.2f}"
    return low if low == high else f"{low} to {high}"


def disturbance(speed: dict[str, Any]) -> str:
    """A warning where other steps (`beside`) were computing on the same node meanwhile; else empty."""
    others = sorted(speed.get("beside") or ())
    if not others or not rows(speed):
        return ""
    names = " and ".join(others)
    were = "was" if len(others) == 1 else "were"
    return f"While speed was measured, {names} {were} computing on the same node: read the ratio with care."


def setting(speed: dict[str, Any]) -> str:
    """How it was measured."""
    if not rows(speed):
        return ""
    tokens = f"prompts of {speed['prompt_tokens']} tokens, {speed['new_tokens']} new tokens"
    turns = f"taking turns, median of {speed['repeats']}"
    sentences = f"Both models in one process on {speed['device']}, {turns}: {tokens}."
    if not speed["items"]:
        return sentences
    dense = speed["models"]["dense"]
    final = speed["models"]["final"]
    items = f"{speed['items']} items of {speed['task']} in batches of up to {speed['batch_size']}"
    solved = f"the {dense['solved']} (dense) and {final['solved']} (final) that it solved"
    lengths = f"{dense['answer_tokens']:.1f} and {final['answer_tokens']:.1f} tokens on average"
    return f"{sentences} Solved problem: {items}, seconds in the model divided by {solved}; its answers have {lengths}."


def metrics(models: dict[str, Any]) -> dict[str, float]:
    """MLflow's metrics of the `models` of speed.side_by_side."""
    numbers = {}
    for name, metadata in models.items():
        for row in metadata["speed"]:
            for phase in PHASES:
                metric = f"speed/{name}/{phase}_tokens_per_s/batch_{row['batch']}"
                numbers[metric] = row[f"{phase}_tokens_per_s"]
        if metadata["seconds_per_solved"] is not None:
            numbers[f"speed/{name}/seconds_per_solved"] = metadata["seconds_per_solved"]
    return numbers


def _three_digits(value: float) -> str:
    """Three significant digits below 1,000, whole numbers above."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"
