"""What the doctor checks of a run on this machine: model and data, disk, the Docker engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from ptl import address, extras
from ptl.config import Config, Iteration, one_shot, plan, removal
from ptl.doctor_line import Line
from ptl.recover_config import NextToken

OPTIMIZER_STATE = 8  # bytes a parameter: Adam's two averages in float32


def as_run_does(home: Path) -> None:
    """Let this process track where `ptl run` would: in `home`, unless the environment names another place."""
    home.mkdir(parents=True, exist_ok=True)
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home.absolute()}/mlflow.db")
    if not address.is_server(uri):
        os.environ.setdefault("PTL_ARTIFACT_ROOT", (home.absolute() / "artifacts").as_uri())


def packages(config: Config, runner: str) -> Line:
    """What the steps import on this machine; in containers they bring their own."""
    needed = ["pipelines"] if runner == "docker" else ["prune", "recover", "evaluate", "pipelines"]
    missing = extras.absent(needed)
    others = {
        "vllm": config.evaluate.backend == "vllm",
        "deepspeed": any(s.sharding == "zero2" for s in config.recover),
    }
    if runner != "docker":
        missing += [name for name, used in others.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"pip install 'ptl[{','.join(needed)}]'" + "".join(f" {name}" for name in others if name in missing)
        return Line("packages", "error", f"not installed: {', '.join(missing)}", remedy)
    return Line("packages", "ok", f"what the steps import is installed (ptl[{','.join(needed)}])")


def model_and_data(config: Config) -> Line:
    """Data files, tasks and the model are as the run needs them; of a model on the hub only its config is read."""
    from ptl import data_checks, forecast, importer, model_checks, tasks

    data_checks.check_data(config.calibration, config.training, config.recover)
    data_checks.check_rewards(config.recover, config.training)
    tasks.check_tasks(config.evaluate)
    tasks.check_gate(config.evaluate, config.gate)
    model = config.model
    if Path(model.path).expanduser().exists():
        folder = Path(model.path).expanduser()
        importer.check_model(folder, config.schedule, config.prune)
        model_checks.check_settings(folder, config.calibration, config.training, config.evaluate, config.recover)
        return Line("model and data", "ok", f"{model.path} and the data files can be read")
    shape = forecast.shape_of(model.path, model.revision)
    message = f"{model.path} is on the hub ({shape.params:,} parameters); the run downloads it"
    return Line("model and data", "ok", message)


def disk(config: Config, home: Path) -> Line:
    """Whether the checkpoints of a whole run fit beside what is there; on S3 only one at a time is here."""
    from ptl import forecast

    shape = forecast.shape_of(config.model.path, config.model.revision)
    needed = checkpoint_bytes(config, shape.params, shape.itemsize)
    free = shutil.disk_usage(home).free
    message = f"{home} has {_size(free)} free; the checkpoints of a whole run are about {_size(needed)}"
    if free < needed:
        remedy = "free some, give another --home, or keep checkpoints on S3; ptl gc removes those of earlier runs"
        return Line("disk", "warning", message, remedy)
    return Line("disk", "ok", message)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def checkpoint_bytes(config: Config, params: int, itemsize: int) -> int:
    """Estimate of what a run publishes: a checkpoint by each prune and recover, some with the optimizer's state."""
    total = removal(params, config.schedule.target)
    arms: list[list[Iteration]] = [list(plan(config.schedule, config.prune))]
    if config.control:
        arms.append(list(plan(one_shot(config.schedule), config.prune)))
    keeps_state = any(isinstance(stage, NextToken) and stage.carry_moments for stage in config.recover)
    needed = params * itemsize  # the imported model
    for arm in arms:
        for iteration in arm:
            after = params - int(iteration.progress * total)
            needed += 2 * after * itemsize
            if keeps_state and iteration is not arm[-1]:
                needed += 2 * after * OPTIMIZER_STATE
    return needed


def engine(config: Config) -> Line:
    """The steps' images are in the local engine, and MLflow is a server, which is all that they speak to."""
    from ptl import images

    names = images.names(config.images.registry, config.images.tag, vllm=config.evaluate.backend == "vllm")
    absent = images.missing(names)
    if absent:
        return Line("images", "error", f"the engine has no {', '.join(absent)}", "build them: ptl images build")
    if not address.is_server(os.environ.get("MLFLOW_TRACKING_URI", "")):
        message = f"the engine has {', '.join(names)}, which speak to an MLflow server only, and none is set"
        return Line("images", "warning", message, "run with --s3, which starts one, or set MLFLOW_TRACKING_URI")
    return Line("images", "ok", f"{', '.join(names)} are in the local engine")
