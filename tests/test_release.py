"""A release: what `make release` refuses, what it makes, and that its wheel works in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from checkout import ROOT

import ptl
import release
from ptl.cli import arguments, configs
from ptl.errors import InputError

STEM = f"prune_tune_loop-{ptl.__version__}"
WHEEL = f"{STEM}-py3-none-any.whl"
SDIST = f"{STEM}.tar.gz"
DIGESTS = {
    name: f"sha256:{number:064x}" for number, name in enumerate(("prune", "recover", "evaluate"))
}
SECTION = {"registry": "registry.example.com/team", "tag": ptl.__version__, "digests": DIGESTS}
# What git has at the top, without what no release reads.
COPIED = (
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
)
COPIED += (
    "constraints.txt",
    "release.py",
    ".gitignore",
    "ptl",
    "components",
    "pipelines",
    "examples",
    "tests",
)
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@example.com")


def git(folder, *arguments):
    subprocess.run(["git", *AUTHOR, *arguments], cwd=folder, capture_output=True, check=True)


def make(checkout, *options, **environment):
    """What `make release` prints in a repository of its own."""
    env = {**os.environ, "PYTHONPATH": str(checkout), **environment}
    command = [sys.executable, "release.py", *options]
    done = subprocess.run(
        command, cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wrong_images_a_changed_checkout_and_a_tag_of_another_commit_are_refused(
    tmp_path, monkeypatch
):
    file = tmp_path / "images.json"
    file.write_text(json.dumps(SECTION))
    assert release.known_images(file, []) == SECTION
    with pytest.raises(
        InputError,
        match="no digest of export-gguf; make it with `ptl images digests --with export-",
    ):
        release.known_images(file, ["export-gguf"])
    file.write_text(json.dumps({**SECTION, "tag": "9"}))
    with pytest.raises(InputError, match="is of images 9"):
        release.known_images(file, [])
    # A changed checkout, and a tag of another commit.
    monkeypatch.setattr(release, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(InputError, match="the checkout: not as committed: images"):
        release.check_commit()
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "A version")
    git(tmp_path, "tag", "--annotate", f"v{ptl.__version__}", "--message", "x")
    release.check_commit()
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "Later")
    with pytest.raises(InputError, match="is another commit; check that one out"):
        release.check_commit()


@pytest.mark.nightly
def test_a_release_is_complete_and_its_wheel_compiles_what_the_checkout_compiles(
    tmp_path, monkeypatch
):
    checkout, released = tmp_path / "checkout", tmp_path / "dist"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            checkout.mkdir(exist_ok=True)
            shutil.copy(source, checkout)
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "A version")
    images = tmp_path / "images.json"
    images.write_text(json.dumps(SECTION))
    make(checkout, "--images", images)
    shutil.copytree(checkout / "dist", released)
    names = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()}
    shipped_configs = {f"pipelines/{path.name}" for path in arguments.CONFIGS.glob("*.yaml")}
    assert (
        names
        == {"NOTES.md", "SHA256SUMS", "constraints.txt", "images.json", WHEEL, SDIST}
        | shipped_configs
    )
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=released, check=True)
    # The same commit gives the same bytes, whatever an earlier build has left behind; git ignores it.
    (checkout / "build").mkdir(exist_ok=True)
    (checkout / "build" / "left").touch()
    assert "Skipped: the images, their digests, and the configs" in make(checkout, TZ="Asia/Tokyo")
    for name in (WHEEL, SDIST):
        assert (checkout / "dist" / name).read_bytes() == (released / name).read_bytes()
    # In a folder that has the pipeline's name in it, without what the wheel requires.
    installed, folder = tmp_path / "installed", tmp_path / "folder"
    with zipfile.ZipFile(released / WHEEL) as wheel:
        wheel.extractall(installed)
    (folder / "pipelines").mkdir(parents=True)
    (folder / "pipelines" / "__init__.py").touch()
    command = [sys.executable, "-m", "ptl", "compile", "tiny", "-o", "tiny.yaml"]
    command += ["--set", f"images={images.read_text()}"]
    subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(installed)}, check=True
    )
    monkeypatch.chdir(ROOT)
    configs.compile(
        arguments.CONFIGS / "tiny.yaml", tmp_path / "tiny.yaml", [f"images={images.read_text()}"]
    )
    for made in (folder / "tiny.yaml", released / "pipelines/tiny.yaml"):
        assert made.read_bytes() == (tmp_path / "tiny.yaml").read_bytes()
