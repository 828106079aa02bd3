"""`ptl images`: print, build or push the images that the pipeline's steps run in, and print their digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ptl import __version__
from ptl.errors import InputError


def images(
    action: Annotated[str, typer.Argument(help="print, build, push or digests")] = "print",
    registry: Annotated[str, typer.Option(help="for example ghcr.io/you; default: images of the local engine")] = "",
    tag: Annotated[str, typer.Option(help="image tag")] = __version__,
    optional: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="IMAGE",
            help="also an image that only some runs need (evaluate-vllm, export-gguf or export-compressed-tensors), or "
            "all of them; repeatable",
        ),
    ] = None,
    base_image: Annotated[str | None, typer.Option(help="base image of a build; default: the Dockerfile's")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="build for machines without a GPU")] = False,
    # These two are set by the environment as for pip.
    ca: Annotated[
        Path | None,
        typer.Option(envvar="PIP_CERT", help="CA bundle for a build's downloads, for example your organisation's"),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(envvar="PIP_INDEX_URL", help="package index for a build; default: PyPI", show_envvar=True),
    ] = None,
    wheels: Annotated[Path | None, typer.Option(help="folder with local wheels for a build")] = None,
) -> None:
    """Print, build or push the images that the pipeline's steps run in, or print their digests for `--images`."""
    from ptl.config import image_names
    from ptl.local import images as work

    more = image_names.chosen(optional or [])
    if action == "digests":
        print(json.dumps(work.digests(registry, tag, more), indent=2))
        return
    if action == "print":
        names = image_names.names(registry, tag, optional=more)
    elif action == "build":
        names = work.build(registry, tag, more, base_image=base_image, cpu=cpu, ca=ca, index=index, wheels=wheels)
    elif action == "push":
        names = work.push(registry, tag, more)
    else:
        raise InputError(f"{action!r} must be one of print, build, push, digests", field="action")
    for name in names:
        print(name)
