"""Settings and records of a step as MLflow, Kubeflow and the log show them."""

from __future__ import annotations

from ptl.address import mlflow_ui, runs_page
from ptl.lineage.run_status import StepRun
from ptl.steps.call import Metadata
from ptl.units import size

# What of a record is shown as numbers.
NOT_METRICS = ("iteration", "started")  # numbers of a record that are no results
COSTS = ("params", "bytes", "flops_per_token", "kv_bytes_per_token")  # of an evaluation's scores
ACCURACY = ("accuracy", "low", "high", "items")  # of a task's score


def metrics(metadata: Metadata) -> dict[str, float]:
    """The numbers of a step's metadata that MLflow shows."""
    numbers = {
        name: float(value)
        for name, value in metadata.items()
        if isinstance(value, int | float) and name not in NOT_METRICS
    }
    if "scores" not in metadata:
        return numbers
    # Of an evaluation: what the model costs, and each benchmark under its name.
    scores = metadata["scores"]
    for name in COSTS:
        numbers[name] = float(scores[name])
    if scores["experts"]:
        numbers["active_params"] = float(scores["active_params"])
    for task in scores["tasks"]:
        for name, value in accuracy(task).items():
            numbers[f"{task['task']}/{name}"] = float(value)
    # The first benchmark is the run's accuracy.
    numbers["accuracy"] = float(scores["tasks"][0]["accuracy"])
    return numbers


def accuracy(task: Metadata) -> dict[str, float]:
    """A task's score with its interval and number of items, which metrics other than an accuracy do not have."""
    return {name: task[name] for name in ACCURACY if task[name] is not None}


def kubeflow_metrics(metadata: Metadata, run: StepRun) -> Metadata:
    """What Kubeflow's table of a run's metrics has of an evaluation; with the way to its run in MLflow."""
    scores = metadata["scores"]
    ui = mlflow_ui()
    return {
        **accuracy(scores["tasks"][0]),
        "params": scores["params"],
        "verdict": metadata["verdict"]["decision"],
        **({"mlflow": runs_page(ui, run.experiment_id, run.run_id)} if ui else {}),
    }


def summary(metadata: Metadata) -> str:
    """What a step has done, for its last line in the log."""
    if metadata["stage"] == "evaluate":
        first = metadata["scores"]["tasks"][0]
        score = f"{first['metric']} {first['accuracy']:.3f}"
        return f"{score} on {first['items']} items, {metadata['verdict']['decision']}"
    if metadata["stage"] == "recover":
        return f"{metadata['tokens']:,} tokens in {metadata['steps']} steps"
    if metadata["stage"] == "export":
        task = metadata["models"]["final"]["tasks"][0]
        return f"{size(metadata['bytes'])}, {task['metric']} {task['accuracy']:.3f} on {task['items']} items"
    # Of an import or a prune the size is what there is to say.
    return f"{metadata['params']:,} parameters"
