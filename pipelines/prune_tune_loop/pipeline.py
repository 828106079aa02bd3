"""The loop, unrolled: a Python loop at compile time makes one flat DAG of prune, recover and evaluate tasks."""

from dataclasses import dataclass, field
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
from ptl.config import Config
from ptl.images import IMAGE_OF, image


def parameters(config: Config) -> dict[str, Any]:
    """The run's parameters: what the Kubeflow form shows, with the config's values as defaults.

    Structure (number of iterations, control arm, images) is not among them: it is in the DAG.
    """
    data = config.model_dump(mode="json", exclude_none=True)  # KFP has no null; each null is its field's default
    return {
        "model": config.model.path,
        "revision": config.model.revision or "",
        "target": config.schedule.target,
        "recovery_tokens": config.schedule.recovery_tokens,
        "seed": config.seed,
        "cuts": config.schedule.cuts,
        "tokens": config.schedule.tokens,
        "prune_settings": data["prune"],
        "calibration": data["calibration"],
        "recover_settings": data["recover"],
        "training": data["training"],
        "evaluate_settings": data["evaluate"],
        "gate": data["gate"],
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
        _unroll(_Dag(config, {name: given[name] for name in defaults}))

    return prune_tune_loop


def compile_pipeline(config: Config, path: Path) -> None:
    """Write the compiled YAML; the same config gives the same bytes."""
    compiler.Compiler().compile(build(config), str(path))
    compact(path)


@dataclass
class _Dag:
    """The DAG while it grows: its parameters as KFP's placeholders, and the tasks so far in their order."""

    config: Config
    given: dict[str, Any]
    tasks: dict[str, Any] = field(default_factory=dict)

    def pick(self, *names: str) -> dict[str, Any]:
        """Parameters for a component; `<stage>_settings` arrives there as `<stage>`."""
        return {name.removesuffix("_settings"): self.given[name] for name in names}

    def add(self, component: Any, step: str, **inputs: Any) -> Any:
        """A task after all that came before: local runners need one fixed order."""
        task = component(step=step, **self.pick("experiment"), **inputs).set_display_name(step)
        if self.tasks:
            task.after(list(self.tasks.values())[-1])
        self.tasks[step] = task
        stage = next((stage for stage in IMAGE_OF if stage in step), "prune")  # the doctor looks where prune will run
        vllm = stage == "evaluate" and self.config.evaluate.backend == "vllm"
        kind = "evaluate-vllm" if vllm else stage
        task.set_container_image(image(kind, self.config.images.registry, self.config.images.tag))
        return cluster.configure(task, stage, self.config)


SCHEDULE = ("target", "cuts", "recovery_tokens", "tokens")


def _unroll(dag: _Dag) -> None:
    """All tasks of a run."""
    iterations = dag.config.schedule.iterations
    settings = dag.pick(*SCHEDULE, "prune_settings", "calibration", "training", "evaluate_settings")
    whole = dag.config.model_dump(mode="json", exclude_none=True)
    if dag.config.resources.doctor:
        dag.add(doctor, "doctor", settings=whole)
    dense = dag.add(
        import_model, "import-model", iterations=iterations, **dag.pick("model", "revision"), **settings
    ).outputs["out"]
    baseline = _evaluate(dag, "evaluate-0", "loop", 0, iterations, dense, dense)
    accepted = baseline
    for iteration in range(1, iterations + 1):
        accepted = _round(dag, f"{{stage}}-{iteration}", "loop", iteration, iterations, accepted)
    if dag.config.control:
        _round(dag, "control-{stage}", "control", 1, 1, baseline)
    dag.add(
        report,
        "report",
        names=list(dag.tasks),
        settings=whole,  # under the run's own parameters
        final=accepted,
        **dag.pick("model", "revision", "seed", "recover_settings", "gate", "registered_model"),
        **settings,
    )


def _round(dag: _Dag, name: str, arm: str, iteration: int, iterations: int, start: Any) -> Any:
    """Prune, recover and evaluate; returns the checkpoint that goes on."""
    where = {"arm": arm, "iteration": iteration, "iterations": iterations, **dag.pick("seed", *SCHEDULE)}
    settings = dag.pick("prune_settings", "calibration")
    cut = dag.add(prune, name.format(stage="prune"), model=start, **settings, **where)
    settings = dag.pick("recover_settings", "training")
    healed = dag.add(recover, name.format(stage="recover"), model=cut.outputs["out"], **settings, **where)
    return _evaluate(dag, name.format(stage="evaluate"), arm, iteration, iterations, healed.outputs["out"], start)


def _evaluate(dag: _Dag, name: str, arm: str, iteration: int, iterations: int, candidate: Any, fallback: Any) -> Any:
    """Score a candidate; returns the checkpoint that the gate lets go on, it or the fallback."""
    where = {"arm": arm, "iteration": iteration, "iterations": iterations}
    settings = dag.pick("target", "prune_settings", "evaluate_settings", "gate", "seed", "registered_model")
    task = dag.add(evaluate, name, model=candidate, fallback=fallback, **where, **settings)
    return task.outputs["accepted"]
