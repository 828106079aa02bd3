"""The compiled YAML, made smaller and readable: a cluster keeps six copies of all that is written of a task.

Tasks of one kind share one definition: KFP writes a component and an executor for every task, although the pipeline
spec lets tasks share them, as its own merge of nested pipelines does. Tasks get their steps' names as keys, because a
server lists tasks by key and never by display name. And what the SDK writes twice for old backends is written once.
"""

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# libyaml's loader is ten times as fast; wheels of PyYAML have it. Its writer would give other bytes.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# KFP's comment also lists the defaults, in an order that changes from process to process; they are in the spec.
KEPT_COMMENTS = ("# PIPELINE", "# Name", "# Desc")
# beside resourceCpuLimit and so on
OLD_RESOURCES = ("cpuLimit", "cpuRequest", "memoryLimit", "memoryRequest")
OLD_ACCELERATOR = ("count", "type")  # beside resourceCount and resourceType
# What KFP puts before a component's function. Ours name their types plainly (`Input[Model]`), so the star serves.
KFP_IMPORTS = "\nimport kfp\nfrom kfp import dsl\nfrom kfp.dsl import *\nfrom typing import *\n"
USED_IMPORTS = "\nfrom kfp.dsl import *\n"
# Of a ConfigMap, Secret or claim the name is written twice: plain, and as a parameter that may come from another task.
NAMED_TWICE = {"secretAsVolume", "configMapAsVolume", "imagePullSecret", "pvcMount"}

Json = dict[str, Any]  # an object of the compiled YAML


def compact(path: Path) -> None:
    """Rewrite a compiled YAML in place."""
    text = path.read_text()
    documents = list(yaml.load_all(text, Loader))
    tasks, components, executors = _parts(documents)
    settings = {}  # of Kubernetes, by label of the executor: a second document, where there are any
    for platforms in documents[1:]:
        settings = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor in executors.values():
        container = executor["container"]
        _drop_old_resources(container.get("resources", {}))
        container["command"] = [_shortened(part) for part in container["command"]]
    for volumes in settings.values():
        _drop_name_parameters(volumes)
    # Executors first: components are equal only once they refer to the same executor. What runs and where it runs: both
    # must be equal.
    definitions = {label: [executor, settings.get(label)] for label, executor in executors.items()}
    kept_executors = _share(definitions)
    for label in executors.keys() - definitions.keys():
        del executors[label]
        settings.pop(label, None)
    for component in components.values():
        component["executorLabel"] = kept_executors[component["executorLabel"]]
    kept_components = _share(components)
    for task in tasks.values():
        task["componentRef"]["name"] = kept_components[task["componentRef"]["name"]]
    _name_by_step(tasks)
    comments = [line for line in text.splitlines(keepends=True) if line.startswith(KEPT_COMMENTS)]
    path.write_text("".join(comments) + yaml.safe_dump_all(documents, sort_keys=True))


def local_copy(text: str, order: Sequence[str]) -> str:
    """The same pipeline for KFP's local runners: a component for each task, one after another in `order`."""
    documents = list(yaml.load_all(text, Loader))
    tasks, components, executors = _parts(documents)
    shared = dict(components)
    components.clear()
    for name, task in tasks.items():
        # They name the folder of a task's outputs after its component (executor_input_utils.py): tasks that share one
        # overwrite each other's, and whoever reads an earlier output, as the control does, gets the latest.
        own_component = f"comp-{name}"
        components[own_component] = shared[task["componentRef"]["name"]]
        task["componentRef"]["name"] = own_component
        # They would repeat a step that has used its attempts.
        task.pop("retryPolicy", None)
        # They run tasks one by one, and independent ones in an order of their own.
        before = order[: order.index(name)]
        task["dependentTasks"] = sorted({*task.get("dependentTasks", []), *before[-1:]})
    # A cluster's volumes are not there, whatever the environment says of them.
    for executor in executors.values():
        container = executor["container"]
        container["env"] = [
            entry for entry in container.get("env", []) if entry["name"].startswith("PTL_")
        ]
    return str(yaml.safe_dump_all(documents, sort_keys=True))


def _parts(documents: list[Any]) -> tuple[Json, Json, Json]:
    """The tasks, components and executors of a pipeline, each of which is rewritten in place."""
    spec = documents[0]
    return spec["root"]["dag"]["tasks"], spec["components"], spec["deploymentSpec"]["executors"]


def _name_by_step(tasks: Json) -> None:
    """Give every task its display name as key, wherever it is referred to."""
    steps = {}
    renamed = {}
    for key, task in tasks.items():
        step = task["taskInfo"]["name"]
        steps[key] = step
        renamed[step] = task
    tasks.clear()  # a step's name may be the key that KFP gave to another step
    tasks.update(renamed)
    for task in renamed.values():
        if "dependentTasks" in task:
            task["dependentTasks"] = sorted(steps[key] for key in task["dependentTasks"])
        for source in task["inputs"].get("artifacts", {}).values():
            output = source["taskOutputArtifact"]
            output["producerTask"] = steps[output["producerTask"]]


def _drop_old_resources(resources: Json) -> None:
    """Drop the fields that have a successor beside them."""
    for field in OLD_RESOURCES:
        resources.pop(field, None)
    for field in OLD_ACCELERATOR:
        resources.get("accelerator", {}).pop(field, None)


def _shortened(part: str) -> str:
    """A part of a command without repeated blanks of KFP's script, and imports that the function does not need."""
    if part.startswith(KFP_IMPORTS):
        # In the fewest characters that Python writes it with.
        return USED_IMPORTS + ast.unparse(ast.parse(part.removeprefix(KFP_IMPORTS)))
    return re.sub(r" {2,}", " ", part)


def _drop_name_parameters(settings: Json) -> None:
    """Keep the plain name, which every backend reads (driver/k8s.go), of what is named in two ways."""
    for kind in NAMED_TWICE & settings.keys():
        for volume in settings[kind]:
            for parameter in [field for field in volume if field.endswith("NameParameter")]:
                value = volume[parameter].get("runtimeValue", {})
                plain_name = volume.get(parameter.removesuffix("Parameter"))
                if value.get("constant") in (plain_name, volume.get("constant")):
                    del volume[parameter]


def _share(definitions: Json) -> dict[str, str]:
    """Drop repeated definitions; returns, for every name, the name that is kept."""
    first_names: dict[str, str] = {}  # by content
    kept = {}
    for name in sorted(definitions, key=lambda name: (len(name), name)):  # `prune` before `prune-2`
        content = json.dumps(definitions[name], sort_keys=True)
        kept[name] = first_names.setdefault(content, name)
    for name in definitions.keys() - first_names.values():
        del definitions[name]
    return kept
