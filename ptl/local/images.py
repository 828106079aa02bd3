"""Building and pushing the steps' images with buildx, and asking the engine for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ptl import __version__
from ptl.config.image_names import IMAGES, names, revision_of, with_options
from ptl.errors import InputError, WorkError

ROOT = Path(__file__).parents[2]
BAKE_FILE = Path("docker", "docker-bake.hcl")


def build(
    registry: str = "",
    tag: str | None = None,
    optional: Collection[str] = (),
    *,
    base_image: str | None = None,
    cpu: bool = False,
    ca: Path | None = None,
    index: str | None = None,
    wheels: Path | None = None,
) -> list[str]:
    """Build the three images with `docker buildx bake` and load them into the engine; returns their names.

    `optional` are further ones, of image_names.OPTIONAL. `base_image` replaces the CUDA base; `cpu` takes the locks
    that leave the CUDA libraries out (docs/images.md says where their torch comes from). `ca` is a CA bundle and
    `index` the address of a package index, both only for the build's downloads; `wheels` is a folder of local wheels.
    Raises InputError outside a checkout and for an image that has no CPU build, WorkError when no engine answers or a
    build fails.
    """
    built = names(registry, tag, optional=optional)
    if not (ROOT / BAKE_FILE).is_file():  # docker/ is not in the wheel
        raise InputError(
            f"no {BAKE_FILE} under {ROOT}",
            field="images",
            remedy="run this in a checkout of the repository",
        )
    if cpu and "evaluate-vllm" in optional:
        raise InputError(
            "evaluate-vllm has no build for CPUs",
            field="--with",
            remedy="name the others instead of it, or of `all`",
        )
    require_engine()
    settings = {
        "REGISTRY": f"{registry}/" if registry else "",
        "TAG": tag or __version__,
        "VERSION": __version__,
        "REVISION": revision_of(ROOT) or "unknown",
    }
    if base_image:
        settings["BASE_IMAGE"] = base_image
    if cpu:
        settings["LOCKS"] = "docker/locks/cpu"
        settings["HASHES"] = "--verify-hashes"
    # Where packages come from; `ca` and `index` as secrets: they are in no layer of an image.
    downloads = []
    if ca is not None:
        downloads += ["--set", f"*.secrets=id=ca,src={ca.absolute()}"]
    if index is not None:
        if not index.startswith(("http://", "https://")):
            raise InputError("must be an address, http:// or https://", field="--index")
        downloads += ["--set", "*.secrets=id=index,env=PIP_INDEX_URL"]
        settings["PIP_INDEX_URL"] = index  # by the environment: it may hold a password
    if wheels is not None:
        downloads += ["--set", f"*.contexts.wheels={wheels.absolute()}"]
    targets = [*IMAGES, *optional]
    _docker("buildx", "bake", "--file", str(BAKE_FILE), "--load", *downloads, *targets, **settings)
    return built


def push(registry: str, tag: str | None = None, optional: Collection[str] = ()) -> list[str]:
    """Push the images that `build` made; the engine's own login is used. Returns their names."""
    if not registry:
        raise InputError(
            "pushing needs one",
            field="registry",
            remedy="give --registry host[:port][/path], as for the build",
        )
    # All or none: a tag must not name images of two builds.
    pushed = names(registry, tag, optional=optional)
    absent = missing(pushed)
    if absent:
        raise InputError(
            f"the engine has no {', '.join(absent)}",
            field="images",
            remedy="build with the same registry, tag and optional images first",
        )
    for name in pushed:
        _docker("push", name)
    return pushed


def digests(
    registry: str, tag: str | None = None, optional: Collection[str] = ()
) -> dict[str, Any]:
    """The section `images` of a config that names the images by their digests, as this engine knows them.

    An engine with containerd's image store knows the digest of what it has built; others learn it by a push or a pull.
    Raises InputError for an image without one.
    """
    require_engine()
    by_image = {}
    for step, name in zip(
        (*IMAGES, *optional), names(registry, tag, optional=optional), strict=True
    ):
        answer = _docker_quietly("image", "inspect", name, "--format", "{{json .RepoDigests}}")
        # as the engine names those of Docker Hub
        repository = name.rpartition(":")[0].removeprefix("docker.io/")
        references = json.loads(answer.stdout) if answer.returncode == 0 else []
        # The same image may have been pushed to other registries too.
        found = [
            reference for reference in references or [] if reference.startswith(f"{repository}@")
        ]
        if not found:
            raise InputError(
                f"the engine knows no digest of {name}",
                field="images",
                remedy=f"push it first (`ptl images push{with_options(optional)}`), or pull it; both with this "
                "registry and tag",
            )
        by_image[step] = found[-1].partition("@")[2]
    return {"registry": registry, "tag": tag or __version__, "digests": by_image}


def missing(image_names: Sequence[str]) -> list[str]:
    """Those of the images that the engine does not hold. Raises WorkError when no engine answers."""
    # Else all of them would seem to be missing.
    require_engine()
    return [
        name for name in image_names if _docker_quietly("image", "inspect", name).returncode != 0
    ]


def require_engine() -> None:
    """Raise WorkError, saying what to do, unless a Docker engine answers."""
    if shutil.which("docker") is None:
        raise WorkError(
            "the command is not on PATH",
            field="docker",
            remedy="install Docker, or use the subprocess runner",
        )
    # The server's version: without an engine the command still has one.
    answer = _docker_quietly("version", "--format", "{{.Server.Version}}")
    if answer.returncode != 0:
        *_, reason = ["no answer", *answer.stderr.strip().splitlines()]
        raise WorkError(
            f"no engine answers ({reason})",
            field="docker",
            remedy="start Docker, or set DOCKER_HOST to one that runs",
        )


def _docker(*command: str, **settings: str) -> None:
    """Run a docker command from the checkout's root; the user sees its output."""
    exit_code = subprocess.call(["docker", *command], cwd=ROOT, env={**os.environ, **settings})
    if exit_code != 0:
        raise WorkError(
            f"failed with exit code {exit_code}",
            field=f"docker {command[0]}",
            remedy="its output above says why",
        )


def _docker_quietly(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *command], capture_output=True, text=True)
