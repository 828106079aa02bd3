"""What a run made: `ptl fetch` its checkpoint, `ptl report` its pages, `ptl compare` its evaluations."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ptl import destination, localfs, locate, runs, store
from ptl.cli_options import Home, Servers
from ptl.errors import InputError
from ptl.manifest import FILES

RETRIES = "3"  # of a request to MLflow, within 12 seconds: a person waits for the answer


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (fetch, report, compare):
        app.command(command.__name__)(command)


def fetch(
    what: Annotated[str, typer.Argument(help=locate.FORMS, show_default=False)],
    dst: Annotated[Path, typer.Argument(help="folder to write; must not exist yet or be empty", show_default=False)],
    arm: Annotated[str, typer.Option(help="of a run: loop, its final model, or control")] = "loop",
    s3: Servers = False,
    home: Home = Path(".ptl"),
) -> None:
    """Copy a checkpoint, verified by its digest, into a folder of your own; with the model card of its run."""
    destination.check_free(dst.resolve())
    _reach(home, s3, what)
    found = locate.checkpoint(what, arm)
    _servers_of_directory(what, found.pointer.uri)
    _copy(found, dst)
    size = f"{found.pointer.params:,} parameters" if found.pointer.params else found.pointer.digest
    card = "" if found.card else "; without a model card: a run has one for its final checkpoint"
    print(f"wrote {dst}: {found.name}, {size}{card}")


def report(
    what: Annotated[str, typer.Argument(help="RUN_ID, a run's directory, or its result.json", show_default=False)],
    dst: Annotated[Path | None, typer.Argument(help="folder for the pages; none: report-<run>")] = None,
    s3: Servers = False,
    home: Home = Path(".ptl"),
) -> None:
    """Make a run's pages again from its result.json."""
    from jinja2 import UndefinedError

    from ptl.report import render

    _reach(home, s3, what)
    result = locate.result(what)
    try:
        if dst is None and not store.is_name(result["run_id"]):
            raise ValueError(f"run_id {result['run_id']!r} is not the name of a run")
        folder = dst or Path(f"report-{result['run_id']}")
        render(result, folder)
    except (OSError, ValueError, KeyError, TypeError, UndefinedError) as error:
        raise InputError(f"result: {what} is no result of a run ({error!r}); give its result.json") from error
    print(f"wrote {folder / 'report.html'}")


def compare(
    reference: Annotated[str, typer.Argument(help="folder with items.jsonl, RUN_ID:evaluate-4, or RUN_ID: its last")],
    candidate: Annotated[str, typer.Argument(help="likewise: what is compared with the reference")],
    margin: Annotated[float, typer.Option(help="loss of accuracy that is tolerated")] = 0.02,
    alpha: Annotated[float, typer.Option(help="significance level of the tests")] = 0.05,
    strict: Annotated[bool, typer.Option("--strict", help="pass only what is shown not inferior")] = False,
    s3: Servers = False,
    home: Home = Path(".ptl"),
) -> None:
    """Compare two evaluations item by item: exit code 0 not inferior, 1 inferior, 2 wrong input."""
    from rich.console import Console

    from ptl import compare as work

    _reach(home, s3, reference, candidate)
    with tempfile.TemporaryDirectory(prefix="ptl-compare-") as cache:
        old, new = (locate.evaluation(name, Path(cache)) for name in (reference, candidate))
        outcome = work.compare(old, new, margin, alpha, strict=strict)
    Console().print(work.table(outcome))
    raise typer.Exit(outcome.exit_code)


def _reach(home: Path, s3: bool, *names: str) -> None:
    """The environment that the names need: none for folders, the store's servers for --s3, MLflow for run ids."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
    if s3 or any(locate.needs_mlflow(name) for name in names):
        runs.reach(home.absolute(), s3)


def _servers_of_directory(what: str, uri: str) -> None:
    """Start `ptl up`'s servers for the directory of a run that was made with --s3."""
    if not Path(what).exists() or not uri.startswith("s3://") or "AWS_ACCESS_KEY_ID" in os.environ:
        return
    home = Path(what).resolve().parent.parent
    if (home / "stack").is_dir():
        runs.use(runs.start_servers(home))


def _copy(found: locate.Checkpoint, dst: Path) -> None:
    """Fill `dst` with a verified checkpoint, and the model card where it has one."""
    with destination.writing(dst) as work, localfs.full_disk(work):
        cache, out = work / "cache", work / destination.OUT
        shutil.rmtree(cache, ignore_errors=True)  # by a killed command
        try:
            folder = store.fetch(found.pointer, cache)
            if folder.is_relative_to(cache):
                folder.rename(out)
            else:  # a store of files hands out its own folder
                shutil.copytree(folder, out, ignore=shutil.ignore_patterns(FILES), dirs_exist_ok=True)
            if found.card is not None:
                (out / "README.md").write_bytes(found.card)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
