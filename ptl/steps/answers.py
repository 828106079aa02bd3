"""The answers step: the dense model answers prompts of the training data, for the run's calibration and recoveries.

They find its record by the run, as they find the benchmarks' items: an edge from it to each would say nothing.
"""

from __future__ import annotations

from pathlib import Path

from ptl.config.chat import Chat
from ptl.config.dag import ANSWERS
from ptl.config.data import TrainingData
from ptl.config.run import Calibration, Evaluate
from ptl.steps.call import Call, Metadata
from ptl.steps.step import Step


def answers(call: Call) -> None:
    """Write the answers, unless an earlier run has."""
    evaluate = call.section(Evaluate, "evaluate")
    training = call.section(TrainingData, "training")
    key = {
        "training": training,
        "chat": call.section(Chat, "chat"),
        "backend": evaluate.backend,
        "max_length": evaluate.max_length,
        "seed": call.settings["seed"],
    }
    with Step(call, key=key) as step:
        record = step.record or step.publish(_written(step, evaluate))
        shown = {
            name: record.metadata[name] for name in ("written", "ended", "kept", "answer_tokens")
        }
        call.outputs["metrics"].metadata.update(shown)


def _written(step: Step, evaluate: Evaluate) -> Metadata:
    """Write the answers of the model to the step's folder."""
    from ptl.recovery.answers import write_answers

    settings, source = step.settings, step.fetch_model()
    arguments = (settings["training"], evaluate, settings["chat"])
    named = {"model": step.call.inputs["model"].digest, "seed": settings["seed"]}
    return step.once(
        step.key.digest, lambda folder: write_answers(source, folder, *arguments, **named)
    )


def reads(section: TrainingData | Calibration) -> list[str]:
    """The records that a step depends on for this section."""
    return [ANSWERS] if section.answers == "self" else []


def folder(step: Step) -> Path:
    """Where the answers that a step reads are, verified."""
    return step.fetch(step.committed(ANSWERS).pointer)


def calibration(step: Step, settings: Calibration, chat: Chat) -> Calibration:
    """The section with the text that is scored on: where it says so, the answers."""
    if settings.answers == "given":
        return settings
    from ptl.recovery.answers import in_place_of

    return settings.model_copy(update={"data": in_place_of(settings.data, folder(step), chat)})
