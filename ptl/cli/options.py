"""Arguments and options that several commands have, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl.cli import shipped

CONFIG_HELP = "the run's YAML file, or the name of a shipped config"
HOME = Path(".ptl")  # default of --home

# Arguments.
ConfigFile = Annotated[
    Path,
    typer.Argument(help=CONFIG_HELP, show_default=False, parser=shipped.config_file),
]
CheckpointFolder = Annotated[
    Path,
    typer.Argument(help="folder of a Hugging Face checkpoint", show_default=False),
]
TargetFolder = Annotated[
    Path,
    typer.Argument(help="folder to write; it must be empty or not exist yet", show_default=False),
]

# Options.
ConfigOption = Annotated[
    Path,
    typer.Option("--config", "-c", help=CONFIG_HELP, parser=shipped.config_file),
]
Overrides = Annotated[
    list[str],
    # The factory stands for a default in the signatures, which all calls would share.
    typer.Option("--set", help="override a field: --set schedule.target=0.3", default_factory=list, show_default=False),
]
Home = Annotated[
    Path,
    typer.Option("--home", help="where local runs, checkpoints and MLflow's database are"),
]
Runner = Annotated[
    Literal["subprocess", "docker"],
    typer.Option(help="how the steps of a local run are executed: docker runs each in its image"),
]
Servers = Annotated[
    bool,
    typer.Option("--s3", help="use the servers of `ptl up`, as `ptl run --s3` does"),
]
Rehearse = Annotated[
    bool,
    typer.Option("--rehearse", help="the same steps with about 1 % of the work: minutes, and numbers without meaning"),
]
