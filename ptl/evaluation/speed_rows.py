"""The measured speed of the dense and the final model, as rows and metrics, for the report and MLflow."""

from __future__ import annotations

from typing import Any

Metadata = dict[str, Any]  # of speed.side_by_side; {"reason": ...} where nothing was measured
PHASES = ("prefill", "decode")
# Filled in from that metadata, and its models by name.
SETTING = (
    "Both models in one process on {device}, taking turns, median of {repeats}: prompts of {prompt_tokens} tokens, "
    "{new_tokens} new tokens."
)
SOLVING = (
    " Solved problem: {items} items of {task} in batches of up to {batch_size}, seconds in the model divided by the "
    "{dense[solved]} (dense) and {final[solved]} (final) that it solved; its answers have {dense[answer_tokens]:.1f} "
    "and {final[answer_tokens]:.1f} tokens on average."
)


Row = tuple[str, str, str, str]  # label with its unit, dense, final, how many times as fast the final model is


def rows(speed: Metadata) -> list[Row]:
    """One for each measure, formatted; none where nothing was measured."""
    if "models" not in speed:
        return []
    dense, final = speed["models"]["dense"], speed["models"]["final"]
    measures = []
    for phase in PHASES:
        for old, new in zip(dense["speed"], final["speed"], strict=True):
            before, after = (row[f"{phase}_tokens_per_s"] for row in (old, new))
            label = f"{phase.capitalize()}, batch {old['batch']} (tokens/s)"
            measures.append(_row(label, before, after, after / before))
    # Seconds: less is faster. None where a model solved nothing.
    before, after = dense["seconds_per_solved"], final["seconds_per_solved"]
    if before and after:
        scale, unit = (1, "s") if max(before, after) >= 1 else (1000, "ms")
        measures.append(_row(f"Solved problem ({unit})", before * scale, after * scale, before / after))
    return measures


def _row(label: str, dense: float, final: float, times: float) -> Row:
    return label, _digits(dense), _digits(final), f"{times:.2f} times as fast"


def _digits(value: float) -> str:
    """Three significant digits below 1,000, whole numbers above."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:,.0f}"


def disturbance(speed: Metadata) -> str:
    """A warning where other steps (`beside`) were computing on the same node meanwhile; else empty."""
    others = speed.get("beside")
    if not others:
        return ""
    were = "was" if len(others) == 1 else "were"
    return (
        f"While speed was measured, {' and '.join(others)} {were} computing on the same node: read the ratio with care."
    )


def setting(speed: Metadata) -> str:
    """How it was measured."""
    if not rows(speed):
        return ""
    template = SETTING + SOLVING if speed["items"] else SETTING
    return template.format(**speed, **speed["models"])


def metrics(models: dict[str, Any]) -> dict[str, float]:
    """MLflow's metrics of the `models` of speed.side_by_side."""
    numbers = {}
    for name, model in models.items():
        for row in model["speed"]:
            for field in (f"{phase}_tokens_per_s" for phase in PHASES):
                numbers[f"speed/{name}/{field}/batch_{row['batch']}"] = row[field]
        # None where nothing was solved: MLflow takes numbers only.
        if model["seconds_per_solved"] is not None:
            numbers[f"speed/{name}/seconds_per_solved"] = model["seconds_per_solved"]
    return numbers
