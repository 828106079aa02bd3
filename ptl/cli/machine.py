"""What a machine needs beside the package: `ptl up` starts servers, `ptl images` makes the images of the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl import __version__, extras, processes
from ptl.cli.arguments import HOME, Home
from ptl.local import servers


def up(
    home: Home = HOME,
    s3_port: Annotated[
        int | None,
        typer.Option(help="port of SeaweedFS, which also uses the next three; default: the last one, or 8433"),
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="port of MLflow; default: the last one, or 15000 (5000 with --ui)")
    ] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="instead, browse runs made without --s3 in MLflow, until you press Ctrl-C")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="stop what an earlier `ptl up` has started")] = False,
) -> None:
    """Start a real S3 and a real MLflow server on loopback, and print the environment variables to use them."""
    home = home.absolute()
    if stop:
        print("stopped:", ", ".join(servers.down(home)) or "nothing was running")
        return
    # MLflow's server would end with a traceback of its own.
    extras.need("flask", "up")
    if ui:
        servers.ui(home, mlflow_port or 5000)
    with processes.interruptible(
        "run the same command again to start what is missing; `ptl up --stop` stops what was started"
    ):
        environment = servers.up(home, s3_port=s3_port, mlflow_port=mlflow_port)
    # In the shell's form, to be pasted.
    for name, value in environment.items():
        print(f"export {name}={value}")


def images(
    action: Annotated[
        Literal["print", "build", "push", "digests"], typer.Argument(help="what to do with them")
    ] = "print",
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
        typer.Option(
            envvar="PIP_CERT",
            exists=True,
            dir_okay=False,
            help="CA bundle for a build's downloads, for example your organisation's",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(envvar="PIP_INDEX_URL", help="package index for a build; default: PyPI", show_envvar=True),
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="folder with local wheels for a build")
    ] = None,
) -> None:
    """Print, build or push the steps' images, or print their digests as the section `images` of a config."""
    from ptl.config import image_names
    from ptl.local import images as work

    more = image_names.chosen(optional or [])
    if action == "digests":
        print(json.dumps(work.digests(registry, tag, more), indent=2))
        return
    names = image_names.names(registry, tag, optional=more)
    if action == "build":
        work.build(registry, tag, more, base_image=base_image, cpu=cpu, ca=ca, index=index, wheels=wheels)
    elif action == "push":
        work.push(registry, tag, more)
    for name in names:
        print(name)
