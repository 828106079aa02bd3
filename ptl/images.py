"""Building and pushing the steps' images with buildx, and asking the engine for them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ptl import __version__
from ptl.errors import InputError, WorkError
from ptl.image_names import IMAGE_OF as IMAGE_OF
from ptl.image_names import IMAGES as IMAGES
from ptl.image_names import image as image
from ptl.image_names import names as names
from ptl.provenance import revision_of

ROOT = Path(__file__).parents[1]
BAKE_FILE = Path("docker", "docker-bake.hcl")


def build(
    registry: str = "",
    tag: str | None = None,
    *,
    base_image: str | None = None,
    cpu: bool = False,
    ca: Path | None = None,
    index: str | None = None,
    wheels: Path | None = None,
    flags: Sequence[str] = (),
    root: Path = ROOT,
) -> list[str]:
    """Build the three images with `docker buildx bake` and load them into the engine; returns their names.

    `root` is a checkout: docker/ is not in the wheel. `base_image` replaces the CUDA base; `cpu` takes the locks that
    leave the CUDA libraries out (docs/images.md says where their torch comes from). `ca` is a CA bundle and `index` the
    address of a package index, both only for the build's downloads; `wheels` is a folder of local wheels. `flags` go to
    bake as they are. Raises InputError outside a checkout and for a missing file, WorkError when no engine answers or a
    build fails.
    """
    built = names(registry, tag)
    if not (root / BAKE_FILE).is_file():
        raise InputError(f"images: no {BAKE_FILE} under {root}; run this in a checkout of the repository")
    require_engine()
    settings = {
        "REGISTRY": f"{registry}/" if registry else "",
        "TAG": tag or __version__,
        "VERSION": __version__,
        "REVISION": revision_of(root) or "unknown",
    }
    if base_image:
        settings["BASE_IMAGE"] = base_image
    if cpu:
        settings |= {"LOCKS": "docker/locks/cpu", "HASHES": "--verify-hashes"}
    if index:
        settings["PIP_INDEX_URL"] = index  # by the environment: it may hold a password
    given = _downloads(ca, index, wheels)
    _docker("buildx", "bake", "--file", str(BAKE_FILE), "--load", *given, *flags, cwd=root, settings=settings)
    return built


def _downloads(ca: Path | None, index: str | None, wheels: Path | None) -> list[str]:
    """Options of bake that say where packages come from."""
    if ca is not None and not ca.is_file():
        raise InputError(f"--ca: no file {ca}; give a CA bundle in PEM")
    if index is not None and not index.startswith(("http://", "https://")):
        raise InputError("--index: must be an address, http:// or https://")
    if wheels is not None and not wheels.is_dir():
        raise InputError(f"--wheels: no folder {wheels}; give a folder that holds wheels")
    values = {
        "*.secrets=id=ca,src=": ca and ca.absolute(),
        "*.secrets=id=index,env=": index and "PIP_INDEX_URL",
        "*.contexts.wheels=": wheels and wheels.absolute(),
    }
    return [word for name, value in values.items() if value for word in ("--set", f"{name}{value}")]


def push(registry: str, tag: str | None = None) -> list[str]:
    """Push the three images that `build` made; the engine's own login is used. Returns their names."""
    if not registry:
        raise InputError("registry: pushing needs one; give --registry host[:port][/path], as for the build")
    pushed = names(registry, tag)
    absent = missing(pushed)
    if absent:
        raise InputError(f"images: the engine has no {', '.join(absent)}; build with the same registry and tag first")
    for name in pushed:
        _docker("push", name)
    return pushed


def missing(wanted: Sequence[str]) -> list[str]:
    """Those of the images that the engine does not hold. Raises WorkError when no engine answers."""
    require_engine()
    return [name for name in wanted if _quiet("image", "inspect", name).returncode != 0]


def require_engine() -> None:
    """Raise WorkError, saying what to do, unless a Docker engine answers."""
    if shutil.which("docker") is None:
        raise WorkError("docker: the command is not on PATH; install Docker, or use the subprocess runner")
    answer = _quiet("version", "--format", "{{.Server.Version}}")
    if answer.returncode != 0:
        reason = answer.stderr.strip().splitlines()[-1:] or ["no answer"]
        raise WorkError(f"docker: no engine answers ({reason[0]}); start Docker, or set DOCKER_HOST to one that runs")


def _docker(*command: str, cwd: Path | None = None, settings: dict[str, str] | None = None) -> None:
    """Run a docker command whose output the user sees."""
    status = subprocess.run(["docker", *command], cwd=cwd, env=os.environ | (settings or {}), check=False).returncode
    if status != 0:
        raise WorkError(f"docker {command[0]}: failed with exit code {status}; what it printed above says why")


def _quiet(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *command], capture_output=True, text=True, check=False)
