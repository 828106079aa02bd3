"""Evaluate: score the checkpoint, and decide which checkpoint the next iteration starts from."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def evaluate(
    step: str,
    arm: str,
    iteration: int,
    experiment: str,
    iterations: int,
    target: float,
    prune: dict,
    evaluate: dict,
    gate: dict,
    seed: int,
    registered_model: str,
    model: dsl.Input[dsl.Model],
    fallback: dsl.Input[dsl.Model],
    scores: dsl.Output[dsl.Artifact],
    accepted: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    from ptl import steps

    steps.evaluate(
        step,
        arm,
        iteration,
        experiment,
        model,
        fallback,
        scores,
        accepted,
        metrics,
        iterations=iterations,
        target=target,
        prune=prune,
        evaluate=evaluate,
        gate_settings=gate,
        seed=seed,
        registered_model=registered_model,
    )
