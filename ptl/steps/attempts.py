"""Attempts of a step: how many there may be, and counting them in the store.

Those in one pod, in pods that Argo starts anew, and those of a local runner together are `retries` + 1.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid

from ptl.errors import InputError, WorkError
from ptl.processes import RETRIES, RETRY_WAIT, on_a_cluster


class NoAttemptLeftError(WorkError):
    """The step has used all of its attempts; it is not tried again until somebody asks for it."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How often a step is tried, and for how long. The compiled pipeline sets the variables of the pod."""

    retries: int  # attempts after the first one
    pause: float  # seconds before the first further attempt; doubled each time
    timeout: float | None  # seconds for one attempt


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    reason: str
    exit_code: int = 1
    exhausted: bool = False  # earlier attempts have used all, and the last of them has reported why

    @property
    def final(self) -> bool:
        """Whether no attempt follows: another one would find the same wrong input, or may not be made."""
        return self.exhausted or self.exit_code == InputError.exit_code


def policy() -> Policy:
    """What this pod's or process's environment asks for."""
    # On one machine whoever started the run sees it fail, and runs the same command again.
    retries, pause = (RETRIES, RETRY_WAIT) if on_a_cluster() else (0, 1)
    timeout = os.environ.get("PTL_TIMEOUT")
    return Policy(
        retries=int(os.environ.get("PTL_RETRIES") or retries),
        pause=float(os.environ.get("PTL_RETRY_WAIT") or pause),
        timeout=float(timeout) if timeout else None,
    )


def claim(root: str, run: str, step: str) -> int:
    """Count an attempt of a step in the store; returns its number in this launch, from 1.

    A launch begins when somebody starts or retries the run; Argo's further pods continue it. Raises NoAttemptLeftError.
    """
    from ptl.storage import store

    launch = _launch()
    own_id = uuid.uuid4().hex
    earlier: list[str | None] = []  # launches of the attempts before this one
    # Counted in the store: pods share nothing else, and a step's own process may die at any moment. Numbers are claimed
    # in order, each by one attempt: of two that begin together one gets the next number.
    while True:
        # One that does not begin a launch continues the newest.
        attempt = {"launch": launch or (earlier[-1] if earlier else None), "id": own_id}
        name = f"{step}.attempt-{len(earlier) + 1}"
        winner = json.loads(store.claim(root, run, name, json.dumps(attempt)))
        if winner["id"] == own_id:
            break
        earlier.append(winner["launch"])
    number = earlier.count(attempt["launch"]) + 1
    allowed = policy().retries + 1
    if number > allowed:
        raise NoAttemptLeftError(
            f"all {allowed} attempts were used (resources.retries: {allowed - 1})",
            remedy="`ptl retry` or Kubeflow's Retry gives it new ones, from what is finished",
        )
    return number


def _launch() -> str | None:
    """What distinguishes one launch from another; None: this pod continues the launch before it.

    Argo numbers its attempts at every level of the workflow, `run(0).root(0).prune-1(0).executor(1)`, and begins anew
    at 0 when a run is retried by a person.
    """
    if not on_a_cluster():
        # called by hand: each call is a launch
        return os.environ.get("PTL_LAUNCH") or uuid.uuid4().hex
    retry_index = os.environ.get("KFP_RETRY_INDEX") or 0
    node = os.environ.get("PTL_ARGO_NODE") or f"({retry_index})"
    # A number above 0 on any level: Argo, not a person, has started this pod.
    if re.search(r"\((?!0\))", node):
        return None
    return os.environ.get("KFP_POD_UID") or os.environ.get("PTL_LAUNCH")
