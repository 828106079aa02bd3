"""Answers: a model answers prompts of the training data, which pruning and recoveries then read."""

from kfp.dsl import Input, Metrics, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def answers(
    step: str,
    experiment: str,
    chat: dict,
    training: dict,
    evaluate: dict,
    seed: int,
    model: Input[Model],
    metrics: Output[Metrics],
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["metrics"])
