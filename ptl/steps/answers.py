"""The answers step: the dense model answers prompts of the training data, for the run's calibration and recoveries.

They find its record by the run, as they find the benchmarks' items: an edge from it to each would say nothing.
"""

from __future__ import annotations

from pathlib import Path

from ptl.config.chat import Chat
from ptl.config.dag import ANSWERS
from ptl.config.recover import TrainingData
from ptl.config.run import Calibration, Evaluate, unfit_answers
from ptl.errors import InputError
from ptl.steps.call import Call
from ptl.steps.step import Step


def answers(call: Call) -> None:
    """Write the answers, unless an earlier run has."""
    evaluate = call.section(Evaluate, "evaluate")
    key = {
        "training": call.section(TrainingData, "training"),
        "chat": call.section(Chat, "chat"),
        "backend": evaluate.backend,
        "max_length": evaluate.max_length,
        "seed": call.settings["seed"],
    }
    with Step(call, key=key) as step:
        if step.record is None:
            from ptl.recovery.answers import write_answers

            settings = step.settings
            report = write_answers(
                step.fetch_model(),
                step.folder,
                settings["training"],
                evaluate,
                settings["chat"],
                model=call.inputs["model"].digest,
                seed=settings["seed"],
            )
            step.publish(report)
        assert step.record is not None
        shown = {name: step.record.metadata[name] for name in ("written", "ended", "kept", "answer_tokens")}
        call.outputs["metrics"].metadata.update(shown)


def check_structure(calibration: Calibration, training: TrainingData, chat: Chat, compiled: bool) -> None:
    """Raise InputError where run parameters ask for own answers and no step writes them, or do not fit each other."""
    unfit = unfit_answers(calibration, training, chat)
    if unfit:
        raise InputError(unfit, field="answers")
    if (training.answers == "self") != compiled:
        raise InputError(
            f"{training.answers}, but this pipeline was compiled with{'' if compiled else 'out'} the step that writes "
            "own answers",
            field="training.answers",
            remedy="set training.answers in the config, and compile and submit it again",
        )


def reads(*sections: TrainingData | Calibration) -> list[str]:
    """The records that a step depends on for these sections."""
    return [ANSWERS] if any(section.answers == "self" for section in sections) else []


def folder(step: Step) -> Path:
    """Where the run's answers are, verified."""
    return step.fetch(step.committed(ANSWERS).pointer)


def calibration(step: Step, settings: Calibration, chat: Chat) -> Calibration:
    """The section with the text that is scored on: where it says so, the answers."""
    if settings.answers == "given":
        return settings
    from ptl.recovery.answers import in_place_of

    return settings.model_copy(update={"data": in_place_of(settings.data, folder(step), chat)})
