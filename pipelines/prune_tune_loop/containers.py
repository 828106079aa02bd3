"""What a step's container gets: the run's folder, the config's own files, settings by environment, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptl import images
from ptl.config import Config
from ptl.errors import InputError, WorkError

LABEL = "ptl.run-dir"  # on every container of a run, so that those of a killed run are found again
SECTIONS = ("model", "calibration", "training", "recover", "evaluate")  # where a config names files
CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def check(config: Config, tracking_uri: str) -> None:
    """Raise InputError, before any work, for what would stop every container: server, engine or images missing."""
    if not tracking_uri.startswith(("http://", "https://")):
        raise InputError(
            "--runner docker: the steps' images speak to an MLflow server only, and none is given; "
            "add --s3, which starts one, or set MLFLOW_TRACKING_URI to the address of yours"
        )
    wanted = config.image_names()
    try:
        absent = images.missing(wanted)
    except WorkError as error:
        raise InputError(f"--runner docker: {error}") from error
    if absent:
        raise InputError(
            f"--runner docker: the engine has no {', '.join(absent)}; make them with `ptl images build`, pull them, "
            "or correct images.registry and images.tag"
        )
    use_same_engine()


def use_same_engine() -> None:
    """The docker command follows its context, the SDK only DOCKER_HOST: tell it where the command found the engine."""
    if not os.environ.get("DOCKER_HOST"):
        host = _docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
        if host:
            os.environ["DOCKER_HOST"] = host


def arguments(config: Config, folder: Path, environment: dict[str, str], artifacts: str) -> dict[str, Any]:
    """Arguments of the docker SDK's `containers.run`: unprivileged, with a read-only root, on the host's network.

    `folder` is the run's, `artifacts` where MLflow's experiment keeps its files (mounted where that is a folder). Paths
    are the same inside and outside, and so is the working directory: a config's relative paths mean the same files.
    """
    from docker.types import DeviceRequest, Mount

    read_only = files(config) | {Path(os.environ[name]) for name in CERTIFICATES if _is_file(name)}
    writable = {folder}
    inside = {name: os.environ[name] for name in CERTIFICATES if _is_file(name)}
    if uses_hub(config):
        caches = hub_caches()
        writable |= {Path(path) for path in caches.values()}
        inside |= caches
    if artifacts.startswith("file://"):
        writable.add(Path(artifacts.removeprefix("file://")))
    for path in writable:
        path.mkdir(parents=True, exist_ok=True)
    mounts = [Mount(str(path), str(path.resolve()), "bind", read_only=True) for path in _outermost(read_only)]
    mounts += [Mount(str(path), str(path.resolve()), "bind") for path in _outermost(writable)]
    given: dict[str, Any] = {
        # KFP's runner decodes output piece by piece and fails on half a character: ASCII has none.
        "environment": {**environment, **inside, "PYTHONIOENCODING": "ascii:backslashreplace"},
        "mounts": mounts,
        "working_dir": str(Path.cwd()),
        "user": f"{os.getuid()}:0",  # the owner of the run's folder, in the group whose files the images open
        "network_mode": "host",  # servers on 127.0.0.1 are reached
        "read_only": True,
        "tmpfs": {"/tmp": "rw,exec,nosuid,nodev,mode=1777"},  # exec: Triton loads what it compiled there
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "shm_size": "1g",
        "init": True,
        "labels": {LABEL: str(folder)},
    }
    if '"nvidia"' in _docker("info", "--format", "{{json .Runtimes}}"):
        given["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
    return given


def remove_leftovers(folder: Path) -> None:
    """Remove the run's containers: a killed `ptl run` leaves one behind, which still writes to the run's folder."""
    found = _docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={folder}").split()
    if found:
        subprocess.run(["docker", "rm", "--force", *found], check=False, capture_output=True)


def files(config: Config) -> set[Path]:
    """Local files and folders that a config names: model, data, and task files with what lies beside them."""
    from ptl import task_data, tasks

    home = Path.cwd()
    named = {Path(text).expanduser() for text in _strings(config) if "\n" not in text and len(text) < 256}
    # A text that is no path may still be "." or "/".
    found = {_whole(path) for path in named if path.exists() and not home.is_relative_to(path.resolve())}
    for task in config.evaluate.tasks:
        if tasks.is_path(task.name):
            (spec,) = tasks.find(task.name)
            # A task's YAML may use functions and templates beside it; a whole working directory is too much.
            found.add(spec.path if home.is_relative_to(spec.path.parent) else spec.path.parent)
            splits = task_data.local_splits(spec, config.evaluate.data_dir, task.num_fewshot)
            found |= {Path(split.file) for split in splits.values()}
    return {_absolute(path) for path in found}


def uses_hub(config: Config) -> bool:
    """Whether a step reads from the hub: a model, data or task that is not a local file."""
    from ptl import tasks

    sources = [config.model.path, *_strings(config, "source")]
    remote = [name for name in sources if not Path(name).expanduser().exists() and not name.startswith("s3://")]
    by_name = [task for task in config.evaluate.tasks if not tasks.is_path(task.name)]
    return bool(remote) or (bool(by_name) and config.evaluate.data_dir is None)


def hub_caches() -> dict[str, str]:
    """The hub's caches of this machine: what was downloaded once is not downloaded again, nor into memory."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    datasets = os.environ.get("HF_DATASETS_CACHE") or str(Path(HF_HOME, "datasets"))
    return {"HF_HUB_CACHE": str(_absolute(HF_HUB_CACHE)), "HF_DATASETS_CACHE": str(_absolute(datasets))}


def _absolute(path: str | Path) -> Path:
    """As the step will look for it: without following links, but without `..`."""
    return Path(os.path.normpath(Path(path).absolute()))


def _whole(path: Path) -> Path:
    """A snapshot in the hub's cache is links to the blobs two folders up: both are needed."""
    return path.absolute().parents[1] if path.absolute().parent.name == "snapshots" else path


def _strings(config: Config, key: str | None = None) -> Iterator[str]:
    """All texts in the sections that may name files, or those of one field."""

    def walk(name: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for inner, each in value.items():
                yield from walk(inner, each)
        elif isinstance(value, list):
            for each in value:
                yield from walk(name, each)
        elif isinstance(value, str) and key in (None, name):
            yield value

    data = config.model_dump(mode="json")
    for section in SECTIONS:
        yield from walk(section, data[section])


def _outermost(paths: set[Path]) -> list[Path]:
    """Without those that lie in another of them."""
    return sorted(path for path in paths if not any(parent in paths for parent in path.parents))


def _is_file(name: str) -> bool:
    return Path(os.environ.get(name) or "/").is_file()


def _docker(*command: str) -> str:
    return subprocess.run(["docker", *command], capture_output=True, text=True, check=False).stdout.strip()
