"""Kubeflow's flat list of a run's tasks, folded into one state for each step.

Argo makes up to seven nodes of a task X: the retry nodes `X-driver` and `X` with their attempts `X-driver(0)` and
`X(0)`, and below an attempt of X the retry node `executor` with its pods `executor(0)`. X is the task's key in the
compiled YAML. The list names them all without their levels.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.prune_tune_loop.kfp_api import Api, call
from ptl.errors import PtlError

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
UNFINISHED = ("PENDING", "RUNNING")
NEVER = datetime(1970, 1, 2, tzinfo=UTC)  # what has not happened carries the year 1, or 1970
STAGES = ("prune", "recover", "evaluate")
MAX_PODS = 10  # of one attempt of a step
FNV_PRIME = 0x01000193  # of 32 bits
Entries = dict[str, list[Any]]  # of the list, by display name


@dataclass(frozen=True)
class ListedStep:
    """What the list says of one step."""

    state: str  # of Kubeflow; "" for a step that will not start, since one before it failed
    started: datetime | None = None
    ended: datetime | None = None
    cause: str = ""  # of a failure, where the list shows it: driver, refused or not started
    pod: str = ""  # how the name of its last pod ends


def step_names(api: Api, run: Any) -> dict[str, str]:
    """Task keys of a run and the names of their steps, in the order of the loop, from the run's pipeline version.

    Where the version cannot be read, as after it was deleted, each task that is listed with a driver is named by its
    key; in YAMLs that are compiled now the key is the name.
    """
    spec = run.pipeline_spec or _spec_of_version(api, run.pipeline_version_reference) or {}
    spec = spec.get("pipeline_spec", spec)  # with Kubernetes settings it is one of two documents
    # The answer of a server: any part of it may be missing.
    dag = spec.get("root", {}).get("dag", {})
    names = {}
    for key, task in dag.get("tasks", {}).items():
        names[key] = task.get("taskInfo", {}).get("name", key)
    if not names:
        names = {key: key for key in _keys_with_driver(run)}
    in_order = sorted(names, key=lambda key: _position(names[key]))
    return {key: names[key] for key in in_order}


def _spec_of_version(api: Api, reference: Any) -> Any:
    if not reference or not reference.pipeline_version_id:
        return None
    try:
        version = call(
            api,
            api.client.get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
    except PtlError:
        return None
    return version.pipeline_spec


def _keys_with_driver(run: Any) -> set[str]:
    names = [task.display_name or "" for task in _listed_tasks(run)]
    keys = {name.removesuffix("-driver") for name in names if name.endswith("-driver")}
    return keys - {"root"}  # the driver of the whole DAG


def _position(name: str) -> tuple[int, int, int, str]:
    """For sorting: import, the loop by its iterations, the control, the report."""
    before, _, last = name.rpartition("-")
    if last.isdigit():
        stage = STAGES.index(before) if before in STAGES else -1
        return 1, int(last), stage, name
    if before == "control" and last in STAGES:
        return 2, 0, STAGES.index(last), name
    if name in ("doctor", "import-model"):
        return 0, 0, 0, name
    return 3, 0, 0, name


def fold(run: Any, keys: Iterable[str]) -> dict[str, ListedStep]:
    """What the list says of each task; a task that it does not name is left out.

    The newest entry counts, which matters where Argo has retried a level above the step. Once the run has ended, an
    entry that is unfinished is where the list stopped being updated, and says nothing.
    """
    # `X()` collects the attempts X(0), X(1), ...
    entries: Entries = defaultdict(list)
    for task in _listed_tasks(run):
        if run.state not in ENDED or task.state not in UNFINISHED:
            name = re.sub(r"\(.*", "()", task.display_name or "")
            entries[name].append(task)
    steps = {}
    for key in keys:
        step = _listed_step(key, entries)
        if step is not None:
            steps[key] = step
    return steps


def _listed_step(key: str, entries: Entries) -> ListedStep | None:
    node = _newest(entries, key)
    driver = _newest(entries, f"{key}-driver")
    step = _step_at_driver(driver, node)
    if step is not None or node is None:
        return step
    # The list names no parents: pods belong to the node that started at the same moment.
    pods = [pod for pod in entries["executor()"] if pod.start_time == node.start_time]
    if node.state == "RUNNING" and {pod.state for pod in pods} == {"PENDING"}:
        return _listed("PENDING", node)
    if node.state == "FAILED":
        return _listed(
            "FAILED",
            node,
            cause=_cause(pods),
            pod=_last_pod(entries, key),
        )
    return _listed(node.state or "", node)


def _step_at_driver(driver: Any, node: Any) -> ListedStep | None:
    """A step whose newest entry is its driver, which prepares the pod; None once the step itself has begun."""
    if driver is None:
        return None
    if driver.state == "FAILED" and not (node and node.state):
        children = _child_hashes([driver])
        return _listed(
            "FAILED",
            driver,
            cause="driver",
            pod=children[-1] if children else "",
        )
    is_prepared = driver.state == "SUCCEEDED" and node is None
    is_preparing = driver.state in UNFINISHED
    if is_prepared or (is_preparing and (node is None or _start(driver) > _start(node))):
        return _listed("PENDING", driver)
    return None


def _listed(
    state: str,
    task: Any,
    *,
    cause: str = "",
    pod: str = "",
) -> ListedStep:
    return ListedStep(
        state,
        _moment(task.start_time),
        _moment(task.end_time),
        cause,
        pod,
    )


def _cause(pods: list[Any]) -> str:
    """Why no container ran, as far as the states of the pods show it."""
    if pods and all(map(_was_refused, pods)):
        return "refused"
    if pods and not any(_moment(pod.end_time) for pod in pods):
        return "not started"
    return ""


def _was_refused(pod: Any) -> bool:
    """Such a pod was never PENDING."""
    states = [entry.state for entry in pod.state_history or []]
    return states == ["FAILED"]


def _last_pod(entries: Entries, key: str) -> str:
    """How the name of a step's last pod ends.

    A node's id ends in the FNV-1a hash of its path. The list has no paths, but the hash of `executor(0)` is that of
    `executor`, which the attempts of the step have as a child, continued by `(0)`.
    """
    # All pods of the run; then the last one among them that continues the path of an attempt of this step.
    pods = _child_hashes(entries["executor"])
    last_pod = ""
    attempts = sorted(entries[f"{key}()"], key=_start)
    for executor in _child_hashes(attempts):
        for number in range(MAX_PODS):
            pod = _continued_hash(executor, f"({number})")
            if pod in pods:
                last_pod = pod
    return last_pod


def _child_hashes(nodes: list[Any]) -> list[str]:
    """The hashes in the ids of these nodes' children."""
    ids = [child.pod_name for node in nodes for child in node.child_tasks or []]
    return [node_id.rpartition("-")[2] for node_id in ids]


def _continued_hash(path_hash: str, text: str) -> str:
    """The FNV-1a hash (32 bits) of a node's path followed by `text`."""
    if not path_hash.isdigit():
        return ""
    continued = int(path_hash)
    for byte in text.encode():
        continued = ((continued ^ byte) * FNV_PRIME) % 2**32
    return str(continued)


def _listed_tasks(run: Any) -> list[Any]:
    tasks = run.run_details.task_details if run.run_details else None
    return [task for task in tasks or [] if task is not None]


def _newest(entries: Entries, name: str) -> Any:
    # Where a retry node is not listed, its attempts are.
    nodes = entries[name] or entries[f"{name}()"]
    return max(nodes, key=_start, default=None)


def _start(task: Any) -> datetime:
    return _moment(task.start_time) or NEVER


def _moment(time: datetime | None) -> datetime | None:
    """None for what has not happened."""
    return time if time and time > NEVER else None
