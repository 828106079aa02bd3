"""`ptl`, the composition root: it puts the groups of commands together and turns errors into exit codes."""

from __future__ import annotations

import errno
import sys
from typing import Annotated, NoReturn

import typer

from ptl import __version__, address, extras
from ptl.cli import cluster, configs, results, run, steps
from ptl.errors import InputError, PtlError
from ptl.storage import local_files

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,  # a bug's traceback goes into an issue: as Python prints it
)

# A path in a command's input that cannot be used.
UNUSABLE_PATH = {
    errno.ENAMETOOLONG,  # too long
    errno.ENOTDIR,  # a file where a folder is due
    errno.ELOOP,  # links in a circle
    errno.EACCES,  # no permission
    errno.EROFS,  # a read-only file system
}


def main() -> None:
    """Run a command; an error that a user can fix is one message and its exit code, without a traceback."""
    # Before MLflow is used: it prints the address.
    address.split_login()
    try:
        app(standalone_mode=True)
    except PtlError as error:
        _exit_with(error)
    except ModuleNotFoundError as error:
        # its options come after it
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        missing = extras.missing(error.name or "", command)
        if missing is None:
            raise
        _exit_with(missing)
    except OSError as error:
        # Libraries raise it in places where no command can expect it.
        if error.errno in local_files.FULL:
            _exit_with(local_files.no_space(error))
        if error.errno not in UNUSABLE_PATH:
            raise
        path = repr(str(error.filename)[:200])
        _exit_with(
            InputError(f"{error.strerror}", field=path, remedy="give a path that can be used")
        )


def _exit_with(error: PtlError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Compress a language model without losing its reasoning."""


# In this order `ptl --help` lists them.
COMMANDS = (
    configs.init,
    configs.validate,
    configs.plan,
    configs.compile,
    run.run,
    run.up,
    run.images,
    results.fetch,
    results.export,
    results.compare,
    results.gc,
)
for command in COMMANDS:
    app.command()(command)
for step in (steps.import_model, steps.prune, steps.recover, steps.evaluate):
    app.command(rich_help_panel="Single steps")(step)
cluster.add_to(app)

if __name__ == "__main__":
    main()
