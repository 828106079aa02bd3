"""The steps' images: their names, and building and pushing them with buildx. Light: compiling imports it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ptl import __version__
from ptl.errors import InputError, WorkError
from ptl.revision import revision_of

# Which image a kind of step runs in: five steps, three images.
IMAGE_OF = {
    "import-model": "prune",
    "prune": "prune",
    "recover": "recover",
    "evaluate": "evaluate",
    "report": "evaluate",
    "evaluate-vllm": "evaluate-vllm",  # evaluate's steps with `evaluate.backend: vllm`
}
IMAGES = ("prune", "recover", "evaluate")

ROOT = Path(__file__).parents[1]
BAKE_FILE = Path("docker", "docker-bake.hcl")

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REGISTRY = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*(:[0-9]+)?(/[a-z0-9]+(([.]|_{1,2}|-+)[a-z0-9]+)*)*")


def image(step: str, registry: str = "", tag: str | None = None) -> str:
    """The image of a step: `[<registry>/]ptl-<image>:<tag>`.

    `step` is a key of IMAGE_OF; `registry` is a host with an optional path and without scheme, or empty for the local
    engine's own images; without a tag it is the package's version. Raises InputError for anything that the image
    reference grammar refuses.
    """
    tag = __version__ if tag is None else tag
    if step not in IMAGE_OF:
        raise InputError(f"step: {step!r} has no image; steps are {', '.join(IMAGE_OF)}")
    if registry and not _REGISTRY.fullmatch(registry):
        raise InputError(
            f"registry: {registry!r} is not a registry; give host[:port][/path] in lower case, without scheme and "
            "without a slash at the end, for example registry.example.com/team"
        )
    if not _TAG.fullmatch(tag):
        raise InputError(f"tag: {tag!r} is not an image tag; use up to 128 letters, digits, '_', '.' and '-'")
    return f"{registry}/ptl-{IMAGE_OF[step]}:{tag}" if registry else f"ptl-{IMAGE_OF[step]}:{tag}"


def names(registry: str = "", tag: str | None = None, *, vllm: bool = False) -> list[str]:
    """The three images, in the order of IMAGES; with `vllm` also that of evaluate on vLLM, made by bake alone."""
    steps = (*IMAGES, "evaluate-vllm") if vllm else IMAGES
    return [image(step, registry, tag) for step in steps]


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
