"""What a step uses of the machine that it runs on: folders for temporary work, and threads."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

from ptl.lineage import tracking

SMALL_MODEL = 5_000_000  # parameters below which a second thread costs more than it gives


def scratch(name: str) -> Path:
    """A folder for temporary work; with PTL_SCRATCH it survives a kill, so that training resumes from it."""
    # By the run: two runs on one machine must not share their checkpoints' folders.
    base = os.environ.get("PTL_SCRATCH") or f"{tempfile.gettempdir()}/ptl-{tracking.pipeline_run()}"
    return Path(base, name)


def empty_folder(step: str) -> Path:
    """An empty folder of this attempt alone; those of killed attempts are removed."""
    for abandoned in scratch(step).glob("out-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # A name of its own: what a killed attempt still writes does not land in it.
    folder = scratch(step) / f"out-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    return folder


def limit_threads(params: int) -> None:
    """One thread for a model of few parameters: more only wait for each other."""
    import torch

    if params < SMALL_MODEL:
        torch.set_num_threads(1)
