"""Kubeflow's flat list of a run's tasks, folded into one state for each step.

Argo makes up to seven nodes of a task X: the retry nodes `X-driver` and `X` with their attempts `X-driver(0)` and
`X(0)`, and below an attempt of X the retry node `executor` with its pods `executor(0)`. X is the task's key in the
compiled YAML. The list names them all without their levels.
"""

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
    spec = run.pipeline_spec
    reference = run.pipeline_version_reference
    if not spec and reference and reference.pipeline_version_id:
        try:
            ids = (reference.pipeline_id, reference.pipeline_version_id)
            spec = call(api, api.client.get_pipeline_version, *ids).pipeline_spec
        except PtlError:
            spec = None
    spec = (spec or {}).get("pipeline_spec", spec or {})  # with Kubernetes settings it is one of two documents
    tasks = spec.get("root", {}).get("dag", {}).get("tasks", {})
    names = {key: task.get("taskInfo", {}).get("name", key) for key, task in tasks.items()}
    if not names:
        listed = {task.display_name or "" for task in _tasks(run)}
        keys = {name.removesuffix("-driver") for name in listed if name.endswith("-driver")} - {"root"}
        names = {key: key for key in keys}
    return dict(sorted(names.items(), key=lambda item: _order(item[1])))


def fold(run: Any, keys: Iterable[str]) -> dict[str, ListedStep]:
    """What the list says of each task; a task that it does not name is left out.

    The newest entry counts, which matters where Argo has retried a level above the step. Once the run has ended, an
    entry that is unfinished is where the list stopped being updated, and says nothing.
    """
    entries: dict[str, list[Any]] = {}
    for task in _tasks(run):
        if run.state not in ENDED or task.state not in UNFINISHED:
            name, _, attempt = (task.display_name or "").partition("(")
            entries.setdefault(name + "()" * bool(attempt), []).append(task)
    folded = {key: _step(key, entries) for key in keys}
    return {key: listed for key, listed in folded.items() if listed is not None}


def _step(key: str, entries: dict[str, list[Any]]) -> ListedStep | None:
    node = _newest(entries.get(key) or entries.get(f"{key}()"))
    driver = _newest(entries.get(f"{key}-driver") or entries.get(f"{key}-driver()"))
    times = (_time(driver and driver.start_time), _time(driver and driver.end_time))
    if driver is not None and driver.state == "FAILED" and not (node and node.state):
        return ListedStep("FAILED", *times, "driver", _pod_of(driver))
    if driver is not None and driver.state in UNFINISHED and (node is None or _start(driver) > _start(node)):
        return ListedStep("PENDING", *times)
    if node is None:
        return ListedStep("PENDING", *times) if driver is not None and driver.state == "SUCCEEDED" else None
    times = (_time(node.start_time), _time(node.end_time))
    pods = [pod for pod in entries.get("executor()", []) if pod.start_time == node.start_time]
    if node.state == "RUNNING" and pods and all(pod.state == "PENDING" for pod in pods):
        return ListedStep("PENDING", *times)
    if node.state != "FAILED":
        return ListedStep(node.state or "", *times)
    return ListedStep("FAILED", *times, _cause(pods), _last_pod(entries, key))


def _cause(pods: list[Any]) -> str:
    """Why no container ran, as far as the states of the pods show it."""
    if pods and all([entry.state for entry in pod.state_history or []] == ["FAILED"] for pod in pods):
        return "refused"
    if pods and all(_time(pod.end_time) is None for pod in pods):
        return "not started"
    return ""


def _last_pod(entries: dict[str, list[Any]], key: str) -> str:
    """How the name of a step's last pod ends.

    A node's id ends in the FNV-1a hash of its path. The list has no paths, but the hash of `executor(0)` is that of
    `executor`, which the attempts of the step have as a child, continued by `(0)`.
    """
    pods = {_pod_of(node, i) for node in entries.get("executor", []) for i in range(len(node.child_tasks or []))}
    attempts = sorted(entries.get(f"{key}()", []), key=_start)
    children = [child.pod_name for attempt in attempts for child in attempt.child_tasks or []]
    known = [hashed for child in children for i in range(10) if (hashed := _continued(child, f"({i})")) in pods]
    return known[-1] if known else ""


def _pod_of(node: Any, index: int = -1) -> str:
    """The hash of a child of a retry node."""
    return node.child_tasks[index].pod_name.rpartition("-")[2] if node.child_tasks else ""


def _continued(node_id: str, text: str) -> str:
    """The FNV-1a hash (32 bits) of a node's path followed by `text`."""
    last = node_id.rpartition("-")[2]
    if not last.isdigit():
        return ""
    hashed = int(last)
    for byte in text.encode():
        hashed = ((hashed ^ byte) * 0x01000193) % 2**32
    return str(hashed)


def _tasks(run: Any) -> list[Any]:
    return [task for task in (run.run_details and run.run_details.task_details) or [] if task is not None]


def _newest(entries: list[Any] | None) -> Any:
    return max(entries, key=_start) if entries else None


def _start(task: Any) -> datetime:
    return _time(task.start_time) or NEVER


def _time(moment: datetime | None) -> datetime | None:
    return moment if moment and moment > NEVER else None


def _order(name: str) -> tuple[int, int, int, str]:
    """Import, the loop by its iterations, the control, the report."""
    before, _, last = name.rpartition("-")
    if last.isdigit():
        return 1, int(last), STAGES.index(before) if before in STAGES else -1, name
    if before == "control" and last in STAGES:
        return 2, 0, STAGES.index(last), name
    return (0 if name in ("doctor", "import-model") else 3), 0, 0, name
