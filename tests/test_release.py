"""A release: what `make release` refuses, what it makes, and that its wheel works in an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ptl
import release
from ptl.cli import arguments, configs
from ptl.errors import InputError

ROOT = Path(__file__).parents[1]
STEM = f"prune_tune_loop-{ptl.__version__}"
WHEEL = f"{STEM}-py3-none-any.whl"
SDIST = f"{STEM}.tar.gz"
DIGESTS = {name: f"sha256:{number:064x}" for number, name in enumerate(("prune", "recover", "evaluate"))}
SECTION = {"registry": "registry.example.com/team", "tag": ptl.__version__, "digests": DIGESTS}
# What git has at the top, without what no release reads.
COPIED = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
COPIED += ("constraints.txt", "release.py", ".gitignore", "ptl", "components", "pipelines", "examples", "tests")
pytestmark = pytest.mark.xdist_group("release")  # one release for all
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@example.com")


def git(folder, *arguments):
    done = subprocess.run(["git", *AUTHOR, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository of its own with the files of this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "A version")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The functions of release.py, in a repository of one file."""
    (tmp_path / "a.py").touch()
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "A version")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    return tmp_path


def make(checkout, *options, **environment):
    command = [sys.executable, "release.py", *options]
    env = {**os.environ, "PYTHONPATH": str(checkout), **environment}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def released(checkout, tmp_path_factory):
    """dist/ of a release whose images are in a registry."""
    images = tmp_path_factory.mktemp("images") / "images.json"
    images.write_text(json.dumps(SECTION))
    make(checkout, "--images", images)
    return shutil.copytree(checkout / "dist", images.parent / "dist")


@pytest.fixture(scope="module")
def installed(released, tmp_path_factory):
    """The wheel, installed without what it requires: that comes from this Python."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", target, released / WHEEL]
    subprocess.run(command, check=True)
    return target


def python(installed, folder, *arguments):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_entry_of_the_changelog_has_a_date_and_says_something():
    text = (
        "# Changelog\n\n## [Unreleased]\n\n- b\n\n## [1.0.0] - 2026-01-02\n\n- a\n\n## [0.9.0] - 2025-12-31\n\n[1]: x\n"
    )
    assert release.changelog_entry(text, "1.0.0") == "- a\n"
    for version in ("1.1.0", "0.9.0", "1x0.0", "Unreleased"):
        with pytest.raises(InputError, match=re.escape(f"has no entry for version {version}")):
            release.changelog_entry(text, version)


def test_this_version_has_an_entry():
    assert "### Added" in release.changelog_entry((ROOT / "CHANGELOG.md").read_text(), ptl.__version__)


def test_a_changed_checkout_is_refused(here):
    release.check_commit()
    (here / "a.py").write_text("changed")
    (here / "new.py").touch()
    with pytest.raises(InputError, match=re.escape("the checkout: not as committed: a.py, new.py; commit or remove")):
        release.check_commit()


def test_a_version_whose_tag_is_another_commit_is_refused(here):
    git(here, "tag", "--annotate", f"v{ptl.__version__}", "--message", "x")
    release.check_commit()
    git(here, "commit", "--quiet", "--allow-empty", "--message", "Later")
    with pytest.raises(InputError, match=re.escape(f"v{ptl.__version__} is another commit; check that one out")):
        release.check_commit()


def test_images_of_another_version_are_refused(tmp_path):
    (tmp_path / "images.json").write_text(json.dumps({**SECTION, "tag": "9"}))
    with pytest.raises(InputError, match="is of images 9"):
        release.known_images(tmp_path / "images.json", [])


def test_a_file_without_all_images_of_the_release_is_refused(tmp_path):
    file = tmp_path / "images.json"
    file.write_text(json.dumps(SECTION))
    assert release.known_images(file, []) == SECTION
    named = "has no digest of export-gguf; make it with `ptl images digests --with export-gguf`"
    with pytest.raises(InputError, match=re.escape(named)):
        release.known_images(file, ["export-gguf"])


def test_a_release_has_the_images_that_shipped_configs_need(tmp_path, monkeypatch):
    assert release.optional_images(["export-gguf"]) == ["export-gguf"]
    monkeypatch.setattr(arguments, "CONFIGS", tmp_path)
    text = (ROOT / "pipelines" / "prune_tune_loop" / "configs" / "smollm2-135m-gsm8k.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text + "\nexport: [{format: compressed-tensors, type: fp8}]\n")
    assert release.optional_images(["export-gguf"]) == ["export-gguf", "export-compressed-tensors"]


def test_make_release_takes_the_images_of_exports_unless_others_are_named():
    def command(*variables):
        return subprocess.run(["make", "-n", "release", *variables], cwd=ROOT, capture_output=True, text=True).stdout

    assert "release.py --with export-gguf --with export-compressed-tensors --registry r " in command("REGISTRY=r")
    assert "--with" not in command("REGISTRY=r", "WITH=")
    assert "release.py --with all --registry r " in command("REGISTRY=r", "WITH=all")


@pytest.mark.slow
def test_a_release_is_complete_and_its_checksums_hold(released):
    names = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()}
    shipped_configs = {f"pipelines/{path.name}" for path in arguments.CONFIGS.glob("*.yaml")}
    assert names == {"NOTES.md", "SHA256SUMS", "constraints.txt", "images.json", WHEEL, SDIST} | shipped_configs
    assert json.loads((released / "images.json").read_text()) == SECTION
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=released, check=False)
    assert done.returncode == 0 and len((released / "SHA256SUMS").read_text().splitlines()) == len(names) - 1


@pytest.mark.slow
def test_the_same_commit_gives_the_same_bytes_and_without_images_it_says_what_is_skipped(released, checkout):
    (checkout / "build").mkdir(exist_ok=True)  # as an earlier build leaves behind; git ignores it
    (checkout / "build" / "left").touch()
    shown = make(checkout, TZ="Asia/Tokyo")
    assert "Skipped: the images, their digests, and the configs compiled" in shown and "make release IMAGES=" in shown
    for name in (WHEEL, SDIST):
        assert (checkout / "dist" / name).read_bytes() == (released / name).read_bytes()
    assert not (checkout / "dist" / "images.json").exists() and not (checkout / "dist" / "pipelines").exists()


@pytest.mark.slow
def test_a_release_that_builds_images_takes_their_digests_from_the_engine(tmp_path, monkeypatch):
    """By a mock of docker, as an engine with containerd's image store answers; other engines have no digest yet."""
    program = tmp_path / "docker"
    lines = ["#!/bin/sh", 'echo "$*" >>"$0.log"', 'case "$*" in', 'image*$NONE*) echo "[]" ;;']
    digests = {**DIGESTS, "export-gguf": f"sha256:{3:064x}"}
    lines += [f"*/ptl-{name}:*) echo '[\"{SECTION['registry']}/ptl-{name}@{digests[name]}\"]' ;;" for name in digests]
    text = "\n".join([*lines, "esac", ""])
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NONE", "nothing")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert release.built_images("registry.example.com/team", []) == (SECTION, None)
    more = {**SECTION, "digests": digests}
    assert release.built_images("registry.example.com/team", ["export-gguf"]) == (more, None)
    bakes = [line for line in Path(f"{program}.log").read_text().splitlines() if line.startswith("buildx bake ")]
    # In between may be where this machine downloads from.
    assert all(line.startswith("buildx bake --file docker/docker-bake.hcl --load ") for line in bakes)
    targets = "prune recover evaluate"
    assert [line[line.index(targets) :] for line in bakes] == [targets, f"{targets} export-gguf"]
    monkeypatch.setenv("NONE", "gguf")
    section, skipped = release.built_images("registry.example.com/team", ["export-gguf"])
    assert section is None and "ptl images push --registry registry.example.com/team --with export-gguf\n" in skipped
    assert "make release IMAGES=images.json WITH='export-gguf'" in skipped


@pytest.mark.slow
def test_the_wheel_has_one_name_at_the_top_and_metadata_that_tools_read(released):
    with zipfile.ZipFile(released / WHEEL) as wheel:
        names = wheel.namelist()
        folder = f"{STEM}.dist-info"
        metadata = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        assert wheel.read(f"{folder}/top_level.txt").split() == [b"ptl"]
    assert {name.partition("/")[0] for name in names} == {"ptl", folder}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert (metadata["Name"], metadata["Version"], metadata["License"]) == (
        "prune-tune-loop",
        ptl.__version__,
        "Apache-2.0",
    )
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata["Summary"] and metadata.get_payload()
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"prune", "recover", "evaluate", "pipelines"} <= extras
    assert all(Requirement(text).name for text in metadata.get_all("Requires-Dist"))
    with tarfile.open(released / SDIST) as sdist:
        members = sdist.getmembers()
    packed = {member.name.partition("/")[2] for member in members}
    assert {"CHANGELOG.md", "setup.py", "PKG-INFO"} <= packed
    assert not [file for file in packed if file.startswith("tests/")], "not without their helpers"
    assert {(member.uid, member.gid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}


@pytest.mark.slow
def test_in_an_empty_folder_the_wheel_compiles_what_the_checkout_compiles(released, installed, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("tiny", "smollm2-135m-gsm8k", "onprem"):  # two with files of the examples
        config = arguments.CONFIGS / f"{name}.yaml"
        images = (released / "images.json").read_text()
        configs.compile(config, tmp_path / config.name, [f"images={images}"])
        assert (tmp_path / config.name).read_bytes() == (released / "pipelines" / config.name).read_bytes()
    # Without images and by the command, in a folder that has the pipeline's name in it.
    configs.compile(arguments.CONFIGS / "tiny.yaml", tmp_path / "checkout.yaml", [])
    empty = tmp_path / "empty"
    (empty / "pipelines").mkdir(parents=True)
    (empty / "pipelines" / "__init__.py").touch()
    python(installed, empty, "-m", "ptl", "compile", "tiny", "-o", "tiny.yaml")
    assert (empty / "tiny.yaml").read_bytes() == (tmp_path / "checkout.yaml").read_bytes()


@pytest.mark.slow
def test_in_an_empty_folder_the_wheel_has_its_other_commands(installed, tmp_path):
    assert "127,552" in python(installed, tmp_path, "-m", "ptl", "validate", "tiny")
    assert json.loads(python(installed, tmp_path, "-m", "ptl", "validate", "--schema"))["title"] == "Config"
    code = "import ptl.cli, pipelines, components.prune.component; print(pipelines.__file__, ptl.__file__)"
    files = python(installed, tmp_path, "-c", code).split()
    assert len(files) == 2 and all(Path(file).is_relative_to(installed) for file in files)
    assert not list(tmp_path.iterdir())
