"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str], typer.Option("--set", help="override a field: --set schedule.target=0.3")]
Home = Annotated[Path, typer.Option("--home", help="where local runs, checkpoints and MLflow's database are")]
Servers = Annotated[bool, typer.Option("--s3", help="the runs of `ptl run --s3`: `ptl up`'s servers")]
