"""The steps of a pipeline by their stage. Each function is all that a component does.

A step's module has the settings that it checks and its work; what all steps do with the store and with MLflow is in
ptl.steps.step. Settings arrive as the component's parameters and are checked again in the step.
"""

from __future__ import annotations

from collections.abc import Callable

from ptl.steps.answers import answers
from ptl.steps.call import Call
from ptl.steps.evaluate import evaluate
from ptl.steps.export import export
from ptl.steps.import_model import import_model
from ptl.steps.prune import prune
from ptl.steps.recover import recover
from ptl.steps.report import report


def doctor(call: Call) -> None:
    """Try out MLflow, the store and the accelerators. Raises InputError that names every fault."""
    from ptl.preflight.doctor_cluster import task

    task(call.settings["settings"], call.experiment)


STEPS: dict[str, Callable[[Call], None]] = {
    "doctor": doctor,
    "import": import_model,
    "answers": answers,
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "export": export,
    "report": report,
}
