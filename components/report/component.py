"""Report: the lineage of the run as one HTML page, one Markdown table and the final checkpoint's model card."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def report(
    step: str,
    experiment: str,
    names: list,
    settings: dict,
    model: str,
    revision: str,
    target: float,
    recovery_tokens: int,
    seed: int,
    cuts: str,
    tokens: str,
    prune: dict,
    calibration: dict,
    recover: list,
    training: dict,
    evaluate: dict,
    gate: dict,
    registered_model: str,
    final: dsl.Input[dsl.Model],
    html: dsl.Output[dsl.HTML],
    markdown: dsl.Output[dsl.Markdown],
):
    from ptl import steps

    steps.report(
        step,
        experiment,
        names,
        final,
        html,
        markdown,
        settings={
            **settings,
            "model": {"path": model, "revision": revision or None},
            "schedule": {
                **settings["schedule"],
                "target": target,
                "cuts": cuts,
                "recovery_tokens": recovery_tokens,
                "tokens": tokens,
            },
            "seed": seed,
            "prune": prune,
            "calibration": calibration,
            "recover": recover,
            "training": training,
            "evaluate": evaluate,
            "gate": gate,
        },
        registered_model=registered_model,
    )
