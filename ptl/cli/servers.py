"""Servers on this machine: `ptl up` and `ptl down` for S3 and MLflow, `ptl ui` for the runs of a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from ptl import extras, processes
from ptl.cli.options import HOME, Home


def ui(
    home: Home = HOME,
    port: Annotated[int, typer.Option(help="port on loopback")] = 5000,
) -> None:
    """Browse the runs of this folder in MLflow; serves until you press Ctrl-C."""
    from ptl.local import servers

    # MLflow's server would end with a traceback of its own.
    extras.need("flask", "ui")
    servers.ui(home.absolute(), port)


def up(
    home: Home = HOME,
    s3_port: Annotated[int, typer.Option(help="port of SeaweedFS; it also uses the next three")] = 8433,
    mlflow_port: Annotated[int, typer.Option(help="port of MLflow")] = 15000,
    backend_store_uri: Annotated[str | None, typer.Option(help="MLflow's database; default: sqlite")] = None,
) -> None:
    """Start a real S3 and a real MLflow server on loopback, and print the environment variables to use them."""
    from ptl.local import servers

    extras.need("flask", "up")
    with processes.interruptible(
        "run the same command again to start what is missing; `ptl down` stops what was started"
    ):
        environment = servers.up(
            home.absolute(),
            s3_port=s3_port,
            mlflow_port=mlflow_port,
            backend_store_uri=backend_store_uri,
        )
    # In the shell's form, to be pasted.
    for name, value in environment.items():
        print(f"export {name}={value}")


def down(home: Home = HOME) -> None:
    """Stop the servers that `ptl up` started, and no others."""
    from ptl.local import servers

    stopped = servers.down(home.absolute())
    print("stopped:", ", ".join(stopped) or "nothing was running")
