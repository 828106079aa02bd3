"""Export: the final checkpoint in a form for another runtime, scored beside the same form of the dense model."""

from kfp.dsl import Input, Metrics, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def export(
    step: str,
    experiment: str,
    iterations: int,
    export: dict,
    chat: dict,
    calibration: dict,
    evaluate: dict,
    gate: dict,
    seed: int,
    model: Input[Model],
    dense: Input[Model],
    out: Output[Model],
    metrics: Output[Metrics],
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["out", "metrics"])
