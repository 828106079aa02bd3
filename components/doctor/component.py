"""Doctor: try out MLflow, the store and the accelerators before anything expensive; an optional first step."""

from kfp.dsl import component


@component(base_image="python:3.11", install_kfp_package=False)
def doctor(step: str, experiment: str, settings: dict) -> None:
    from ptl.steps.supervisor import run

    run(locals())
