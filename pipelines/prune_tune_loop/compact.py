"""The compiled YAML, made smaller and readable: a cluster keeps six copies of all that is written of a task.

Tasks of one kind share one definition: KFP writes a component and an executor for every task, although the pipeline
spec lets tasks share them, as its own merge of nested pipelines does. Tasks get their steps' names as keys, because a
server lists tasks by key and never by display name. And what the SDK writes twice for old backends is written once.
"""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# libyaml's loader is ten times as fast; wheels of PyYAML have it. Its writer would give other bytes.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# KFP's comment also lists the defaults, in an order that changes from process to process; they are in the spec.
KEPT_COMMENTS = ("# PIPELINE", "# Name", "# Desc")
OLD_RESOURCES = ("cpuLimit", "cpuRequest", "memoryLimit", "memoryRequest")  # beside resourceCpuLimit and so on
OLD_ACCELERATOR = ("count", "type")  # beside resourceCount and resourceType
# What KFP puts before a component's function. Ours name their types plainly (`Input[Model]`), so the star serves.
KFP_IMPORTS = "\nimport kfp\nfrom kfp import dsl\nfrom kfp.dsl import *\nfrom typing import *\n"
USED_IMPORTS = "\nfrom kfp.dsl import *\n"
# Of a ConfigMap, Secret or claim the name is written twice: plain, and as a parameter that may come from another task.
NAMED_TWICE = {"secretAsVolume", "configMapAsVolume", "imagePullSecret", "pvcMount"}

Json = dict[str, Any]  # an object of the compiled YAML


@dataclass(frozen=True)
class Parts:
    """The parts of a compiled YAML that are rewritten, each in place."""

    documents: list[Any]  # the pipeline spec, and where a task has Kubernetes settings a second one with them
    tasks: Json  # by key
    components: Json  # by name
    executors: Json  # by label
    settings: Json  # Kubernetes settings, by label of the executor


def _parse(text: str) -> Parts:
    documents = list(yaml.load_all(text, Loader))
    spec = documents[0]
    settings = {}
    for platforms in documents[1:]:
        settings = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return Parts(
        documents=documents,
        tasks=spec["root"]["dag"]["tasks"],
        components=spec["components"],
        executors=spec["deploymentSpec"]["executors"],
        settings=settings,
    )


def compact(path: Path) -> None:
    """Rewrite a compiled YAML in place."""
    text = path.read_text()
    parts = _parse(text)
    for executor in parts.executors.values():
        container = executor["container"]
        _drop_old_resources(container)
        _shorten_command(container)
    for volumes in parts.settings.values():
        _drop_name_parameters(volumes)
    # Executors first: components are equal only once they refer to the same executor.
    kept_executors = _share_executors(parts.executors, parts.settings)
    for component in parts.components.values():
        component["executorLabel"] = kept_executors[component["executorLabel"]]
    kept_components = _share(parts.components)
    for task in parts.tasks.values():
        reference = task["componentRef"]
        reference["name"] = kept_components[reference["name"]]
    _name_by_step(parts.tasks)
    lines = text.splitlines(keepends=True)
    comments = [line for line in lines if line.startswith(KEPT_COMMENTS)]
    path.write_text("".join(comments) + yaml.safe_dump_all(parts.documents, sort_keys=True))


def local_copy(text: str, order: Sequence[str]) -> str:
    """The same pipeline for KFP's local runners: a component for each task, one after another in `order`."""
    parts = _parse(text)
    shared = dict(parts.components)
    parts.components.clear()
    for name, task in parts.tasks.items():
        # They name the folder of a task's outputs after its component (executor_input_utils.py): tasks that share one
        # overwrite each other's, and whoever reads an earlier output, as the control does, gets the latest.
        reference = task["componentRef"]
        own_component = f"comp-{name}"
        parts.components[own_component] = shared[reference["name"]]
        reference["name"] = own_component
        # They would repeat a step that has used its attempts.
        task.pop("retryPolicy", None)
        # They run tasks one by one, and independent ones in an order of their own.
        before = order[: order.index(name)]
        dependencies = task.get("dependentTasks", [])
        task["dependentTasks"] = sorted({*dependencies, *before[-1:]})
    # A cluster's volumes are not there, whatever the environment says of them.
    for executor in parts.executors.values():
        container = executor["container"]
        variables = container.get("env", [])
        container["env"] = [variable for variable in variables if variable["name"].startswith("PTL_")]
    return str(yaml.safe_dump_all(parts.documents, sort_keys=True))


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


def _drop_old_resources(container: Json) -> None:
    """Drop the fields of `resources` that have a successor beside them."""
    resources = container.get("resources", {})
    for field in OLD_RESOURCES:
        resources.pop(field, None)
    for field in OLD_ACCELERATOR:
        resources.get("accelerator", {}).pop(field, None)


def _shorten_command(container: Json) -> None:
    """Drop repeated blanks of KFP's script, and imports that the function does not need."""
    command = container["command"]
    for i, part in enumerate(command):
        if part.startswith(KFP_IMPORTS):
            # In the fewest characters that Python writes it with.
            command[i] = USED_IMPORTS + ast.unparse(ast.parse(part.removeprefix(KFP_IMPORTS)))
        else:
            command[i] = re.sub(r" {2,}", " ", part)


def _drop_name_parameters(settings: Json) -> None:
    """Keep the plain name, which every backend reads (driver/k8s.go), of what is named in two ways."""
    for kind in NAMED_TWICE & settings.keys():
        for volume in settings[kind]:
            parameters = [field for field in volume if field.endswith("NameParameter")]
            for parameter in parameters:
                value = volume[parameter].get("runtimeValue", {})
                plain_name = volume.get(parameter.removesuffix("Parameter"))
                if value.get("constant") in (plain_name, volume.get("constant")):
                    del volume[parameter]


def _share_executors(executors: Json, settings: Json) -> dict[str, str]:
    """Drop repeated executors; returns, for every label, the label that is kept."""
    # What runs and where it runs: both must be equal.
    definitions: Json = {}
    for label, executor in executors.items():
        definitions[label] = [executor, settings.get(label)]
    kept = _share(definitions)
    for label in executors.keys() - definitions.keys():
        del executors[label]
        settings.pop(label, None)
    return kept


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
