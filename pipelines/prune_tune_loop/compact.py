"""The compiled YAML, made smaller and readable: a task costs a cluster six copies of all that is said about it.

Tasks of one kind share one definition: KFP writes a component and an executor for every task, although the pipeline
spec lets tasks share them, as its own merge of nested pipelines does. Tasks get their steps' names as keys, because a
server lists tasks by key and never by display name. And what the SDK writes twice for old backends is written once.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# libyaml's reads ten times as fast; wheels of PyYAML have it. Its writer would give other bytes.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
OLD_RESOURCES = ("cpuLimit", "cpuRequest", "memoryLimit", "memoryRequest")  # beside resourceCpuLimit and so on
# What KFP puts before a component's function. Ours name their types plainly (`Input[Model]`), so the star serves.
UNUSED = "\nimport kfp\nfrom kfp import dsl\nfrom kfp.dsl import *\nfrom typing import *\n"
USED = "\nfrom kfp.dsl import *\n"
# Of a ConfigMap, Secret or claim the name stands twice: plain, and as a parameter that may come from another task.
NAMED = {"secretAsVolume", "configMapAsVolume", "imagePullSecret", "pvcMount"}


def compact(path: Path) -> None:
    """Rewrite a compiled YAML in place."""
    text = path.read_text()
    # KFP's comment also lists the defaults, in an order that changes from process to process; they are in the spec.
    comments = "".join(line + "\n" for line in text.splitlines() if line.startswith(("# PIPELINE", "# Name", "# Desc")))
    spec, *platform = yaml.load_all(text, Loader)
    executors = spec["deploymentSpec"]["executors"]
    settings = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    for executor in executors.values():
        _write_once(executor["container"])
    for entries in settings.values():
        _name_once(entries)
    kept = _share_executors(executors, settings)
    for component in spec["components"].values():
        component["executorLabel"] = kept[component["executorLabel"]]
    same = _share(spec["components"])
    dag = spec["root"]["dag"]
    for task in dag["tasks"].values():
        task["componentRef"]["name"] = same[task["componentRef"]["name"]]
    _name_by_step(dag)
    path.write_text(comments + yaml.safe_dump_all([spec, *platform], sort_keys=True))


def local_copy(text: str, order: Sequence[str]) -> str:
    """The same pipeline for KFP's local runners: a component for each task, one after another in `order`.

    They name the folder of a task's outputs after its component (executor_input_utils.py): tasks that share one
    overwrite each other's, and whoever reads an earlier output, as the control does, gets the latest. They run tasks
    one by one, and independent ones in an order of their own. They would repeat a step that has used its attempts. And
    a cluster's volumes are not there, whatever the environment says of them.
    """
    spec, *platform = yaml.load_all(text, Loader)
    shared = spec["components"]
    tasks = spec["root"]["dag"]["tasks"]
    spec["components"] = {f"comp-{name}": shared[task["componentRef"]["name"]] for name, task in tasks.items()}
    for name, task in tasks.items():
        task["componentRef"]["name"] = f"comp-{name}"
        task.pop("retryPolicy", None)
        before = order[: order.index(name)]
        task["dependentTasks"] = sorted({*task.get("dependentTasks", []), *before[-1:]})
    for executor in spec["deploymentSpec"]["executors"].values():
        variables = executor["container"].get("env", [])
        executor["container"]["env"] = [each for each in variables if each["name"].startswith("PTL_")]
    return str(yaml.safe_dump_all([spec, *platform], sort_keys=True))


@dataclass(frozen=True)
class Weight:
    """What a compiled pipeline costs a cluster beyond its file."""

    tasks: int
    task_bytes: float  # mean over the tasks


def weigh(path: Path) -> Weight:
    """Bytes in a cluster's Workflow that come from the compiled YAML; Kubeflow's own are not counted.

    The pod of a task, with its component, executor, parameter values and Kubernetes settings, is in six of the seven
    nodes that Argo makes of it, and the task itself in one (seen in a Workflow of Kubeflow 2.17).
    """
    spec, *platform = yaml.load_all(path.read_text(), Loader)
    settings = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    defaults = {name: each.get("defaultValue") for name, each in spec["root"]["inputDefinitions"]["parameters"].items()}
    tasks, total = spec["root"]["dag"]["tasks"].values(), 0
    for task in tasks:
        component = spec["components"][task["componentRef"]["name"]]
        label = component["executorLabel"]
        values = {name: _value(source, defaults) for name, source in task["inputs"].get("parameters", {}).items()}
        copied = (component, spec["deploymentSpec"]["executors"][label], values, settings.get(label, {}))
        total += 6 * sum(len(json.dumps(each, separators=(",", ":"))) for each in copied)
        total += len(json.dumps(task, separators=(",", ":")))
    return Weight(len(tasks), total / len(tasks))


def _value(source: dict[str, Any], defaults: dict[str, Any]) -> Any:
    if "componentInputParameter" in source:
        return defaults[source["componentInputParameter"]]
    return source["runtimeValue"]["constant"]


def _name_by_step(dag: dict[str, Any]) -> None:
    """Give every task its display name as key, wherever it is referred to."""
    step = {key: task["taskInfo"]["name"] for key, task in dag["tasks"].items()}
    for task in dag["tasks"].values():
        if "dependentTasks" in task:
            task["dependentTasks"] = sorted(step[key] for key in task["dependentTasks"])
        for source in task["inputs"].get("artifacts", {}).values():
            output = source["taskOutputArtifact"]
            output["producerTask"] = step[output["producerTask"]]
    dag["tasks"] = {step[key]: task for key, task in dag["tasks"].items()}


def _write_once(container: dict[str, Any]) -> None:
    """Drop the fields of `resources` that have a successor beside them, blanks of a script, and imports for no name."""
    for old in OLD_RESOURCES:
        container.get("resources", {}).pop(old, None)
    for old in ("count", "type"):
        container.get("resources", {}).get("accelerator", {}).pop(old, None)
    container["command"] = [
        part.replace(UNUSED, USED, 1) if part.startswith(UNUSED) else re.sub(r" {2,}", " ", part)
        for part in container["command"]
    ]


def _name_once(settings: dict[str, Any]) -> None:
    """Keep the plain name, which every backend reads (driver/k8s.go), of what is named in two ways."""
    for kind in NAMED & settings.keys():
        for entry in settings[kind]:
            twice = [key for key in entry if key.endswith("NameParameter") and _plain(entry, key)]
            for key in twice:
                del entry[key]


def _plain(entry: dict[str, Any], parameter: str) -> bool:
    value = entry[parameter].get("runtimeValue", {}).get("constant")
    return value in (entry.get(parameter.removesuffix("Parameter")), entry.get("constant"))


def _share_executors(executors: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """An executor is what runs and where it runs: both must be equal."""
    both = {label: [executor, settings.get(label)] for label, executor in executors.items()}
    kept = _share(both)
    for label in set(executors) - set(both):
        del executors[label]
        settings.pop(label, None)
    return kept


def _share(definitions: dict[str, Any]) -> dict[str, str]:
    """Drop repeated definitions; returns, for every name, the name that is kept."""
    first: dict[str, str] = {}
    kept = {}
    for name in sorted(definitions, key=lambda name: (len(name), name)):  # `prune` before `prune-2`
        kept[name] = first.setdefault(json.dumps(definitions[name], sort_keys=True), name)
    for name in [name for name in definitions if kept[name] != name]:
        del definitions[name]
    return kept
