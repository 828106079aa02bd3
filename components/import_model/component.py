"""Import: the dense model and the run's inputs are checked, and the model is published once."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def import_model(
    step: str,
    experiment: str,
    model: str,
    revision: str,
    iterations: int,
    target: float,
    cuts: str,
    recovery_tokens: int,
    tokens: str,
    prune: dict,
    calibration: dict,
    training: dict,
    evaluate: dict,
    out: dsl.Output[dsl.Model],
):
    from ptl import steps

    steps.import_model(
        step,
        experiment,
        out,
        model=model,
        revision=revision,
        schedule={
            "iterations": iterations,
            "target": target,
            "cuts": cuts,
            "recovery_tokens": recovery_tokens,
            "tokens": tokens,
        },
        prune=prune,
        calibration=calibration,
        training=training,
        evaluate=evaluate,
    )
