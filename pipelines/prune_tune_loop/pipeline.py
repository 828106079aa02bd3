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
from pipelines.prune_tune_loop import cluster
from pipelines.prune_tune_loop.compact import compact
from ptl.config import dag
from ptl.config.run import Config, essentials
from ptl.config.schedule import BY_GOAL, MemoryGoal


def parameters(config: Config) -> dict[str, Any]:
    """The run parameters, which Kubeflow's form shows, with the config's values as defaults.

    Structure (number of iterations, control arm, images) is not among them: it is in the DAG.
    """
    settings = essentials(config)
    schedule = config.schedule
    return {
        "model": settings["model"]["path"],
        "revision": config.model.revision or "",
        "target": BY_GOAL if isinstance(schedule.target, MemoryGoal) else schedule.target,
        "goal": settings["schedule"]["target"] if isinstance(schedule.target, MemoryGoal) else {},
        "recovery_tokens": schedule.recovery_tokens,
        "seed": config.seed,
        "cuts": schedule.cuts,
        "tokens": schedule.tokens,
        "prune_settings": settings.get("prune", {}),
        "chat": settings.get("chat", {}),
        "calibration": settings["calibration"],
        "recover_settings": settings["recover"],
        "training": settings["training"],
        "evaluate_settings": settings["evaluate"],
        "gate": settings.get("gate", {}),
        "experiment": config.storage.experiment,
        "registered_model": config.storage.registered_model or config.name,
        "earlier_runs": "",  # ids of unfinished runs whose steps may be taken over; part of no step's key
    }


def build(config: Config) -> Any:
    """The pipeline of a config: import, baseline, the loop, its control, the report."""
    defaults = parameters(config)

    def prune_tune_loop(*placeholders: Any) -> None:
        _unroll(config, dict(zip(defaults, placeholders, strict=True)))

    # KFP reads the run parameters from a function's signature.
    fields = []
    for name, value in defaults.items():
        kind = float if name == "target" else type(value)
        fields.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value, annotation=kind))
    prune_tune_loop.__signature__ = Signature(fields)  # type: ignore[attr-defined]
    description = "Prune-Tune Loop: prune, recover and evaluate, a little at a time"
    return dsl.pipeline(name=config.name, description=description)(prune_tune_loop)


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
STRUCTURE = ("name", "schedule", "control", "export", "resources", "images", "storage")


def _unroll(config: Config, placeholders: dict[str, Any]) -> None:
    """A task for every step of the DAG; `placeholders` are KFP's for the run parameters.

    A component takes those that it has an input for; `prune_settings` is its input `prune`.
    """
    tasks: dict[str, Any] = {}
    for node in dag.nodes(config):
        stage = dag.stage_of(node.name)
        component = COMPONENTS[stage]
        # What is fixed in the compiled pipeline, then what the user may change for a run, then outputs of other steps.
        arguments = {"step": node.name, **_structure(config, node.name)}
        for name, placeholder in placeholders.items():
            argument = name.removesuffix("_settings")
            if argument in component.component_spec.inputs:
                arguments[argument] = placeholder
        for name, source in node.inputs.items():
            arguments[name] = tasks[source.step].outputs[source.output]
        task = component(**arguments)
        task.set_display_name(node.name)
        # Dependencies without data; those with data follow from the arguments.
        task.after(*(tasks[name] for name in node.after))
        task.set_container_image(_image(config, node.name))
        tasks[node.name] = cluster.configure(task, dag.kind_of(node.name), config)


def _image(config: Config, step: str) -> str:
    kind = dag.kind_of(step)
    # vLLM pins another torch, hence an image of its own.
    if kind == "evaluate" and config.evaluate.backend == "vllm":
        kind = "evaluate-vllm"
    return config.images.of(kind)


def _structure(config: Config, step: str) -> dict[str, Any]:
    """What a step gets that is the same in every run of the compiled pipeline."""
    stage = dag.stage_of(step)
    iterations = config.schedule.iterations
    settings = essentials(config)
    if stage == "doctor":
        return {"settings": settings}
    if stage == "report":
        settings["schedule"] = {"iterations": iterations}  # it adds the run parameters
        return {"settings": {name: value for name, value in settings.items() if name in STRUCTURE}}
    if stage == "export":
        made = next(export for export in config.export if dag.export_step(export) == step)
        # It looks for the evaluation that scored the final model.
        return {"iterations": iterations, "export": made.model_dump(exclude_none=True)}
    if stage == "import":
        return {
            "iterations": iterations,
            "exports": [export.model_dump(exclude_none=True) for export in config.export],
            "gated": config.gate.enabled,
            "answered": config.training.answers == "self",
            # Not part of the step's key: the same run under another name is the same run.
            "run_name": dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
        }
    if stage == "answers":
        return {}
    # The control prunes at once what the loop prunes in many iterations.
    return {"iterations": iterations if dag.arm_of(step) == "loop" else 1}
