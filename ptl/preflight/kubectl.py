"""What the doctor asks kubectl, and what it is when kubectl does not say it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

SECONDS = 15


class NotSeenError(Exception):
    """The cluster did not answer with the object."""


class NoSuchObjectError(NotSeenError):
    """The cluster has no object of that name."""


def get(kind: str, name: str, namespace: str, output: str) -> str:
    """What `kubectl get` prints. Raises NotSeenError where it does not, with what it says."""
    return _answer("get", kind, name, "--namespace", namespace, "--output", output)


def get_json(kind: str, name: str, namespace: str) -> dict[str, Any]:
    """An object."""
    return _as_json(get(kind, name, namespace, "json"), f"{kind} {name}")


def read(path: str) -> dict[str, Any]:
    """What the Kubernetes API says at a path. Raises NotSeenError."""
    return _as_json(_answer("get", "--raw", path), path)


def may(account: str, verb: str, group: str, resource: str, subresource: str, namespace: str) -> bool:
    """Whether a service account of the namespace has a right. Raises NotSeenError for a user who may not ask that."""
    user = f"system:serviceaccount:{namespace}:{account}"
    kind = f"{resource}.{group}" if group else resource
    options = [f"--subresource={subresource}"] if subresource else []
    process = _run("auth", "can-i", verb, kind, *options, "--namespace", namespace, "--as", user)
    # "no" has the exit code of an error.
    answer = process.stdout.partition(" ")[0].strip()
    if answer in ("yes", "no"):
        return answer == "yes"
    raise NotSeenError(_message(process))


def _answer(*arguments: str) -> str:
    process = _run(*arguments)
    if process.returncode == 0:
        return process.stdout
    kind_of_error = NoSuchObjectError if "NotFound" in process.stderr else NotSeenError
    raise kind_of_error(_message(process))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", *arguments, f"--request-timeout={SECONDS}s"]
    try:
        # The request has a timeout of its own; a plugin for logins that asks on the terminal has none.
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSeenError(f"kubectl gave no answer ({type(error).__name__})") from error


def _message(process: subprocess.CompletedProcess[str]) -> str:
    return process.stderr.strip()[:200] or f"kubectl ended with exit code {process.returncode}"


def _as_json(text: str, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise NotSeenError(f"kubectl get {what} gave no JSON") from error
