"""`make release`: all that a version is, made from the checked-out commit into dist/. Nothing is uploaded.

docs/release.md says what is in dist/, and how a version is published.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptl import __version__
from ptl.cli import arguments
from ptl.config import image_names, yaml_text
from ptl.config.run import Images, check, load_config
from ptl.errors import InputError, PtlError, WorkError
from ptl.extras import DISTRIBUTION
from ptl.local import images

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
CHANGELOG = ROOT / "CHANGELOG.md"
STEM = f"{DISTRIBUTION.replace('-', '_')}-{__version__}"  # how the files' names begin
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
# One process: most of a command's time is kfp's import.
COMPILE = """
import sys
from pathlib import Path
from ptl.cli import arguments, configs
folder, images = map(Path, sys.argv[1:])
settings = [f"images={images.read_text()}"]
for config in sorted(arguments.CONFIGS.glob("*.yaml")):
    configs.compile(config, folder / config.name, settings)
"""
WITH_IMAGES = """\
    make release REGISTRY=registry.example.com/team WITH='{names}'        # where a Docker engine answers
  or, with images that are in the registry already, from a machine that has pulled or pushed them:
    ptl images digests --registry registry.example.com/team{options} > images.json
    make release IMAGES=images.json WITH='{names}'"""
AFTER_A_PUSH = """\
    ptl images push --registry {registry}{options}
    ptl images digests --registry {registry}{options} > images.json
    make release IMAGES=images.json WITH='{names}'"""


def main() -> None:
    """Make a release, or say why there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--registry", default="", help="build the images for this registry")
    parser.add_argument(
        "--images", type=Path, help="file of `ptl images digests`: the images are there already"
    )
    parser.add_argument(
        "--with",
        dest="chosen",
        action="append",
        default=[],
        metavar="IMAGE",
        help="as for `ptl images`; repeatable",
    )
    options = parser.parse_args()
    try:
        release(options.registry, options.images, options.chosen)
    except PtlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def release(registry: str, images_file: Path | None, chosen: list[str]) -> None:
    """Replace dist/; everything that can be refused is refused before anything is built."""
    notes = changelog_entry(CHANGELOG.read_text(), __version__)
    check_commit()
    optional = optional_images(chosen)
    section = known_images(images_file, optional) if images_file else None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = work / "dist"
        made.mkdir()
        (made / "NOTES.md").write_text(notes)
        source = exported(work / "source")
        shutil.copy(source / "constraints.txt", made)
        wheel = build(source, made, work)
        skipped = None
        if section is None:
            section, skipped = built_images(registry, optional)
        if section is not None:
            (made / "images.json").write_text(json.dumps(section, indent=2) + "\n")
            compile_configs(wheel, made, work)
        write_sums(made)
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(made, DIST)
    for path in files(DIST):
        print(f"{path.stat().st_size:>10,}  {path.relative_to(ROOT)}")
    if skipped:
        print(f"\nSkipped: {skipped}")


def changelog_entry(text: str, version: str) -> str:
    """The entry of a version, without its heading; it must have a date and say something."""
    heading = rf"## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n"
    entry = re.search(rf"^{heading}(.*?)(?=^## |^\[|\Z)", text, re.M | re.S)
    if not entry or not entry[1].strip():
        raise InputError(
            f"has no entry for version {version}",
            field="CHANGELOG.md",
            remedy=f"write one below `## [{version}] - {datetime.now(UTC):%Y-%m-%d}`",
        )
    return entry[1].strip() + "\n"


def check_commit() -> None:
    """Raise InputError unless the checkout is a commit, and no other commit has the version's tag."""
    changed = git("status", "--porcelain").splitlines()
    if changed:
        raise InputError(
            f"not as committed: {', '.join(line.split(maxsplit=1)[1] for line in changed[:3])}",
            field="the checkout",
            remedy="commit or remove them",
        )
    tag = f"v{__version__}"
    tagged = git("tag", "--list", tag, "--format=%(objectname) %(*objectname)").split()
    if tagged and git("rev-parse", "HEAD") not in tagged:
        raise InputError(
            f"{tag} is another commit",
            field="version",
            remedy="check that one out, or raise __version__ in ptl/__init__.py and VERSION in docker/docker-bake.hcl",
        )


def optional_images(chosen: list[str]) -> list[str]:
    """Optional images of the release: those that are chosen, and those that a shipped config needs."""
    shipped_configs = [load_config(file) for file in arguments.CONFIGS.glob("*.yaml")]
    needed = [name for config in shipped_configs for name in config.optional_images()]
    return image_names.chosen([*chosen, *needed])


def known_images(file: Path, optional: list[str]) -> dict[str, Any]:
    """The section of a file of `ptl images digests`, of this version and with all images of the release."""
    section = check(Images, yaml_text.load_file(file, field="--images"), str(file)).model_dump()
    tag = section["tag"]
    if tag != __version__:
        raise InputError(
            f"{file} is of images {tag}, not {__version__}",
            field="--images",
            remedy="give this version's",
        )
    absent = image_names.without_digest(section["digests"], optional)
    if absent:
        raise InputError(
            f"{file} has no digest of {', '.join(absent)}",
            field="--images",
            remedy=f"make it with `ptl images digests{image_names.with_options(optional)}`, or give a shorter WITH=...",
        )
    return section


def exported(folder: Path) -> Path:
    """The commit's files alone, with the rights that git knows: what lies around in the checkout is in no build."""
    archive = subprocess.run(
        [
            "git",
            "-c",
            "tar.umask=0022",
            "archive",
            "--format=tar",
            f"--output={folder}.tar",
            "HEAD",
        ],
        cwd=ROOT,
    )
    if archive.returncode != 0:
        raise WorkError("git archive failed", remedy="its output above says why")
    with tarfile.open(f"{folder}.tar") as tar:
        unpack(tar, folder)
    return folder


def unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Extract an archive that was made here."""
    # Python 3.11.2, as Debian 12 has it, knows no filters.
    if hasattr(tarfile, "data_filter"):
        tar.extraction_filter = tarfile.data_filter
    tar.extractall(folder)


def build(source: Path, out: Path, work: Path) -> Path:
    """Source distribution and, from it, the wheel; the same commit gives the same bytes. Returns the wheel."""
    epoch = int(git("log", "-1", "--format=%ct"))
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    run("build_sdist", source, out, environment)
    sdist = out / f"{STEM}.tar.gz"
    normalize(sdist, epoch)
    with tarfile.open(sdist) as tar:
        unpack(tar, work / "sdist")
    run("build_wheel", work / "sdist" / STEM, out, environment)
    return out / f"{STEM}-py3-none-any.whl"


def run(hook: str, source: Path, out: Path, environment: dict[str, str]) -> None:
    """Call a hook of the build backend, as pip does."""
    command = [sys.executable, "-c", BUILD, hook, str(out)]
    process = subprocess.run(
        command, cwd=source, env=environment, umask=0o022, capture_output=True, text=True
    )
    if process.returncode != 0:
        raise WorkError(f"{hook} failed:\n{process.stderr[-2000:]}")


def normalize(sdist: Path, epoch: int) -> None:
    """Rewrite a .tar.gz without the time and the user of its making, which setuptools records."""
    with tarfile.open(sdist) as tar:
        contents = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            if file is not None:  # a folder has no content, and needs no entry
                contents[member.name] = file.read()
    # No name in gzip's header, and the commit's time.
    with (
        sdist.open("wb") as out,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=out) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = epoch
            tar.addfile(member, io.BytesIO(content))


def built_images(registry: str, optional: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    """Build the images; returns their section of a config, or what was skipped and how to do it."""
    options = image_names.with_options(optional)
    placeholders = {"registry": registry, "options": options, "names": " ".join(optional)}
    what = "the images, their digests, and the configs compiled against these"
    if not registry:
        return None, f"{what}: no registry is named.\n{WITH_IMAGES.format(**placeholders)}"
    try:
        images.require_engine()
    except WorkError as error:
        return None, f"{what}: {error}.\n{WITH_IMAGES.format(**placeholders)}"
    # The command reads the build's settings from the environment, as docs/images.md says.
    command = [
        sys.executable,
        "-m",
        "ptl",
        "images",
        "build",
        "--registry",
        registry,
        *options.split(),
    ]
    built = subprocess.run(command, cwd=ROOT)
    if built.returncode != 0:
        raise WorkError("the images were not built", remedy="the output above says why")
    try:
        return images.digests(registry, optional=optional), None
    except InputError:
        # Without containerd's image store an engine compresses layers, and so learns a digest, only when it pushes.
        how = AFTER_A_PUSH.format(**placeholders)
        return (
            None,
            f"the digests, and the configs compiled against these: this engine learns them by a push.\n{how}",
        )


def compile_configs(wheel: Path, made: Path, work: Path) -> None:
    """Every shipped config, compiled by the wheel itself in an empty folder."""
    installed, empty = work / "installed", work / "empty"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    empty.mkdir()
    (made / "pipelines").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", COMPILE, str(made / "pipelines"), str(made / "images.json")]
    process = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise WorkError(f"a shipped config was not compiled:\n{process.stderr[-2000:]}")


def write_sums(folder: Path) -> None:
    """SHA256SUMS, as `sha256sum --check` reads it."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in files(folder)
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def files(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def git(*arguments: str) -> str:
    """What a git command prints."""
    process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        raise InputError(f"git {arguments[0]}: {process.stderr.strip()}", field="the checkout")
    return process.stdout.strip()


if __name__ == "__main__":
    main()
