"""Recover: train the pruned model on this iteration's tokens."""

from kfp.dsl import Input, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def recover(
    step: str,
    experiment: str,
    iterations: int,
    recovery_tokens: int,
    tokens: str,
    chat: dict,
    recover: list,
    training: dict,
    seed: int,
    model: Input[Model],
    out: Output[Model],
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["out"])
