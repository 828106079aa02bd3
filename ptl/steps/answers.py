"""The answers step: the dense model answers prompts of the training data, for the run's calibration and recoveries.

They find its record by the run, as they find the benchmarks' items: an edge from it to each would say nothing. With
`training.refresh: each` the model that a later iteration starts from answers anew, for that iteration alone.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ptl.config.chat import Chat
from ptl.config.dag import ANSWERS, answers_step
from ptl.config.data import TrainingData
from ptl.config.run import Calibration, Evaluate, unfit_answers
from ptl.errors import InputError
from ptl.log import say
from ptl.steps.call import Call, Metadata
from ptl.steps.step import Step
from ptl.storage.store import Record


def answers(call: Call) -> None:
    """Write the answers, unless an earlier run has."""
    if call.stopped:
        return call.pass_through()
    evaluate = call.section(Evaluate, "evaluate")
    training = call.section(TrainingData, "training")
    # Those of the iteration before, which stay where there are no better ones.
    before = [answers_step(call.iteration - 1, training)] if call.iteration else []
    key = {
        "training": training,
        "chat": call.section(Chat, "chat"),
        "backend": evaluate.backend,
        "max_length": evaluate.max_length,
        "seed": call.settings["seed"],
    }
    with Step(call, key=key, reads=before) as step:
        earlier = step.committed(before[0]) if before else None
        record = step.record or step.publish(_written(step, evaluate, earlier))
        shown = {name: record.metadata[name] for name in ("written", "ended", "kept", "answer_tokens")}
        call.outputs["metrics"].metadata.update(shown)
    return None


def _written(step: Step, evaluate: Evaluate, earlier: Record | None) -> Metadata:
    """Write the answers of the model to the step's folder; `earlier` are those of the iteration before."""
    from ptl.recovery.answers import FILE, AnswersReport, write_answers

    folder = step.fetch(earlier.pointer) if earlier else None
    model, settings = step.call.inputs["model"], step.settings
    # After a rejection.
    if earlier and folder and earlier.pointer.parent_digest == model.digest:
        say(step.call.step, f"the same model as in {earlier.step}: its answers are taken")
        shutil.copyfile(folder / FILE, step.folder / FILE)
        return {field.name: earlier.metadata[field.name] for field in dataclasses.fields(AnswersReport)}
    report = write_answers(
        step.fetch_model(),
        step.folder,
        settings["training"],
        evaluate,
        settings["chat"],
        model=model.digest,
        seed=settings["seed"],
        earlier=folder,
        step=step.call.step,
    )
    return dataclasses.asdict(report)


def check_structure(
    calibration: Calibration, training: TrainingData, chat: Chat, compiled: bool, refreshed: bool
) -> None:
    """Raise InputError where run parameters ask for own answers and no step writes them, or do not fit each other.

    `compiled` and `refreshed` are for which `training.answers` and `training.refresh` there are steps.
    """
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
    if (training.refresh == "each") != refreshed:
        raise InputError(
            f"{training.refresh}, but this pipeline was compiled for {'each' if refreshed else 'once'}",
            field="training.refresh",
            remedy="set training.refresh in the config, and compile and submit it again",
        )


def reads(call: Call, section: TrainingData | Calibration) -> list[str]:
    """The records that a step depends on for this section."""
    return [_read_by(call)] if section.answers == "self" else []


def _read_by(call: Call) -> str:
    """The step whose answers this one reads: the control and exports, which know no more, the dense model's."""
    return answers_step(call.iteration, call.section(TrainingData, "training")) if call.iteration > 1 else ANSWERS


def folder(step: Step) -> Path:
    """Where the answers that a step reads are, verified."""
    return step.fetch(step.committed(_read_by(step.call)).pointer)


def calibration(step: Step, settings: Calibration, chat: Chat) -> Calibration:
    """The section with the text that is scored on: where it says so, the answers."""
    if settings.answers == "given":
        return settings
    from ptl.recovery.answers import in_place_of

    return settings.model_copy(update={"data": in_place_of(settings.data, folder(step), chat)})
