"""Tasks of one kind share one definition in the compiled YAML.

KFP writes a component and an executor for every task, although the pipeline spec lets tasks share them, as its own
merge of nested pipelines does. Sharing keeps the YAML, and the workflow that a cluster stores in etcd, a third of that.
"""

import json
from pathlib import Path
from typing import Any

import yaml

# libyaml's reads ten times as fast; wheels of PyYAML have it. Its writer would give other bytes.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compact(path: Path) -> None:
    """Rewrite a compiled YAML in place: equal definitions are kept once, under the first one's name."""
    text = path.read_text()
    # KFP's comment also lists the defaults, in an order that changes from process to process; they are in the spec.
    comments = "".join(line + "\n" for line in text.splitlines() if line.startswith(("# PIPELINE", "# Name", "# Desc")))
    spec, *platform = yaml.load_all(text, Loader)
    executors = spec["deploymentSpec"]["executors"]
    settings = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    kept = _share_executors(executors, settings)
    for component in spec["components"].values():
        component["executorLabel"] = kept[component["executorLabel"]]
    same = _share(spec["components"])
    for task in spec["root"]["dag"]["tasks"].values():
        task["componentRef"]["name"] = same[task["componentRef"]["name"]]
    path.write_text(comments + yaml.safe_dump_all([spec, *platform], sort_keys=True))


def apart(text: str) -> str:
    """The same pipeline with a component for each task, under the task's name.

    KFP's local runners name the folder of a task's outputs after its component (executor_input_utils.py): tasks that
    share one overwrite each other's, and whoever reads an earlier output, as the control does, gets the latest.
    """
    spec, *platform = yaml.load_all(text, Loader)
    shared = spec["components"]
    tasks = spec["root"]["dag"]["tasks"]
    spec["components"] = {f"comp-{name}": shared[task["componentRef"]["name"]] for name, task in tasks.items()}
    for name, task in tasks.items():
        task["componentRef"]["name"] = f"comp-{name}"
    return str(yaml.safe_dump_all([spec, *platform], sort_keys=True))


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
