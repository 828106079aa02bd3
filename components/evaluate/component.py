"""Evaluate: score the checkpoint, and decide which checkpoint the next iteration starts from."""

from kfp.dsl import Input, Metrics, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def evaluate(
    step: str,
    experiment: str,
    iterations: int,
    target: float,
    prune: dict,
    chat: dict,
    evaluate: dict,
    gate: dict,
    seed: int,
    registered_model: str,
    model: Input[Model],
    accepted: Output[Model],
    metrics: Output[Metrics],
    fallback: Input[Model] = None,
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["accepted", "metrics"])
