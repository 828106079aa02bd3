"""The names of the steps' images. Compiling imports it, so it imports nothing heavy."""

from __future__ import annotations

import re

from ptl import __version__
from ptl.errors import InputError

# Which image a kind of step runs in: five steps, three images.
IMAGE_OF = {
    "import-model": "prune",
    "prune": "prune",
    "recover": "recover",
    "evaluate": "evaluate",
    "report": "evaluate",
    "evaluate-vllm": "evaluate-vllm",  # evaluate's steps with `evaluate.backend: vllm`
    "export-compressed-tensors": "export-compressed-tensors",  # made by bake alone, like evaluate-vllm
}
IMAGES = ("prune", "recover", "evaluate")

# The grammar of image references (distribution/reference), without digests.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REGISTRY = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*(:[0-9]+)?(/[a-z0-9]+(([.]|_{1,2}|-+)[a-z0-9]+)*)*")


def image(step: str, registry: str = "", tag: str | None = None) -> str:
    """The image of a step: `[<registry>/]ptl-<image>:<tag>`.

    `step` is a key of IMAGE_OF; `registry` is a host with an optional path and without scheme, or empty for the local
    engine's own images; without a tag it is the package's version. Raises InputError for anything that the image
    reference grammar refuses.
    """
    if tag is None:
        tag = __version__
    # Checked before a build or a compile: the engine's own messages name neither option.
    if step not in IMAGE_OF:
        steps = ", ".join(IMAGE_OF)
        raise InputError(f"{step!r} has no image; steps are {steps}", field="step")
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
    name = f"ptl-{IMAGE_OF[step]}:{tag}"
    return f"{registry}/{name}" if registry else name


def names(registry: str = "", tag: str | None = None, *, vllm: bool = False) -> list[str]:
    """The three images, in the order of IMAGES; with `vllm` also that of evaluate on vLLM, made by bake alone."""
    steps = (*IMAGES, "evaluate-vllm") if vllm else IMAGES
    return [image(step, registry, tag) for step in steps]
