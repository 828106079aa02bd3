"""A run's config as it travels: what a compiled pipeline fixes, and the run parameters, which a user may change."""

from __future__ import annotations

from typing import Any

from ptl.config.rehearsal import is_rehearsal
from ptl.config.run import Config, check, essentials
from ptl.config.schedule import MemoryGoal
from ptl.errors import InputError

Settings = dict[str, Any]  # JSON, by the names of a component's inputs

STRUCTURE = ("name", "control", "export", "resources", "images", "storage")
SECTIONS = ("seed", "prune", "chat", "calibration", "recover", "training", "evaluate", "gate")
# Of the schedule, what may be among a step's settings: prune has the sizes, recover the tokens, import all of it.
SCHEDULE = ("iterations", "target", "cuts", "recovery_tokens", "tokens")


def parameters(config: Config) -> dict[str, Any]:
    """The run parameters, which Kubeflow's form shows, with the config's values as defaults.

    Structure (number of iterations, control arm, images) is not among them: it is in the DAG.
    """
    settings = essentials(config)
    schedule = config.schedule
    assert not isinstance(schedule.target, MemoryGoal), (
        "ptl/preflight/target.py makes a number of a memory"
    )
    experiment = config.storage.experiment
    registered_model = config.storage.registered_model or config.name
    return {
        "model": settings["model"]["path"],
        "revision": config.model.revision or "",
        "target": schedule.target,
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
        "experiment": experiment,
        # Models of a rehearsal are of no use to anybody; the empty name registers none.
        "registered_model": "" if is_rehearsal(config.name, experiment) else registered_model,
        # ids of unfinished runs whose steps may be taken over; part of no step's key
        "earlier_runs": "",
    }


def structure(config: Config) -> Settings:
    """What is the same in every run of a compiled pipeline, for `run_config`."""
    fixed = {name: value for name, value in essentials(config).items() if name in STRUCTURE}
    return fixed | {"schedule": {"iterations": config.schedule.iterations}}


def by_input(values: dict[str, Any]) -> Settings:
    """Run parameters by the names of the components' inputs: `prune_settings` is the input `prune`."""
    return {name.removesuffix("_settings"): value for name, value in values.items()}


def schedule_settings(settings: Settings) -> Settings:
    """Return the schedule's fields among a step's settings."""
    return {name: settings[name] for name in SCHEDULE if name in settings}


def run_config(settings: Settings) -> Config:
    """The config of a run: the structure in `settings.settings`, with the run's parameters. Raises InputError."""
    fixed = settings["settings"]
    return check(
        Config,
        {
            **fixed,
            **{section: settings[section] for section in SECTIONS},
            "model": {"path": settings["model"], "revision": settings["revision"] or None},
            "schedule": fixed["schedule"] | schedule_settings(settings),
            "storage": fixed.get("storage", {})
            | {"registered_model": settings["registered_model"] or None},
        },
        "run parameters",
    )


def check_compiled(config: Config, gated: bool, answered: bool) -> None:
    """Raise InputError where a run's parameters ask for other steps, or another order, than were compiled.

    `gated`: whether the steps wait for the gate; `answered`: whether one writes own answers.
    """
    enabled, answers = config.gate.enabled, config.training.answers
    for field, value, is_compiled in (
        ("gate.enabled", str(enabled).lower(), enabled == gated),
        ("training.answers", answers, (answers == "self") == answered),
    ):
        if not is_compiled:
            raise InputError(
                f"{value}, but this pipeline was compiled with another value, which decides its steps and their order",
                field=field,
                remedy=f"set it in the config (or --set {field}={value}), and compile and submit it again",
            )
