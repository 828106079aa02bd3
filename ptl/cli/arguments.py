"""Arguments and options that several commands have, each declared once, and what they stand for.

A config may be a shipped one: the pipeline, its configs and the examples are in the root of a checkout, or in an
installed package in ptl/shipped. A folder that a command writes appears complete or not at all, and one process writes
it at a time.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import ptl
from ptl import processes
from ptl.config.base import FOLDER
from ptl.config.data import TrainingData
from ptl.config.run import Calibration, Config, check, load_config, pairs
from ptl.config.schedule import MemoryGoal
from ptl.errors import InputError

PACKAGE = Path(ptl.__file__).parent
INSTALLED = PACKAGE / "shipped"  # setup.py makes it
ROOT = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
CONFIGS = ROOT / "pipelines" / "prune_tune_loop" / "configs"
CONFIG_HELP = "the run's YAML file, or the name of a shipped config"
HOME = Path(".ptl")  # default of --home
LOCK = "lock"  # beside the folder: held by the process that writes


def make_importable() -> None:
    """Let `pipelines` and `components` be those that belong to this package, whatever else has these names."""
    sys.path.insert(0, str(ROOT))


def config_file(text: str) -> Path:
    """The file of a config that is given by its path, or by the name of a shipped one."""
    path = Path(text)
    shipped = CONFIGS / f"{text}.yaml"
    # A name may have a dot in it, as qwen2.5-7b has.
    is_name = path.name == text and path.suffix not in (".yaml", ".yml")
    if not is_name or path.is_file():
        return path
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise InputError(
        f"no file {text}, and no shipped config of this name",
        field="config",
        remedy=f"give the path of a YAML file, or one of {names}",
    )


def shown(file: Path) -> str:
    """A config as it can be typed: a shipped one by its name, wherever it is installed."""
    return file.stem if file.parent == CONFIGS else str(file)


def home_option(home: Path) -> str:
    """The --home that a command which is printed needs, with a space before it; nothing for the default."""
    return "" if home == HOME else f" --home {shlex.quote(str(home))}"


def image_root(file: Path) -> Path:
    """The folder that stands for the images' working directory: the paths of a config below it are relative to it."""
    # The images hold the examples; a config of one's own says where its files are.
    return ROOT if file.absolute().parent == CONFIGS else Path.cwd()


def as_in_images(config: Config, file: Path) -> Config:
    """A config whose paths are those that its steps find in the images, from whatever folder it is compiled."""
    settings = config.model_dump(mode="json", context={FOLDER: image_root(file)})
    return check(Config, settings, str(file))


def load(file: Path, sets: list[str]) -> Config:
    """Read a config with its overrides; a memory as its target becomes a number of parameters, which is printed."""
    config = load_config(file, pairs("--set", sets))
    if not isinstance(config.schedule.target, MemoryGoal):
        return config
    from ptl.preflight import target  # may need torch

    config, sentence = target.with_number(config)
    print(sentence)
    return config


# Arguments.
ConfigFile = Annotated[
    Path, typer.Argument(help=CONFIG_HELP, show_default=False, parser=config_file)
]
CheckpointFolder = Annotated[
    Path, typer.Argument(help="folder of a Hugging Face checkpoint", show_default=False)
]
TargetFolder = Annotated[
    Path,
    typer.Argument(help="folder to write; it must be empty or not exist yet", show_default=False),
]

# Options.
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help=CONFIG_HELP, parser=config_file)]
Overrides = Annotated[
    list[str],
    # The factory stands for a default in the signatures, which all calls would share.
    typer.Option(
        "--set",
        help="override a field: --set schedule.target=0.3",
        default_factory=list,
        show_default=False,
    ),
]
Home = Annotated[
    Path, typer.Option("--home", help="where local runs, checkpoints and MLflow's database are")
]
Runner = Annotated[
    Literal["subprocess", "docker"],
    typer.Option(help="how the steps of a local run are executed: docker runs each in its image"),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="print one JSON document; everything else goes to the standard error"
    ),
]
Servers = Annotated[
    bool, typer.Option("--s3", help="use the servers of `ptl up`, as `ptl run --s3` does")
]
Rehearse = Annotated[
    bool,
    typer.Option(
        "--rehearse",
        help="the same steps with about 1 % of the work: minutes, and numbers without meaning",
    ),
]


@contextmanager
def printing_json(as_json: bool) -> Iterator[None]:
    """Let what a command prints go to the standard error where its output is one JSON document."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def print_json(document: Any) -> None:
    """Print the one document of a command with --json."""
    print(json.dumps(document, indent=2, default=str))


def check_given(section: Calibration | TrainingData, name: str) -> None:
    """Raise InputError where a command is to read own answers, which a step of a run writes."""
    if section.answers == "self":
        raise InputError(
            "self, and own answers are written by a step of `ptl run`",
            field=f"{name}.answers",
            remedy="set calibration.answers and training.answers to given, and name an answers.jsonl as the source",
        )


def check_free(dst: Path) -> None:
    """Raise InputError where something would be lost by writing `dst`, or where it cannot be replaced."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise InputError(
            f"{dst} is a file or not empty",
            field="dst",
            remedy="give a folder that does not exist yet",
        )
    # The rename at the end would fail, after all the work.
    if dst.is_mount():
        raise InputError(
            f"{dst} is a mount point, which cannot be replaced",
            field="dst",
            remedy=f"give a folder in it: {dst / 'model'}",
        )


@contextmanager
def writing(dst: Path) -> Iterator[Path]:
    """A folder that becomes `dst` when the block ends well: a kill leaves no half of a checkpoint there.

    What is beside it stays after an error, for the same command to resume from. Raises InputError when another process
    writes the same `dst`.
    """
    dst = dst.resolve()
    work = dst.with_name(f"{dst.name}.partial")
    out = work / "out"
    with (
        processes.interruptible(f"{dst} was not written; run the same command again"),
        processes.exclusive(work / LOCK, f"dst: {dst}"),
    ):
        check_free(dst)
        shutil.rmtree(out, ignore_errors=True)  # by a killed command
        out.mkdir()
        try:
            yield out
            out.rename(dst)
            shutil.rmtree(work)
        finally:
            shutil.rmtree(out, ignore_errors=True)
            # What may be resumed stays; a lock alone is nothing.
            if work.is_dir() and [path.name for path in work.iterdir()] == [LOCK]:
                shutil.rmtree(work)
