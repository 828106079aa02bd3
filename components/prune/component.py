"""Prune: remove this iteration's share of what is redundant on the calibration text: widths, experts or layers."""

from kfp.dsl import Input, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def prune(
    step: str,
    experiment: str,
    iterations: int,
    target: float,
    cuts: str,
    prune: dict,
    chat: dict,
    calibration: dict,
    training: dict,
    seed: int,
    model: Input[Model],
    out: Output[Model],
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["out"])
