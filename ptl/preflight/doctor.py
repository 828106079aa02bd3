"""`ptl doctor`: what a run will need is tried out before a GPU hour is spent; each finding is ok, warning or error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptl import address, extras
from ptl.config.export import Export
from ptl.config.image_names import with_options
from ptl.config.run import Config, check
from ptl.errors import InputError
from ptl.evaluation import language_models
from ptl.preflight import doctor_cluster, gpus
from ptl.preflight.doctor_cluster import Health
from ptl.preflight.doctor_servers import tracking_and_store, tracking_uri
from ptl.preflight.finding import DoubtError, Finding, as_finding
from ptl.units import listed, size

OPTIMIZER_STATE = 8  # bytes a parameter: Adam's two averages in float32

MissingImages = Callable[[Sequence[str]], list[str]]  # those of the images that the local engine does not hold
# (exports of one format, the dense model if it is here): raises InputError for what cannot be made on this machine
CheckExports = Callable[[Sequence[Export], Path | None], None]


def local(
    config: Config,
    *,
    home: Path,
    missing_images: MissingImages,
    check_exports: CheckExports,
    runner: str = "subprocess",
) -> list[Finding]:
    """What `ptl run` needs on this machine; the Docker engine only where its containers run the steps."""
    # Tracked where the run would be: in `home`, unless the environment names another location.
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    if not address.is_server(os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")):
        os.environ.setdefault("PTL_ARTIFACT_ROOT", (home / "artifacts").as_uri())
    findings = [as_finding("packages", packages, config, runner), *step_environment(config)]
    findings.append(as_finding("disk", disk, config, home))
    if runner == "docker":
        return [*findings, as_finding("images", engine, config, missing_images)]
    folder = Path(config.model.path).expanduser()
    src = folder if folder.exists() else None
    for kind in dict.fromkeys(export.format for export in config.export):
        of_format = [export for export in config.export if export.format == kind]
        findings.append(as_finding(kind, exports, of_format, src, check_exports))
    return findings


def cluster(config: Config, *, health: Health | None, namespace: str | None, kubeflow_namespace: str) -> list[Finding]:
    """What a run on Kubeflow needs: images in a registry, a backend of the right version, objects of the namespace.

    MLflow and the store are tried from here where this environment says how; the steps have their own addresses and
    credentials, so what is not set here is a warning.
    """
    findings = [*tracking_and_store(config, elsewhere=True), as_finding("images", doctor_cluster.images, config)]
    if health is None:
        remedy = "give the address of the API; `ptl submit` needs it too"
        message = "not checked: neither --host nor KF_PIPELINES_ENDPOINT is set"
        findings.append(Finding("Kubeflow", "warning", message, remedy))
    else:
        findings.append(as_finding("Kubeflow", doctor_cluster.kubeflow, config, health))
        # Where nobody names a profile, pods start beside Kubeflow, unless it has several users.
        if namespace is None and findings[-1].state != "error" and health().get("multi_user") is False:
            namespace = kubeflow_namespace
    return [*findings, *doctor_cluster.objects(config, namespace, kubeflow_namespace)]


def task(settings: dict[str, Any], experiment: str) -> None:
    """The work of the optional first step of a pipeline. Raises InputError that names every error."""
    config = check(Config, settings, "settings")
    # The run's parameter wins over the config's value.
    storage = config.storage.model_copy(update={"experiment": experiment})
    findings = step_environment(config.model_copy(update={"storage": storage}))
    # A local runner, which names the run by PTL_RUN_ID, trains without Kubeflow Trainer.
    if os.environ.get("KFP_RUN_ID") and not os.environ.get("PTL_RUN_ID"):
        findings += doctor_cluster.trainer_in_step(config)
    # All findings go to the step's log, the errors into its message too.
    print(*findings, sep="\n", flush=True)
    lines = "\n".join(str(finding) for finding in findings if finding.state == "error")
    if lines:
        raise InputError(f"doctor:\n{lines}")  # of the input: another attempt would find the same


def step_environment(config: Config) -> list[Finding]:
    """What a step sees from where this runs: MLflow, the store, accelerators."""
    return [*tracking_and_store(config), as_finding("GPU", gpu, config)]


def gpu(config: Config) -> str:
    """As many accelerators as the config asks for are visible here."""
    # On the cluster this step has what prune has; elsewhere the largest step is to fit.
    in_step = bool(os.environ.get("KFP_RUN_ID"))
    needed = max(map(config.resources.accelerators_of, ["prune"] if in_step else ["prune", "recover", "evaluate"]))
    message = f"{gpus.visible()} visible here, the config asks for {needed}"
    if gpus.visible() < needed:
        error = InputError if in_step else DoubtError
        remedy = "check resources.accelerator, tolerations and node_selector, and the nodes' device plugin"
        raise error(message, remedy=remedy)
    return message


def packages(config: Config, runner: str) -> str:
    """What the steps import is installed on this machine; in containers they bring their own."""
    needed = ["pipelines"] if runner == "docker" else ["prune", "recover", "evaluate", "pipelines"]
    missing = extras.absent(needed)
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}", remedy=extras.install(*needed))
    if runner != "docker":
        language_models.check_backend(config.evaluate)
    return f"what the steps import is installed ({', '.join(needed)})"


def disk(config: Config, home: Path) -> str:
    """The checkpoints of a whole run fit beside what is there; on S3 only one at a time is here."""
    from ptl.preflight import forecast_model

    shape = forecast_model.shape_of(config.model.path, config.model.revision)
    needed = checkpoint_bytes(config, shape.params, shape.itemsize)
    free = shutil.disk_usage(home).free
    message = f"{home} has {size(free)} free; the checkpoints of a whole run are at most {size(needed)}"
    if free < needed:  # a run that stops for want of space can be resumed: no error
        remedy = "free some, give another --home, or keep checkpoints on S3; ptl gc removes those of earlier runs"
        raise DoubtError(message, remedy=remedy)
    return message


def checkpoint_bytes(config: Config, params: int, itemsize: int) -> int:
    """The most that a run publishes: the model, and two of its size by each iteration and by the control.

    All but the last iteration's hold the optimizer's state.
    """
    iterations = config.schedule.num_iterations
    checkpoints = 1 + 2 * iterations + 2 * config.control
    return params * (checkpoints * itemsize + 2 * (iterations - 1) * OPTIMIZER_STATE)


def exports(of_format: Sequence[Export], src: Path | None, check_exports: CheckExports) -> str:
    """What makes the exports of one format is installed, and they can be made of the model, if it is here."""
    check_exports(of_format, src)
    types = listed([export.type for export in of_format])
    return f"{types} can be made of the model" if src else f"what {types} needs is installed"


def engine(config: Config, missing_images: MissingImages) -> str:
    """The steps' images are in the local engine, and MLflow is a server, which is all that they speak to."""
    names = config.image_names()
    absent = ", ".join(missing_images(names))
    if absent:
        options = with_options(config.optional_images())
        raise InputError(f"the engine has no {absent}", remedy=f"build them: ptl images build{options}")
    if not address.is_server(tracking_uri()):  # a database's file is outside of the containers
        raise DoubtError(
            "the images speak to an MLflow server only, and none is set",
            remedy="run with --s3, which starts one, or set MLFLOW_TRACKING_URI",
        )
    return f"{', '.join(names)} are in the local engine"
