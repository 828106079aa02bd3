"""Run the compiled YAML on one machine, task after task, as the cluster would."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from ptl.errors import WorkError


def run_subprocess(pipeline: Path, root: Path, environment: dict[str, str], arguments: dict[str, Any]) -> None:
    """Execute every task in a process of this machine's Python. Raises WorkError when a task fails."""
    from kfp import local

    warnings.filterwarnings("ignore", message="You may be attemping to run a task")  # images play no part here
    os.environ.update(environment)
    _execute(local.SubprocessRunner(use_venv=False), pipeline, root, arguments)


def _execute(runner: Any, pipeline: Path, root: Path, arguments: dict[str, Any]) -> None:
    from kfp import components, local

    # Finished steps are taken from the store's records, which also hold on a cluster, so KFP's own cache stays off.
    local.init(runner, pipeline_root=str(root), enable_caching=False)
    logging.getLogger().setLevel(logging.WARNING)
    try:
        components.load_component_from_file(str(pipeline))(**arguments)
    except RuntimeError as error:
        raise WorkError(f"the pipeline failed: {error}") from error


RUNNERS = {"subprocess": run_subprocess}
