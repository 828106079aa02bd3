"""Prune: remove this iteration's share of the neurons or layers that are redundant on the calibration text."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def prune(
    step: str,
    arm: str,
    iteration: int,
    experiment: str,
    iterations: int,
    target: float,
    cuts: str,
    recovery_tokens: int,
    tokens: str,
    prune: dict,
    calibration: dict,
    seed: int,
    model: dsl.Input[dsl.Model],
    out: dsl.Output[dsl.Model],
):
    from ptl import steps

    steps.prune(
        step,
        arm,
        iteration,
        experiment,
        model,
        out,
        schedule={
            "iterations": iterations,
            "target": target,
            "cuts": cuts,
            "recovery_tokens": recovery_tokens,
            "tokens": tokens,
        },
        prune=prune,
        calibration=calibration,
        seed=seed,
    )
