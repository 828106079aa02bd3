"""Report: the lineage of the run as one HTML page, one Markdown table and the final checkpoint's model card."""

from kfp.dsl import HTML, Input, Markdown, Model, Output, component


@component(base_image="python:3.11", install_kfp_package=False)
def report(
    step: str,
    experiment: str,
    settings: dict,
    model: str,
    revision: str,
    target: float,
    recovery_tokens: int,
    seed: int,
    cuts: str,
    tokens: str,
    prune: dict,
    chat: dict,
    calibration: dict,
    recover: list,
    training: dict,
    evaluate: dict,
    gate: dict,
    registered_model: str,
    final: Input[Model],
    html: Output[HTML],
    markdown: Output[Markdown],
    control: Input[Model] = None,
) -> None:
    from ptl.steps.supervisor import run

    run(locals(), outputs=["html", "markdown"])
