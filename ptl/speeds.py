"""The measured speed of the dense and the final model, as rows for the report's table, picture and sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpeedRow:
    """One measure of both models; `times` is how many times as fast the final one is, above 1 where it is faster."""

    kind: str  # prefill, decode or solved
    label: str
    dense: float
    final: float
    unit: str  # tokens/s, s or ms
    times: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Label with unit, dense, final and speed-up, formatted."""
        return f"{self.label} ({self.unit})", number(self.dense), number(self.final), f"{self.times:.2f} x"


def rows(speed: dict[str, Any]) -> list[SpeedRow]:
    """From the metadata of evaluate.side_by_side; none where nothing was measured."""
    if "models" not in speed:
        return []
    dense, final = speed["models"]["dense"], speed["models"]["final"]
    found = []
    for kind in ("prefill", "decode"):
        field = f"{kind}_tokens_per_s"
        for old, new in zip(dense["speed"], final["speed"], strict=True):
            label = f"{kind.capitalize()}, batch {old['batch']}"
            found.append(SpeedRow(kind, label, old[field], new[field], "tokens/s", new[field] / old[field]))
    old, new = dense["seconds_per_solved"], final["seconds_per_solved"]
    if old and new:
        scale, unit = (1000, "ms") if max(old, new) < 1 else (1, "s")
        found.append(SpeedRow("solved", "Solved problem", old * scale, new * scale, unit, old / new))
    return found


def words(speed: dict[str, Any]) -> str:
    """The speed in a sentence; empty where nothing was asked or measured."""
    found = rows(speed)
    if not found:
        return f"Speed was not measured: {speed['reason']}." if speed.get("reason") else ""
    batches = ", ".join(str(row["batch"]) for row in speed["models"]["dense"]["speed"])
    parts = []
    for kind in ("prefill", "decode"):
        times = [row.times for row in found if row.kind == kind]
        if times:
            low, high = f"{min(times):.2f}", f"{max(times):.2f}"
            parts.append(f"{kind} {low if low == high else f'{low} to {high}'} times as fast (batch {batches})")
    solved = [row for row in found if row.kind == "solved"]
    parts += [f"{number(row.final)} instead of {number(row.dense)} {row.unit} per solved problem" for row in solved]
    return f"Speed of the final model beside the dense one: {', '.join(parts)}. {disturbed(speed)}".rstrip()


def disturbed(speed: dict[str, Any]) -> str:
    """A warning where other steps (`beside`) were computing on the same node meanwhile; else empty."""
    others = sorted(speed.get("beside") or ())
    if not others or not rows(speed):
        return ""
    were = "was" if len(others) == 1 else "were"
    return (
        f"While speed was measured, {' and '.join(others)} {were} computing on the same node: read the ratio with care."
    )


def setting(speed: dict[str, Any]) -> str:
    """How it was measured."""
    if not rows(speed):
        return ""
    said = (
        f"Both models in one process on {speed['device']}, taking turns, median of {speed['repeats']}: prompts of "
        f"{speed['prompt_tokens']} tokens, {speed['new_tokens']} new tokens."
    )
    if speed["items"]:
        dense, final = (speed["models"][name] for name in ("dense", "final"))
        said += (
            f" Solved problem: {speed['items']} items of {speed['task']} in batches of up to "
            f"{speed['batch_size']}, seconds in the model divided by the {dense['solved']} (dense) and "
            f"{final['solved']} (final) that it solved; its answers have {dense['answer_tokens']:.1f} and "
            f"{final['answer_tokens']:.1f} tokens on average."
        )
    return said


def number(value: float) -> str:
    """Three digits below 1,000, whole numbers above."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"
