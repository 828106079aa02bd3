"""Import: the dense model and the run's inputs are checked, and the model is published once."""

from kfp.dsl import Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def import_model(
    step: str,
    experiment: str,
    run_name: str,
    earlier_runs: str,
    model: str,
    revision: str,
    settings: dict,
    target: float,
    cuts: str,
    recovery_tokens: int,
    tokens: str,
    prune: dict,
    chat: dict,
    calibration: dict,
    training: dict,
    recover: list,
    evaluate: dict,
    gate: dict,
    seed: int,
    gated: bool,
    answered: bool,
    registered_model: str,
    out: Output[Model],
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["out"])
