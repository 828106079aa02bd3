"""The model card's metadata as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from pathlib import Path

from ptl.report.cells import metric_name
from ptl.report.result import Result, final_row
from ptl.report.result_rows import Row


def front_matter(result: Result) -> str:
    """The YAML block at the head of the card."""
    import yaml

    text = yaml.safe_dump(_metadata(result), sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n"


def _metadata(result: Result) -> Row:
    # What every card has.
    card: Row = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(result["model"]["model"]),
        "tags": ["pruning", "model-compression", "prune-tune-loop", "ptl"],
    }
    if result["model"]["license"]:
        card["license"] = result["model"]["license"]
    # What the recovery was trained on.
    sources = result["settings"]["training"]["sources"]
    if sources:
        card["datasets"] = [_hub_name(source["source"]) for source in sources]
    # The hub shows scores of what it holds: of the final checkpoint alone.
    final = final_row(result)
    if final is not None:
        tasks = final["scores"]["tasks"]
        card["metrics"] = list(dict.fromkeys(map(metric_name, tasks)))
        card["model-index"] = [{"name": result["name"], "results": [_score(task) for task in tasks]}]
    return card


def _score(task: Row) -> Row:
    """A task's score as an entry of the hub's model index."""
    metric = {
        "type": metric_name(task),  # the hub does not know the filter
        "name": task["metric"],
        "value": round(task["accuracy"], 6),
    }
    name = task["task"]
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": _hub_name(name), "name": name},
        "metrics": [metric],
    }


def _hub_name(source: str) -> str:
    """A hub id as it is; of a local path the last two parts, in the form the hub's metadata allows."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return source
    # The last folder alone is often `checkpoint`.
    name = "-".join(Path(source).parts[-2:])
    allowed = re.sub(r"[^\w.-]+", "-", name)
    return allowed.strip("-.") or "unknown"
