"""The DAG of a run as data: which steps there are, what each takes from which other, and what else it waits for.

The pipeline is built from it, the local runners take their order from it, and forecast and status their lists of steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ptl.config import Config

Arm = Literal["loop", "control"]
_NAME = re.compile(r"(control-)?(doctor|import|prune|recover|evaluate|report)(?:-model)?(?:-(\d+))?")


@dataclass(frozen=True)
class Source:
    """An output of another step."""

    step: str
    output: str


@dataclass(frozen=True)
class Node:
    """One step: `inputs` are its artifacts by name, `after` the steps that it waits for without taking anything."""

    name: str
    inputs: Mapping[str, Source]
    after: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """All steps that must have ended before this one starts."""
        return tuple(dict.fromkeys([*(source.step for source in self.inputs.values()), *self.after]))


def stage_of(name: str) -> str:
    """`doctor`, `import`, `prune`, `recover`, `evaluate` or `report`."""
    return _parts(name)[1]


def arm_of(name: str) -> Arm:
    """The arm that a step belongs to; what both arms need is of the loop."""
    return "control" if _parts(name)[0] else "loop"


def iteration_of(name: str) -> int:
    """`prune-3` is of iteration 3, the control's steps are of its only one, all others of 0."""
    control, _, number = _parts(name)
    return int(number or bool(control))


def _parts(name: str) -> tuple[str, str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no step")
    return match[1] or "", match[2], match[3] or ""


def nodes(config: Config) -> list[Node]:
    """All steps of a run, in an order in which one machine can execute them.

    Only data makes dependencies: the control arm starts from the imported model, beside the loop, and with the gate off
    an iteration starts from the recovered model while that is still being evaluated. Every recovery takes what
    evaluate-0 wrote, because training rows are compared with the items of the benchmarks.
    """
    doctor = [Node("doctor", {})] if config.resources.doctor else []
    steps = [*doctor, Node("import-model", {}, ("doctor",) if doctor else ())]
    steps.append(Node("evaluate-0", {"model": Source("import-model", "out")}))
    start = Source("import-model", "out")
    for iteration in range(1, config.schedule.iterations + 1):
        arm = _iteration(f"{{}}-{iteration}", start, fallback=config.gate.enabled)
        steps += arm
        start = Source(arm[-1].name, "accepted") if config.gate.enabled else Source(arm[-2].name, "out")
    last = steps[-1].name
    if config.control:
        waits = _ends(steps) if config.resources.control == "after" else ()
        steps += _iteration("control-{}", Source("import-model", "out"), fallback=False, after=waits)
    results = {"final": Source(last, "accepted")}
    if config.control:
        results["control"] = Source(steps[-1].name, "accepted")
    taken = {source.step for source in results.values()}
    steps.append(Node("report", results, tuple(name for name in _ends(steps) if name not in taken)))
    return steps


def _ends(steps: Sequence[Node]) -> tuple[str, ...]:
    """The steps that no other one waits for: with the gate off each evaluation is one."""
    needed = {name for node in steps for name in node.needs}
    return tuple(node.name for node in steps if node.name not in needed)


def _iteration(name: str, start: Source, *, fallback: bool, after: tuple[str, ...] = ()) -> list[Node]:
    """Prune, recover and evaluate; with `fallback` the evaluation may return to where the iteration started."""
    prune, recover, evaluate = (name.format(stage) for stage in ("prune", "recover", "evaluate"))
    scored = {"model": Source(recover, "out")} | ({"fallback": start} if fallback else {})
    return [
        Node(prune, {"model": start}, after),
        Node(recover, {"model": Source(prune, "out"), "scored": Source("evaluate-0", "scores")}),
        Node(evaluate, scored),
    ]


def critical_path(steps: Sequence[Node], cost: Mapping[str, float]) -> tuple[float, list[str]]:
    """The longest chain of steps that wait for each other: its cost (hours, seconds: as given), and its steps.

    A step without a cost counts as 0. No run can end earlier, whatever runs beside it.
    """
    ends: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for node in steps:  # nodes are listed after those that they need
        latest = max(node.needs, key=ends.__getitem__, default=None)
        before[node.name] = latest
        ends[node.name] = cost.get(node.name, 0.0) + (ends[latest] if latest else 0.0)
    name: str | None = max(ends, key=ends.__getitem__)
    total, path = ends[str(name)], []
    while name is not None:
        path.append(name)
        name = before[name]
    return total, path[::-1]
