"""The loop, unrolled: a Python loop at compile time makes one flat DAG of prune, recover and evaluate tasks."""

from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.answers.component import answers
from components.doctor.component import doctor
from components.evaluate.component import evaluate
from components.export.component import export
from components.import_model.component import import_model
from components.prune.component import prune
from components.recover.component import recover
from components.report.component import report
from pipelines.prune_tune_loop import cluster, descriptions
from pipelines.prune_tune_loop.compact import compact
from ptl.config import dag
from ptl.config.parameters import by_input, parameters, structure
from ptl.config.run import Config, essentials


def build(config: Config) -> Any:
    """The pipeline of a config: import, baseline, the loop, its control, the report."""
    defaults = parameters(config)

    def prune_tune_loop(*placeholders: Any) -> None:
        _unroll(config, dict(zip(defaults, placeholders, strict=True)))

    # KFP reads the run parameters from a function's signature.
    fields = []
    for name, value in defaults.items():
        kind = float if name == "target" else type(value)
        fields.append(
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=kind)
        )
    prune_tune_loop.__signature__ = Signature(fields)  # type: ignore[attr-defined]
    prune_tune_loop.__doc__ = descriptions.docstring(config)
    return dsl.pipeline(name=config.name, description=descriptions.summary(config))(prune_tune_loop)


def compile_pipeline(config: Config, path: Path) -> None:
    """Write the compiled YAML; the same config gives the same bytes."""
    compiler.Compiler().compile(build(config), str(path))
    compact(path)


# By stage.
COMPONENTS = {
    "doctor": doctor,
    "import": import_model,
    "answers": answers,
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "export": export,
    "report": report,
}
# KFP has no field for a step's description: each component says it with the input that names the step.
for stage, component in COMPONENTS.items():
    component.component_spec.inputs["step"].description = descriptions.STEPS[stage]


def _unroll(config: Config, placeholders: dict[str, Any]) -> None:
    """A task for every step of the DAG; `placeholders` are KFP's for the run parameters.

    A component takes those that it has an input for.
    """
    tasks: dict[str, Any] = {}
    for node in dag.nodes(config):
        stage = dag.stage_of(node.name)
        component = COMPONENTS[stage]
        # What is fixed in the compiled pipeline, then what the user may change for a run, then outputs of other steps.
        arguments = {"step": node.name, **_structure(config, node.name)}
        inputs = component.component_spec.inputs
        arguments |= {
            name: value for name, value in by_input(placeholders).items() if name in inputs
        }
        for name, source in node.inputs.items():
            arguments[name] = tasks[source.step].outputs[source.output]
        task = component(**arguments)
        task.set_display_name(node.name)
        # Dependencies without data; those with data follow from the arguments.
        task.after(*(tasks[name] for name in node.after))
        kind = dag.kind_of(node.name)
        # vLLM pins another torch, hence an image of its own.
        uses_vllm = kind == "evaluate" and config.evaluate.backend == "vllm"
        task.set_container_image(config.images.of("evaluate-vllm" if uses_vllm else kind))
        tasks[node.name] = cluster.configure(task, kind, config)


def _structure(config: Config, step: str) -> dict[str, Any]:
    """What a step gets that is the same in every run of the compiled pipeline."""
    stage = dag.stage_of(step)
    iterations = config.schedule.iterations
    if stage == "doctor":
        return {"settings": essentials(config)}
    if stage == "report":
        return {"settings": structure(config)}
    if stage == "export":
        made = next(export for export in config.export if dag.export_step(export) == step)
        # It looks for the evaluation that scored the final model.
        return {"iterations": iterations, "export": made.model_dump(exclude_none=True)}
    if stage == "import":
        return {
            "settings": structure(config),
            "gated": config.gate.enabled,
            "answered": config.training.answers == "self",
            # Not part of the step's key: the same run under another name is the same run.
            "run_name": dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        }
    if stage == "answers":
        return {}
    # The control prunes at once what the loop prunes in many iterations.
    return {"iterations": iterations if dag.arm_of(step) == "loop" else 1}
