"""What the doctor checks of a run on this machine: packages, model and data, disk, the Docker engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ptl import address, extras
from ptl.config.export import Export
from ptl.config.image_names import with_options
from ptl.config.recover import NextToken
from ptl.config.run import Config
from ptl.config.schedule import one_shot, plan, removal
from ptl.evaluation import language_models
from ptl.preflight.doctor_tracking import tracking_uri
from ptl.preflight.finding import Finding, as_finding
from ptl.units import listed, size

OPTIMIZER_STATE = 8  # bytes a parameter: Adam's two averages in float32

MissingImages = Callable[[Sequence[str]], list[str]]  # those of the images that the local engine does not hold
# (forms of one format, the dense model if it is here): raises InputError for what cannot be made on this machine
CheckExports = Callable[[Sequence[Export], Path | None], None]


def track_as_run_does(home: Path) -> None:
    """Let this process track where `ptl run` would: in `home`, unless the environment names another location."""
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    # A server has an artifact location of its own.
    if not address.is_server(uri):
        artifacts = home / "artifacts"
        os.environ.setdefault("PTL_ARTIFACT_ROOT", artifacts.as_uri())


def packages(config: Config, runner: str) -> Finding:
    """What the steps import on this machine; in containers they bring their own."""
    needed = ["pipelines"]
    backends: list[str] = []
    if runner != "docker":
        needed = ["prune", "recover", "evaluate", *needed]
        backends = _missing_backends(config)
    missing = [*extras.absent(needed), *backends]
    if not missing:
        if runner != "docker":
            language_models.check_backend(config.evaluate)
        return Finding("packages", "ok", f"what the steps import is installed ({', '.join(needed)})")
    listed = ", ".join(missing)
    # The backends are not in these extras: each goes with one kind of CUDA.
    return Finding("packages", "error", f"not installed: {listed}", " ".join([extras.install(*needed), *backends]))


def _missing_backends(config: Config) -> list[str]:
    """Packages that only some settings need, and that no extra of these brings."""
    # Neither works everywhere, so neither comes with what the steps need anyway.
    backends: list[str] = []
    if config.evaluate.backend == "vllm":
        backends.append("vllm")
    return [name for name in backends if importlib.util.find_spec(name) is None]


def exports(config: Config, check: CheckExports, model: Finding) -> list[Finding]:
    """A finding for each format of the config's exports: what makes it is installed, and it can be made of the model.

    A model that is on the hub, or that the finding `model` is an error of, is left out.
    """
    folder = Path(config.model.path).expanduser()
    src = folder if folder.exists() and model.state == "ok" else None
    forms: dict[str, list[Export]] = {}
    for export in config.export:
        forms.setdefault(export.format, []).append(export)
    return [as_finding(format, _exports, forms[format], check, src) for format in forms]


def _exports(forms: Sequence[Export], check: CheckExports, src: Path | None) -> Finding:
    """Of one format."""
    check(forms, src)
    types = listed([form.type for form in forms])
    message = f"{types} can be made of the model" if src else f"what {types} needs is installed"
    return Finding(forms[0].format, "ok", message)


def model_and_data(config: Config) -> Finding:
    """Data files, tasks and the model are as the run needs them; of a model on the hub only its config is read."""
    from ptl.data import checks
    from ptl.preflight import forecast_model, preflight

    calibration, training = config.calibration, config.training
    evaluate, recover = config.evaluate, config.recover
    preflight.check_data_and_tasks(calibration, training, evaluate, config.gate, recover)

    path = config.model.path
    folder = Path(path).expanduser()
    if folder.exists():
        preflight.check_model(folder, config.schedule, config.prune)
        checks.check_settings(folder, calibration, training, evaluate, recover)
        return Finding("model and data", "ok", f"{path} and the data files can be read")

    # Weights of many gigabytes are nothing to download for a check.
    params = forecast_model.shape_of(path, config.model.revision).params
    return Finding("model and data", "ok", f"{path} is on the hub ({params:,} parameters); the run downloads it")


def disk(config: Config, home: Path) -> Finding:
    """Whether the checkpoints of a whole run fit beside what is there; on S3 only one at a time is here."""
    from ptl.preflight import forecast_model, target

    config = target.with_number(config)
    model = config.model
    shape = forecast_model.shape_of(model.path, model.revision)
    needed = checkpoint_bytes(config, shape.params, shape.itemsize)
    free = shutil.disk_usage(home).free
    message = f"{home} has {size(free)} free; the checkpoints of a whole run are about {size(needed)}"
    # An estimate, and a run that stops for want of space can be resumed: no error.
    if free >= needed:
        return Finding("disk", "ok", message)
    return Finding(
        "disk",
        "warning",
        message,
        "free some, give another --home, or keep checkpoints on S3; ptl gc removes those of earlier runs",
    )


def checkpoint_bytes(config: Config, params: int, itemsize: int) -> int:
    """Estimate of what a run publishes: a checkpoint by each prune and recover, some with the optimizer's state."""
    iterations = plan(config.schedule, config.prune)
    if config.control:
        iterations += plan(one_shot(config.schedule), config.prune)
    total = removal(params, config.schedule.target)
    keeps_state = any(isinstance(stage, NextToken) and stage.carry_moments for stage in config.recover)
    needed = params * itemsize  # the imported model
    for iteration in iterations:
        after = params - int(iteration.progress * total)
        of_parameter = itemsize
        if keeps_state and not iteration.last:  # after the last there is nothing to carry it to
            of_parameter += OPTIMIZER_STATE
        needed += 2 * after * of_parameter  # pruned, and recovered
    return needed


def engine(config: Config, missing_images: MissingImages) -> Finding:
    """The steps' images are in the local engine, and MLflow is a server, which is all that they speak to."""
    names = config.image_names()
    listed = ", ".join(names)
    absent = ", ".join(missing_images(names))
    if absent:
        options = with_options(config.optional_images())
        return Finding("images", "error", f"the engine has no {absent}", f"build them: ptl images build{options}")
    # A database's file is outside of the containers.
    if not address.is_server(tracking_uri()):
        return Finding(
            "images",
            "warning",
            f"the engine has {listed}, which speak to an MLflow server only, and none is set",
            "run with --s3, which starts one, or set MLFLOW_TRACKING_URI",
        )
    return Finding("images", "ok", f"{listed} are in the local engine")
