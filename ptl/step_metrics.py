"""Settings and records of a step as MLflow, Kubeflow and the log show them."""

from __future__ import annotations

from typing import Any

from ptl.call import Metadata

NOT_METRICS = ("iteration", "started")  # numbers of a record that are no results
COSTS = ("params", "bytes", "flops_per_token", "kv_bytes_per_token")  # of an evaluation's scores
ACCURACY = ("accuracy", "low", "high", "items")  # of a task's score


def flat_settings(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as MLflow shows parameters; what is unset is left out."""
    if isinstance(settings, dict):
        entries: Any = settings.items()
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        entries = enumerate(settings)
    elif settings is None:
        return {}
    else:
        return {name: settings}
    dotted: dict[str, Any] = {}
    for key, value in entries:
        dotted |= flat_settings(value, f"{name}.{key}" if name else str(key))
    return dotted


def metrics(metadata: Metadata) -> dict[str, float]:
    """The numbers of a step's metadata that MLflow shows."""
    numbers = {name: value for name, value in metadata.items() if isinstance(value, int | float)}
    for name in NOT_METRICS:
        numbers.pop(name, None)
    if "scores" in metadata:
        scores = metadata["scores"]
        numbers |= {name: scores[name] for name in COSTS}
        for task in scores["tasks"]:
            numbers |= {f"{task['task']}/{name}": value for name, value in accuracy(task).items()}
        numbers["accuracy"] = scores["tasks"][0]["accuracy"]
    return {name: float(value) for name, value in numbers.items()}


def accuracy(task: Metadata) -> dict[str, float]:
    """A task's score with its interval and number of items, which metrics other than an accuracy do not have."""
    return {name: task[name] for name in ACCURACY if task[name] is not None}


def kubeflow_metrics(metadata: Metadata) -> Metadata:
    """What Kubeflow's table of a run's metrics has of an evaluation."""
    scores = metadata["scores"]
    decision = metadata["verdict"]["decision"]
    return {**accuracy(scores["tasks"][0]), "params": scores["params"], "verdict": decision}


def summary(metadata: Metadata) -> str:
    """What a step has done, for its last line in the log."""
    if metadata["stage"] == "evaluate":
        first = metadata["scores"]["tasks"][0]
        decision = metadata["verdict"]["decision"]
        return f"{first['metric']} {first['accuracy']:.3f} on {first['items']} items, {decision}"
    if metadata["stage"] == "recover":
        return f"{metadata['tokens']:,} tokens in {metadata['steps']} steps"
    return f"{metadata['params']:,} parameters"
