"""The loop, unrolled: a Python loop at compile time makes one flat DAG of prune, recover and evaluate tasks."""

from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.evaluate.component import evaluate
from components.import_model.component import import_model
from components.prune.component import prune
from components.recover.component import recover
from components.report.component import report
from pipelines.prune_tune_loop import cluster
from pipelines.prune_tune_loop.compact import compact
from ptl.config import Config
from ptl.images import image


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
    structure = config.model_dump(mode="json", exclude_none=True)  # the report puts the run's own parameters over it

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
        schedule = {"target": target, "cuts": cuts, "recovery_tokens": recovery_tokens, "tokens": tokens}
        order: list[tuple[str, Any]] = []  # step names and tasks: local runners need one fixed order

        def add(name: str, task: Any) -> Any:
            if order:
                task.after(order[-1][1])
            order.append((name, task.set_display_name(name)))
            return _on_cluster(task, name, config)

        def add_evaluate(name: str, arm: str, iteration: int, candidate: Any, fallback: Any) -> Any:
            task = evaluate(
                step=name,
                arm=arm,
                iteration=iteration,
                experiment=experiment,
                target=target,
                evaluate=evaluate_settings,
                gate=gate,
                seed=seed,
                registered_model=registered_model,
                model=candidate,
                fallback=fallback,
            )
            return add(name, task).outputs["accepted"]

        def add_round(suffix: str, arm: str, iteration: int, iterations: int, start: Any) -> Any:
            """Prune, recover and evaluate; returns the checkpoint that goes on."""
            where = {
                "arm": arm,
                "iteration": iteration,
                "iterations": iterations,
                "experiment": experiment,
                "seed": seed,
            }
            name = _name("prune", arm, suffix)
            cut = add(
                name,
                prune(step=name, model=start, prune=prune_settings, calibration=calibration, **where, **schedule),
            )
            name = _name("recover", arm, suffix)
            healed = add(
                name,
                recover(
                    step=name,
                    model=cut.outputs["out"],
                    recover=recover_settings,
                    training=training,
                    **where,
                    **schedule,
                ),
            )
            name = _name("evaluate", arm, suffix)
            return add_evaluate(name, arm, iteration, healed.outputs["out"], start)

        dense = add(
            "import-model",
            import_model(
                step="import-model",
                experiment=experiment,
                model=model,
                revision=revision,
                prune=prune_settings,
                calibration=calibration,
                training=training,
                evaluate=evaluate_settings,
                iterations=config.schedule.iterations,
                **schedule,
            ),
        ).outputs["out"]
        accepted = add_evaluate("evaluate-0", "loop", 0, dense, dense)
        baseline = accepted
        for iteration in range(1, config.schedule.iterations + 1):
            accepted = add_round(str(iteration), "loop", iteration, config.schedule.iterations, accepted)
        if config.control:
            add_round("", "control", 1, 1, baseline)
        add(
            "report",
            report(
                step="report",
                experiment=experiment,
                names=[name for name, _ in order],
                settings=structure,
                model=model,
                revision=revision,
                seed=seed,
                prune=prune_settings,
                calibration=calibration,
                recover=recover_settings,
                training=training,
                evaluate=evaluate_settings,
                gate=gate,
                registered_model=registered_model,
                final=accepted,
                **schedule,
            ),
        )

    return prune_tune_loop


def compile_pipeline(config: Config, path: Path) -> None:
    """Write the compiled YAML; the same config gives the same bytes."""
    compiler.Compiler().compile(build(config), str(path))
    compact(path)


def _name(stage: str, arm: str, suffix: str) -> str:
    return f"{stage}-{suffix}" if arm == "loop" else f"control-{stage}"


def _on_cluster(task: Any, name: str, config: Config) -> Any:
    """Image and cluster settings of a task; local runners ignore all but the image."""
    stage = next(stage for stage in ("import-model", "prune", "recover", "evaluate", "report") if stage in name)
    task.set_container_image(image(stage, config.images.registry, config.images.tag))
    return cluster.configure(task, stage, config)
