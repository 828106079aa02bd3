"""Recover: train the cut model on this iteration's tokens."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def recover(
    step: str,
    arm: str,
    iteration: int,
    experiment: str,
    iterations: int,
    target: float,
    cuts: str,
    recovery_tokens: int,
    tokens: str,
    recover: list,
    training: dict,
    seed: int,
    model: dsl.Input[dsl.Model],
    out: dsl.Output[dsl.Model],
):
    from ptl import steps

    steps.recover(
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
        recover=recover,
        training=training,
        seed=seed,
    )
