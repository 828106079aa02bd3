"""The names of the steps' images, and the commit of this package that is in them.

Compiling imports it, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Container, Iterable
from pathlib import Path

from ptl import __version__
from ptl.errors import InputError

# Which image a kind of step runs in.
IMAGE_OF = {
    "import-model": "evaluate",  # it reads the benchmarks' items with the harness
    "prune": "prune",
    "recover": "recover",
    "evaluate": "evaluate",
    "report": "evaluate",
    "export-gguf": "export-gguf",
    "export-compressed-tensors": "export-compressed-tensors",
    "evaluate-vllm": "evaluate-vllm",  # evaluate's steps with `evaluate.backend: vllm`
}
IMAGES = ("prune", "recover", "evaluate")  # every run needs them
OPTIONAL = ("evaluate-vllm", "export-gguf", "export-compressed-tensors")  # only some runs do
ALL = "all"  # of OPTIONAL, for `--with`

# The grammar of image references (distribution/reference).
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
DIGEST = r"^sha256:[0-9a-f]{64}$"
_REGISTRY = re.compile(
    r"[a-z0-9]+([.-][a-z0-9]+)*(:[0-9]+)?(/[a-z0-9]+(([.]|_{1,2}|-+)[a-z0-9]+)*)*"
)


def image(step: str, registry: str = "", tag: str | None = None, digest: str | None = None) -> str:
    """The image of a step: `[<registry>/]ptl-<image>:<tag>[@<digest>]`.

    `step` is a key of IMAGE_OF; `registry` is a host with an optional path and without scheme, or empty for the local
    engine's own images. Without a tag it is the package's version; with a digest the
    tag is only for readers: engines take the bytes that the digest names. Raises
    InputError for anything that the image reference grammar refuses.
    """
    if tag is None:
        tag = __version__
    # Checked before a build or a compile: the engine's own messages name neither option.
    if registry and not _REGISTRY.fullmatch(registry):
        raise InputError(
            f"{registry!r} is not a registry",
            field="registry",
            remedy="give host[:port][/path] in lower case, without scheme and without a slash at the end, for example "
            "registry.example.com/team",
        )
    if not _TAG.fullmatch(tag):
        raise InputError(
            f"{tag!r} is not an image tag",
            field="tag",
            remedy="use up to 128 letters, digits, '_', '.' and '-'",
        )
    name = f"{registry}/" if registry else ""
    name += f"ptl-{IMAGE_OF[step]}:{tag}"
    return f"{name}@{digest}" if digest else name


def names(registry: str = "", tag: str | None = None, *, optional: Iterable[str] = ()) -> list[str]:
    """The three images, in the order of IMAGES, and `optional` ones, of OPTIONAL."""
    return [image(step, registry, tag) for step in (*IMAGES, *optional)]


def chosen(optional: Iterable[str]) -> list[str]:
    """The images of OPTIONAL that `--with` names, each once and in that order. Raises InputError for another name."""
    wanted = set(optional)
    unknown = sorted(wanted.difference(OPTIONAL, [ALL]))
    if unknown:
        raise InputError(
            f"{unknown[0]!r} must be one of {', '.join(OPTIONAL)}, {ALL}",
            field="--with",
            remedy=f"{', '.join(IMAGES)} are always included",
        )
    return [name for name in OPTIONAL if name in wanted or ALL in wanted]


def without_digest(digests: Container[str], optional: Iterable[str]) -> list[str]:
    """The three images and `optional` ones that `digests`, by image, lack."""
    return [name for name in (*IMAGES, *optional) if name not in digests]


def with_options(optional: Iterable[str]) -> str:
    """What follows `ptl images build` (or push, digests) for the optional images, ` --with NAME` for each."""
    return "".join(f" --with {name}" for name in optional)


def own_revision() -> str:
    """The commit of this package: an image says it, else its checkout. Empty where neither knows."""
    from_image = os.environ.get("PTL_REVISION", "").removeprefix("unknown")
    return from_image or revision_of(Path(__file__).parents[2])


def revision_of(root: Path) -> str:
    """The commit of a checkout, with `-dirty` where files differ from it; empty where `root` is not the top of one."""
    # a repository that merely contains an installed package is not meant
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:  # git is not installed
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
