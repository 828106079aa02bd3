"""One of the processes that train together; launch.py starts it, tells it its job and reads its report."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from ptl.config import Recovery, TrainingData
from ptl.errors import PtlError
from ptl.job import RecoveryJob, StageBudget
from ptl.launch import METRICS
from ptl.preempt import Vault
from ptl.processes import die_with_tied
from ptl.recover import RECOVERIES


def main(question: Path) -> None:
    """The body of one training process."""
    die_with_tied()
    told = json.loads(question.read_text())
    (settings,) = Recovery(stages=[told["settings"]]).stages
    job = RecoveryJob(
        TrainingData(**told["data"]),
        StageBudget(**told["this"] | {name: tuple(told["this"][name]) for name in ("earlier", "weights")}),
        Path(told["scratch"]),
        lambda metrics, step: print(f"{METRICS}{json.dumps([metrics, step])}", flush=True),
        teacher=Path(told["teacher"]) if told["teacher"] else None,
        vault=Vault(**told["vault"]) if told["vault"] else None,
        scored=Path(told["scored"]) if told["scored"] else None,
        keep_optimizer_state=told["keep_optimizer_state"],
    )
    try:
        report = RECOVERIES[settings.method](Path(told["src"]), Path(told["dst"]), settings, job)
    except PtlError as error:
        if os.environ.get("RANK", "0") == "0":
            raised = {"message": str(error), "exit_code": error.exit_code}
            (job.scratch / "error.json").write_text(json.dumps(raised))
        raise
    if os.environ.get("RANK", "0") == "0":
        Path(told["answer"]).write_text(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
