"""Rows of a result for the forms that were made of the final checkpoint for other runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptl.config.dag import export_step
from ptl.config.export import Export
from ptl.report.result_rows import Records, Row

NOT_MADE = "its step has left no record"
OTHERWISE_MADE = "the run has made it with other settings before: restore them, or begin a new run"


def rows(records: Records, forms: Sequence[Row], failed: Mapping[str, str]) -> list[Row]:
    """What result.json has of each form in the config; `failed`: why a step has none, by its name."""
    exports = []
    for settings in forms:
        form = Export(**settings)
        step = export_step(form)
        row: Row = {"name": form.name, "type": form.type, "limit": form.limit, "step": step, "failed": ""}
        metadata = records[step]["metadata"] if step in records else {}
        if metadata and metadata["export"] != {**form.model_dump(), "name": form.name}:
            row["failed"] = failed.get(step) or OTHERWISE_MADE
        elif metadata:
            pointer = records[step]["pointer"]
            row |= {key: metadata[key] for key in ("models", "speed", "notes", "pairs", "scored")}
            row |= {"uri": pointer["uri"], "digest": pointer["digest"]}
        else:
            row["failed"] = failed.get(step) or NOT_MADE
        exports.append(row)
    return exports
