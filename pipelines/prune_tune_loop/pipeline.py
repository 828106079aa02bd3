"""The loop, unrolled: a Python loop at compile time makes one flat DAG of prune, recover and evaluate tasks."""

from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.doctor.component import doctor
from components.evaluate.component import evaluate
from components.import_model.component import import_model
from components.prune.component import prune
from components.recover.component import recover
from components.report.component import report
from pipelines.prune_tune_loop import cluster
from pipelines.prune_tune_loop.compact import compact
from ptl import dag
from ptl.config import Config, essentials
from ptl.image_names import image


def parameters(config: Config) -> dict[str, Any]:
    """The run's parameters: what the Kubeflow form shows, with the config's values as defaults.

    Structure (number of iterations, control arm, images) is not among them: it is in the DAG.
    """
    data = essentials(config)
    return {
        "model": data["model"]["path"],
        "revision": config.model.revision or "",
        "target": config.schedule.target,
        "recovery_tokens": config.schedule.recovery_tokens,
        "seed": config.seed,
        "cuts": config.schedule.cuts,
        "tokens": config.schedule.tokens,
        "prune_settings": data.get("prune", {}),
        "calibration": data["calibration"],
        "recover_settings": data["recover"],
        "training": data["training"],
        "evaluate_settings": data["evaluate"],
        "gate": data.get("gate", {}),
        "experiment": config.storage.experiment,
        "registered_model": config.storage.registered_model or config.name,
    }


def build(config: Config) -> Any:
    """The pipeline of a config: import, baseline, the loop, its control, the report."""
    defaults = parameters(config)

    @dsl.pipeline(name=config.name, description="Prune-Tune Loop: prune, recover and evaluate, a little at a time")
    def prune_tune_loop(
        model: str = defaults["model"],
        revision: str = defaults["revision"],
        target: float = defaults["target"],
        recovery_tokens: int = defaults["recovery_tokens"],
        seed: int = defaults["seed"],
        cuts: str = defaults["cuts"],
        tokens: str = defaults["tokens"],
        prune_settings: dict = defaults["prune_settings"],
        calibration: dict = defaults["calibration"],
        recover_settings: list = defaults["recover_settings"],
        training: dict = defaults["training"],
        evaluate_settings: dict = defaults["evaluate_settings"],
        gate: dict = defaults["gate"],
        experiment: str = defaults["experiment"],
        registered_model: str = defaults["registered_model"],
    ) -> None:
        given = locals()
        _unroll(config, {name: given[name] for name in defaults})

    return prune_tune_loop


def compile_pipeline(config: Config, path: Path) -> None:
    """Write the compiled YAML; the same config gives the same bytes."""
    compiler.Compiler().compile(build(config), str(path))
    compact(path)


COMPONENTS = {
    "doctor": doctor,
    "import": import_model,
    "prune": prune,
    "recover": recover,
    "evaluate": evaluate,
    "report": report,
}
KINDS = {"import": "import-model", "doctor": "prune"}  # the doctor looks where prune will run
STRUCTURE = ("name", "schedule", "control", "resources", "images", "storage")
# Run parameters that each stage takes; `<stage>_settings` arrives at the component as `<stage>`.
TAKES = {
    "doctor": (),
    "import": (
        *("model", "revision", "target", "cuts", "recovery_tokens", "tokens"),
        *("prune_settings", "calibration", "training", "evaluate_settings", "gate"),
    ),
    "prune": ("target", "cuts", "prune_settings", "calibration", "seed"),
    "recover": ("recovery_tokens", "tokens", "recover_settings", "training", "seed"),
    "evaluate": ("target", "prune_settings", "evaluate_settings", "gate", "seed", "registered_model"),
}


def _unroll(config: Config, given: dict[str, Any]) -> None:
    """A task for every step of the DAG; `given` are the run's parameters as KFP's placeholders."""
    tasks: dict[str, Any] = {}
    for node in dag.nodes(config):
        stage = dag.stage_of(node.name)
        artifacts = {name: tasks[source.step].outputs[source.output] for name, source in node.inputs.items()}
        takes = TAKES.get(stage, tuple(name for name in given if name != "experiment"))
        parameters = {name.removesuffix("_settings"): given[name] for name in takes}
        fixed = {"step": node.name, "experiment": given["experiment"], **_structure(config, node.name)}
        task = COMPONENTS[stage](**fixed, **parameters, **artifacts).set_display_name(node.name)
        task.after(*(tasks[name] for name in node.after))
        kind = KINDS.get(stage, stage)
        vllm = stage == "evaluate" and config.evaluate.backend == "vllm"
        task.set_container_image(image("evaluate-vllm" if vllm else kind, config.images.registry, config.images.tag))
        tasks[node.name] = cluster.configure(task, kind, config)


def _structure(config: Config, step: str) -> dict[str, Any]:
    """What a step gets that is the same in every run of the compiled pipeline."""
    stage, iterations = dag.stage_of(step), config.schedule.iterations
    if stage == "doctor":
        return {"settings": essentials(config)}
    if stage == "report":  # it puts the run's parameters over them
        whole = essentials(config) | {"schedule": {"iterations": iterations}}
        return {"settings": {name: value for name, value in whole.items() if name in STRUCTURE}}
    if stage == "import":
        # The run's name is not part of the step's key: the same run under another name is the same run.
        return {"iterations": iterations, "gated": config.gate.enabled, "run_name": dsl.PIPELINE_JOB_NAME_PLACEHOLDER}
    return {"iterations": iterations if dag.arm_of(step) == "loop" else 1}
