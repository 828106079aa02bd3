"""What a step's container gets: the run's folder, the config's own files, settings by environment, and nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from ptl import address
from ptl.config.base import flat_settings
from ptl.config.image_names import with_options
from ptl.config.run import Config
from ptl.errors import InputError, WorkError
from ptl.local import images
from ptl.steps import mounts
from ptl.storage import local_files, s3

LABEL = "ptl.run-dir"  # on every container of a run, by which a killed run's are recognized
SECTIONS = {"model", "calibration", "training", "recover", "evaluate"}  # where a config names files


def check(config: Config, tracking_uri: str) -> None:
    """Raise InputError, before any work, for what would stop every container: server, engine or images missing."""
    if not address.is_server(tracking_uri):
        raise InputError(
            "the steps' images speak to an MLflow server only, and none is given",
            field="--runner docker",
            remedy="add --s3, which starts one, or set MLFLOW_TRACKING_URI to the address of yours",
        )
    try:
        absent = images.missing(config.image_names())
    except WorkError as error:
        raise InputError(str(error), field="--runner docker") from error
    if absent:
        options = with_options(config.optional_images())
        raise InputError(
            f"the engine has no {', '.join(absent)}",
            field="--runner docker",
            remedy=f"make them with `ptl images build{options}`, pull them, or correct images.registry and images.tag",
        )
    if "rootless" in _docker("info", "--format", "{{json .SecurityOptions}}"):
        raise InputError(
            "the engine is rootless: its containers reach no server here, and may not write to the run's folder",
            field="--runner docker",
            remedy="use the system's engine, or leave out --runner docker",
        )
    # The SDK follows no context of the docker command, only this variable.
    host = os.environ.get("DOCKER_HOST") or _docker(
        "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"
    )
    if host:
        os.environ["DOCKER_HOST"] = host


def arguments(
    config: Config, folder: Path, environment: dict[str, str], artifacts: str
) -> dict[str, Any]:
    """Arguments of the docker SDK's `containers.run`: unprivileged, with a read-only root, on the host's network.

    `folder` is the run's, `artifacts` where MLflow's experiment keeps its files (mounted where that is a folder). Paths
    are the same inside and outside, and so is the working directory: a config's relative paths mean the same files.
    """
    from docker.types import DeviceRequest

    variables = {name: os.environ.get(name, "") for name in mounts.BUNDLES}
    certificates = {name: path for name, path in variables.items() if Path(path).is_file()}
    caches = hub_caches()
    run_arguments: dict[str, Any] = {
        "environment": {
            # also of a profile, whose files stay outside
            **(s3.keys() if artifacts.startswith("s3://") else {}),
            **environment,
            **certificates,
            **caches,
            # KFP's runner decodes output piece by piece and fails on half a character: ASCII has none.
            "PYTHONIOENCODING": "ascii:backslashreplace",
        },
        "mounts": [
            *_mounts(files(config) | set(map(Path, certificates.values())), read_only=True),
            *_mounts(_writable_folders(folder, caches, artifacts), read_only=False),
        ],
        "working_dir": str(Path.cwd()),
        # the owner of the run's folder, in the group whose files the images open
        "user": f"{os.getuid()}:0",
        "network_mode": "host",  # servers on 127.0.0.1 are reached
        "read_only": True,
        # exec: Triton loads what it compiled there
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "shm_size": "1g",
        "init": True,
        "labels": {LABEL: str(folder)},
    }
    # Asking for GPUs is an error for an engine that has none.
    if '"nvidia"' in _docker("info", "--format", "{{json .Runtimes}}"):
        run_arguments["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    return run_arguments


def _writable_folders(folder: Path, caches: dict[str, str], artifacts: str) -> set[Path]:
    """The run's folder, the hub's caches and a local store of artifacts; the engine would make missing ones as root."""
    folders = {folder, *map(Path, caches.values())}
    if artifacts.startswith("file://"):
        folders.add(local_files.path_of(artifacts))
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    return folders


def _mounts(paths: set[Path], *, read_only: bool) -> list[Any]:
    """A bind mount for each path that is in no other of them."""
    from docker.types import Mount

    return [
        Mount(str(path), str(path.resolve()), "bind", read_only=read_only)
        for path in outermost(paths)
    ]


def outermost(paths: set[Path]) -> list[Path]:
    """Paths without those below another of them: a mount contains all that is below it."""
    return sorted(path for path in paths if paths.isdisjoint(path.parents))


def remove_leftovers(folder: Path) -> None:
    """Remove the run's containers: a killed `ptl run` leaves one behind, which still writes to the run's folder."""
    # Also those that were created and not started.
    containers = _docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={folder}")
    if containers:
        _docker("rm", "--force", *containers.split())


def files(config: Config) -> set[Path]:
    """Local files and folders that a config names: model, data, and task files with those next to them or included."""
    from ptl.evaluation import tasks

    working_directory = Path.cwd()
    # A whole working directory is too much.
    settings = flat_settings(config.model_dump(mode="json", include=SECTIONS)).values()
    named = [Path(text) for text in settings if isinstance(text, str) and _is_file(text)]
    paths = {
        _with_blobs(path) for path in named if not working_directory.is_relative_to(path.resolve())
    }
    own = [task for task in config.evaluate.tasks if tasks.is_path(task.name)]
    paths |= tasks.files(config.evaluate.model_copy(update={"tasks": own}))
    # Functions and templates may read what is next to a task's YAML.
    folders = {tasks.find(task.name)[0].path.parent for task in own}
    paths |= {folder for folder in folders if not working_directory.is_relative_to(folder)}
    return set(map(_absolute, paths))


def _is_file(text: str) -> bool:
    """Whether a setting is the path of a file or folder: a config that was read has absolute ones."""
    return text.startswith("/") and os.path.exists(text)  # noqa: PTH110 - Path's raises for a long text


def hub_caches() -> dict[str, str]:
    """The hub's caches of this machine: what was downloaded once is not downloaded again, nor into memory."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    datasets = os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME, "datasets")
    return {
        "HF_HUB_CACHE": str(_absolute(HF_HUB_CACHE)),
        "HF_DATASETS_CACHE": str(_absolute(datasets)),
    }


def _absolute(path: str | Path) -> Path:
    """As the step will look for it: without following links, but without `..`."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _with_blobs(path: Path) -> Path:
    """Of a snapshot in the hub's cache, whose files are links to blobs, the folder two levels up that has both."""
    parents = path.absolute().parents
    return parents[1] if parents[0].name == "snapshots" else path


def _docker(*command: str) -> str:
    process = subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
    return process.stdout.strip()
