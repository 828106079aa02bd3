"""The model card's metadata as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ptl.result import Result, final_row


def front_matter(result: Result) -> str:
    """The YAML block at the head of the card."""
    import yaml

    text = yaml.safe_dump(_metadata(result), sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n"


def _metadata(result: Result) -> dict[str, Any]:
    card: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(result["model"]["model"]),
        "tags": ["pruning", "model-compression", "prune-tune-loop", "ptl"],
    }
    if result["model"]["license"]:
        card["license"] = result["model"]["license"]
    sources = result["settings"].get("training", {}).get("sources")
    if sources:
        card["datasets"] = [_hub_name(source["source"]) for source in sources]
    final = final_row(result)
    if final is not None:
        tasks = final["scores"]["tasks"]
        card["metrics"] = list(dict.fromkeys(_metric(task) for task in tasks))
        scores = [_score(task) for task in tasks]
        card["model-index"] = [{"name": result["name"], "results": scores}]
    return card


def _score(task: dict[str, Any]) -> dict[str, Any]:
    """A task's score as an entry of the hub's model index."""
    metric = {
        "type": _metric(task),
        "name": task.get("metric", "accuracy"),
        "value": round(task["accuracy"], 6),
    }
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": _hub_name(task["task"]), "name": task["task"]},
        "metrics": [metric],
    }


def _metric(task: dict[str, Any]) -> str:
    """The metric without its filter (`exact_match,final-number`), which the hub does not know."""
    name: str = task.get("metric", "accuracy")
    return name.partition(",")[0]


def _hub_name(source: str) -> str:
    """A hub id as it is; of a local path the last two parts, in the form the hub's metadata allows."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return source
    name = "-".join(Path(source).parts[-2:])
    allowed = re.sub(r"[^\w.-]+", "-", name)
    return allowed.strip("-.") or "unknown"
