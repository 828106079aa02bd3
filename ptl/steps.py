"""The steps of a pipeline by their stage. Each function is all that a component does.

A step's module has the settings that it checks and its work; what all steps do with the store and with MLflow is in
ptl.execution. Settings arrive as the component's parameters and are checked again in the step.
"""

from __future__ import annotations

from collections.abc import Callable

from ptl.call import Call
from ptl.step_doctor import doctor
from ptl.step_evaluate import evaluate
from ptl.step_import_model import import_model
from ptl.step_prune import prune
from ptl.step_recover import recover
from ptl.step_report import report

STEPS: dict[str, Callable[[Call], None]] = {
    "doctor": doctor,
    "import": import_model,
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "report": report,
}
