"""Which extra of the package brings a module that a base install does not have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ptl.errors import InputError

# Modules that our code imports, or MLflow's for its database and server, by the extra that brings them.
MODULES = {
    "prune": ("torch", "transformers", "accelerate", "datasets", "safetensors", "pyarrow"),
    "recover": ("trl", "peft", "math_verify"),
    "evaluate": ("lm_eval", "jinja2", "matplotlib"),
    "pipelines": ("kfp", "kfp_server_api", "docker", "flask", "sqlalchemy", "alembic"),
    "gguf": ("convert_hf_to_gguf", "gguf"),
}
# What a whole command needs, where that is more than the one module that it misses first.
OF_COMMAND = {"recover": "recover", "evaluate": "evaluate", "export": "gguf"}


def missing(module: str, command: str = "") -> InputError | None:
    """What to install for a module that cannot be imported; None where no extra brings it."""
    top = module.partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if top in modules]
    if not extras:
        return None
    extra = OF_COMMAND.get(command, extras[0])
    return InputError(f"ptl {command}: needs the module {top}, which is not installed: pip install 'ptl[{extra}]'")


def need(module: str, command: str) -> None:
    """Raise InputError where a command would start a program that lacks this module."""
    if importlib.util.find_spec(module) is None and (error := missing(module, command)):
        raise error


def absent(extras: Iterable[str]) -> list[str]:
    """Modules of these extras that are not installed; nothing is imported."""
    return [name for extra in extras for name in MODULES[extra] if importlib.util.find_spec(name) is None]
