"""What a run made: `ptl fetch` its checkpoint or its report, `export` a checkpoint, `compare` evaluations.

`ptl gc` lists the checkpoints that nobody needs any more, and deletes them with --delete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl import __version__, processes
from ptl.cli import arguments
from ptl.cli.arguments import CONFIG_HELP, HOME, AsJson, Home, Servers, TargetFolder
from ptl.config.export import TYPES
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.lineage import locate
from ptl.lineage.gc import DAY, StoredFiles, delete_files, inventory
from ptl.local import runs
from ptl.log import doing
from ptl.storage import local_files, store
from ptl.storage.manifest import FILES, MLFLOW_META
from ptl.units import size

RETRIES = "3"  # of a request to MLflow, within 12 seconds: a person waits for the answer


def fetch(
    source: Annotated[str, typer.Argument(help=locate.FORMS, show_default=False)],
    dst: TargetFolder,
    arm: Annotated[
        Literal["loop", "control"],
        typer.Option(help="which arm of a run; the loop's model is the final one"),
    ] = "loop",
    report: Annotated[
        bool,
        typer.Option("--report", help="only the run's report, made again from its result.json"),
    ] = False,
    s3: Servers = False,
    home: Home = HOME,
) -> None:
    """Copy a checkpoint into your own folder and verify its digest; a run's final one comes with its model card."""
    doing(f"looking for {source}")
    # Before anything is started or fetched.
    arguments.check_free(dst.resolve())
    _reach_stores(home, s3, source)
    if report:
        _write_report(source, dst)
        return
    checkpoint = locate.checkpoint(source, arm)
    pointer = checkpoint.pointer
    _copy(checkpoint, dst)

    content = f"{pointer.params:,} parameters" if pointer.params else pointer.digest
    card = (
        "" if checkpoint.card else "; without a model card: a run has one for its final checkpoint"
    )
    print(f"wrote {dst}: {checkpoint.name}, {content}{card}")


def export(
    src: Annotated[Path, typer.Argument(help="folder of a checkpoint", show_default=False)],
    dst: Annotated[
        Path,
        typer.Argument(help="file or folder to write, for example model.gguf", show_default=False),
    ],
    to: Annotated[Literal["gguf", "compressed-tensors"], typer.Option(help="format")] = "gguf",
    type: Annotated[
        str,
        typer.Option(
            help=f"data type of the weights; gguf: auto (16 bits), {', '.join(TYPES['gguf'])}; "
            f"compressed-tensors: {', '.join(TYPES['compressed-tensors'])}"
        ),
    ] = "auto",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help=f"{CONFIG_HELP}; its calibration text is read for int8 and w4a16",
            parser=arguments.config_file,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert a checkpoint for another runtime: GGUF for llama.cpp, compressed-tensors for vLLM."""
    if dst.exists():
        raise InputError(f"{dst} exists", field="dst", remedy="give a name that does not")
    doing(f"loading libraries to convert {src}")
    from ptl.export import compressed_tensors, gguf
    from ptl.export.formats import context_notes
    from ptl.model import checkpoint

    types = ["auto", *TYPES["gguf"]] if to == "gguf" else TYPES[to]
    if type not in types:
        raise InputError(
            f"{type!r} is no type of {to}", field="--type", remedy=f"use {', '.join(types)}"
        )
    notes = context_notes(src)
    if to == "gguf":
        notes = [*gguf.write_gguf(src, dst, type), *notes]
    else:
        settings = load_config(config) if config else None
        if settings:
            arguments.check_given(settings.calibration, "calibration")
        sequences = (settings.calibration, settings.chat, settings.seed) if settings else ()
        compressed_tensors.write(src, dst, type, *sequences)
    written = [dst] if dst.is_file() else checkpoint.shards(dst)
    print(f"wrote {dst}: {sum(path.stat().st_size for path in written):,} bytes")
    for note in notes:
        print(f"note: {note}")


def _write_report(source: str, folder: Path) -> None:
    from pydantic import ValidationError

    from ptl.report.render import render
    from ptl.report.result import Result

    # It may be any JSON file.
    try:
        result = Result.model_validate(locate.result(source))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(
            f"{source} is no result of a run, or another version's ({reason})",
            field="result",
            remedy=f"give a result.json that ptl {__version__} has written",
        ) from error
    render(result, folder)
    print(f"wrote {folder / 'report.html'}")


def compare(
    reference: Annotated[
        str,
        typer.Argument(
            help="folder with items.jsonl, RUN_ID:evaluate-4, or RUN_ID for its final evaluation; "
            "a run's directory may stand for its id"
        ),
    ],
    candidate: Annotated[
        str, typer.Argument(help="the evaluation to compare with it, named the same way")
    ],
    margin: Annotated[
        float, typer.Option(help="drop in accuracy that is tolerated, as a share of the items")
    ] = 0.02,
    alpha: Annotated[float, typer.Option(help="significance level of the tests")] = 0.05,
    strict: Annotated[
        bool, typer.Option("--strict", help="pass only what is shown to be not inferior")
    ] = False,
    as_json: AsJson = False,
    s3: Servers = False,
    home: Home = HOME,
) -> None:
    """Compare two evaluations item by item. Exit code: 0 not inferior or unclear, 2 wrong input, 3 inferior."""
    doing(f"comparing {candidate} with {reference}")
    from ptl.evaluation import evaluate as work

    _reach_stores(home, s3, reference, candidate, items=True)
    with tempfile.TemporaryDirectory(prefix="ptl-compare-") as folder:
        # The files are read here, before the folder is removed.
        old, new = (
            work.read_items(locate.evaluation(name, Path(folder)))
            for name in (reference, candidate)
        )
    pairs, pass_at_n = work.compare(old, new, margin, alpha)
    if as_json:
        comparisons = {"tasks": pairs, "pass_at_n": pass_at_n}
        arguments.print_json(
            {
                kind: {task: asdict(pair) for task, pair in of_tasks.items()}
                for kind, of_tasks in comparisons.items()
            }
        )
    else:
        print(work.comparison_table(pairs, pass_at_n))
        lengths = work.answers_table(old, new)
        if lengths:
            print(lengths)
    raise typer.Exit(3 if any(pair.fails(strict) for pair in pairs.values()) else 0)


def _reach_stores(home: Path, s3: bool, *names: str, items: bool = False) -> None:
    """The environment that the names need: none for folders, the store's servers for --s3, MLflow for run ids.

    `items`: an evaluation is wanted, for which a run's directory needs MLflow too.
    """
    if s3 or any(locate.needs_mlflow(name, items=items) for name in names):
        homes = filter(None, map(_home_of, names))
        runs.reach(next(homes, home.absolute()), s3)
    # MLflow's own number of retries takes minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)


def _home_of(name: str) -> Path | None:
    """The .ptl that a run's directory is in, where its runs are tracked; None for other names."""
    folder = locate.run_directory(name)
    if folder is None:
        return None
    # A run's directory is HOME/runs/ID, unless it was copied.
    home = folder.resolve().parent.parent
    return home if (home / "mlflow.db").is_file() or (home / "stack").is_dir() else None


def _copy(checkpoint: locate.Checkpoint, dst: Path) -> None:
    """Fill `dst` with a verified checkpoint, without optimizer state, and the model card where it has one."""
    from ptl.model.checkpoint import STATE

    with arguments.writing(dst) as out, local_files.full_disk(out.parent):
        cache = out.with_name("cache")
        shutil.rmtree(cache, ignore_errors=True)  # by a killed command
        try:
            folder = store.fetch(checkpoint.pointer, cache)
            if folder.is_relative_to(cache):
                folder.rename(out)
            else:  # a store of files hands out its own folder
                local_files.copy_tree(folder, out, FILES, MLFLOW_META)
            (out / STATE).unlink(missing_ok=True)
            # What lies there describes the model that the run began with.
            (out / "README.md").unlink(missing_ok=True)
            if checkpoint.card is not None:
                (out / "README.md").write_bytes(checkpoint.card)
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def gc(
    experiment: Annotated[
        list[str], typer.Option(help="MLflow experiment; default: all that have runs")
    ] = [],  # noqa: B006
    run: Annotated[
        list[str],
        typer.Option(help="only this run; includes its checkpoints even if it is unfinished"),
    ] = [],  # noqa: B006
    older_than: Annotated[
        float, typer.Option(min=0, help="days since the last write; anything newer is kept")
    ] = 7.0,
    delete: Annotated[
        bool, typer.Option("--delete", help="delete; without this option nothing is changed")
    ] = False,
    as_json: AsJson = False,
    s3: Servers = False,
    home: Home = HOME,
) -> None:
    """List the checkpoints that are no longer needed, with their sizes; --delete removes them.

    Final checkpoints, exports, registered versions and what an unfinished run needs are kept, as are all records and
    scores.
    """
    doing("asking MLflow which checkpoints are needed")
    runs.reach(home.absolute(), s3)
    removed: list[StoredFiles] = []
    # Wrong names are refused before anything is deleted.
    given_up = [locate.find_run(name)[0].id for name in run]
    experiments = inventory(experiment, given_up, older_than)
    with contextlib.ExitStack() as stack, arguments.printing_json(as_json):
        for files in experiments:
            print(f"experiment {files.name}, in {files.location}")
            _print_list(files.stored)
            unneeded = [stored for stored in files.stored if not stored.needed]
            removed += unneeded
            if delete:
                _hold(stack, home, {stored.run for stored in unneeded})
                for stored in unneeded:
                    delete_files(files, stored)
    num_bytes = sum(stored.bytes for stored in removed)
    if as_json:
        arguments.print_json(
            {"deleted": delete, "bytes": num_bytes, "experiments": list(map(asdict, experiments))}
        )
        return
    summary = f"{len(removed)} items, {size(num_bytes)} ({num_bytes:,} bytes)"
    print(
        f"deleted: {summary}"
        if delete
        else f"can go: {summary}; nothing was deleted, --delete does it"
    )


def _hold(stack: contextlib.ExitStack, home: Path, run_ids: set[str]) -> None:
    """Take the locks of runs of this machine. Raises InputError for one that is at work."""
    for run_id in sorted(run_ids):
        lock = home.absolute() / "runs" / run_id / "lock"
        if lock.exists():
            stack.enter_context(
                processes.exclusive(lock, f"run {run_id}", remedy="end it first, or wait for it")
            )


def _print_list(stored: list[StoredFiles]) -> None:
    """For each run one line for everything that can go, and one for each reason to keep the rest."""
    # The oldest first in each run.
    for run_id, run_files in groupby(
        sorted(stored, key=attrgetter("run", "changed")), attrgetter("run")
    ):
        print(f"  run {run_id}")
        kept_bytes: Counter[str] = Counter()  # by reason
        for files in run_files:
            if files.needed:
                kept_bytes[files.needed] += files.bytes
                continue
            days = (time.time() - files.changed) / DAY
            print(f"    can go {size(files.bytes):>9} {files.step:16} {days:6.1f} days")
        for reason, num_bytes in kept_bytes.items():
            print(f"    kept   {size(num_bytes):>9} {reason}")
