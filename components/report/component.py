"""Report: the lineage of the run as one HTML page, one Markdown table and the final checkpoint's model card."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def report(
    step: str,
    experiment: str,
    names: list,
    settings: dict,
    registered_model: str,
    model: dsl.Input[dsl.Model],
    html: dsl.Output[dsl.HTML],
    markdown: dsl.Output[dsl.Markdown],
):
    from ptl import steps

    steps.report(
        step,
        experiment,
        names,
        settings,
        model,
        html,
        markdown,
        registered_model=registered_model,
    )
