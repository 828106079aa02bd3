"""Kubeflow's flat list of a run's tasks: the steps' names, and a state for each step that MLflow does not know.

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
# Why a step failed, as far as the list shows it.
DRIVER = "its driver failed: no container of the step was started"
NOT_STARTED = "no container of the step was started, as with an image, a volume or a node that is not there, or a quota"


@dataclass(frozen=True)
class ListedStep:
    """What the list says of one step."""

    state: str  # of Kubeflow; "" for a step that will not start, since one before it failed
    started: datetime | None = None
    ended: datetime | None = None
    cause: str = ""  # of a failure: DRIVER, NOT_STARTED or nothing


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


def retried_at(run: Any) -> datetime | None:
    """When a run was last retried, before which no failure counts; None where it was not."""
    history = run.state_history or []
    ends = [number for number, entry in enumerate(history) if entry.state in ENDED]
    if run.state in ENDED:
        ends = ends[:-1]  # the last one is its own
    if not ends:
        return None
    later = history[ends[-1] + 1 :]
    # Just retried: the history does not have it yet.
    return _moment(later[0].update_time) if later else datetime.now(UTC)


def fold(run: Any, keys: Iterable[str]) -> dict[str, ListedStep]:
    """What the list says of each task; a task that it does not name is left out.

    The newest entry counts, which matters where Argo has retried a level above the step. Once the run has ended, an
    entry that is unfinished is where the list stopped being updated; after a retry it holds the old failures for some
    seconds: both say nothing.
    """
    retried = retried_at(run) or NEVER
    # `X()` collects the attempts X(0), X(1), ...
    entries: dict[str, list[Any]] = defaultdict(list)
    for task in _listed_tasks(run):
        is_frozen = run.state in ENDED and task.state in UNFINISHED
        is_old = task.state != "SUCCEEDED" and NEVER < (task.end_time or NEVER) <= retried
        if not is_frozen and not is_old:
            entries[re.sub(r"\(.*", "()", task.display_name or "")].append(task)
    steps = {key: _listed_step(key, entries, run.state in ENDED) for key in keys}
    return {key: step for key, step in steps.items() if step is not None}


def _listed_step(key: str, entries: dict[str, list[Any]], has_ended: bool) -> ListedStep | None:
    node = _newest(entries, key)
    driver = _newest(entries, f"{key}-driver")
    # The driver prepares the pod.
    if driver and driver.state and (node is None or not node.state or _start(driver) > _start(node)):
        if driver.state == "FAILED":
            return _listed("FAILED", driver, DRIVER)
        if not has_ended:
            return _listed("PENDING", driver)
    if node is None:
        return None
    # The list names no parents: pods belong to the node that started at the same moment.
    pods = [pod for pod in entries["executor()"] if pod.start_time == node.start_time]
    if node.state == "RUNNING" and {pod.state for pod in pods} == {"PENDING"}:
        return _listed("PENDING", node)
    is_unstarted = bool(pods) and node.state == "FAILED" and not any(map(_has_run, pods))
    return _listed(node.state or "", node, NOT_STARTED if is_unstarted else "")


def _has_run(pod: Any) -> bool:
    """One that Kubernetes refused was never PENDING, one that did not start in time has no end."""
    states = [entry.state for entry in pod.state_history or []]
    return states != ["FAILED"] and _moment(pod.end_time) is not None


def _listed(state: str, task: Any, cause: str = "") -> ListedStep:
    return ListedStep(state, _moment(task.start_time), _moment(task.end_time), cause)


def _listed_tasks(run: Any) -> list[Any]:
    tasks = run.run_details.task_details if run.run_details else None
    return [task for task in tasks or [] if task is not None]


def _newest(entries: dict[str, list[Any]], name: str) -> Any:
    # Where a retry node is not listed, its attempts are.
    nodes = entries[name] or entries[f"{name}()"]
    return max(nodes, key=_start, default=None)


def _start(task: Any) -> datetime:
    return _moment(task.start_time) or NEVER


def _moment(time: datetime | None) -> datetime | None:
    """None for what has not happened."""
    return time if time and time > NEVER else None
