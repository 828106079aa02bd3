"""`ptl up`: servers on this machine, for S3 and MLflow, or for a look at the runs of a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from ptl import extras, processes
from ptl.cli.options import HOME, Home
from ptl.errors import InputError


def up(
    home: Home = HOME,
    s3_port: Annotated[int, typer.Option(help="port of SeaweedFS; it also uses the next three")] = 8433,
    mlflow_port: Annotated[int | None, typer.Option(help="port of MLflow; default: 15000, or 5000 with --ui")] = None,
    backend_store_uri: Annotated[str | None, typer.Option(help="MLflow's database; default: sqlite")] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="instead, browse runs made without --s3 in MLflow, until you press Ctrl-C")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="stop what an earlier `ptl up` has started")] = False,
) -> None:
    """Start a real S3 and a real MLflow server on loopback, and print the environment variables to use them."""
    from ptl.local import servers

    home = home.absolute()
    if ui and stop:
        raise InputError("they exclude each other", field="--ui and --stop", remedy="end --ui by Ctrl-C")
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
        environment = servers.up(
            home, s3_port=s3_port, mlflow_port=mlflow_port or servers.MLFLOW_PORT, backend_store_uri=backend_store_uri
        )
    # In the shell's form, to be pasted.
    for name, value in environment.items():
        print(f"export {name}={value}")
