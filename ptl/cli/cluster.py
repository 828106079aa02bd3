"""The commands for runs on a cluster: `ptl submit`, `cancel`, `retry`; `status` and `doctor` are for local runs too."""

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.prune_tune_loop import follow, kfp_api
from pipelines.prune_tune_loop.kfp_api import Server
from ptl import address
from ptl.cli import arguments, local_status
from ptl.cli.arguments import HOME, AsJson, ConfigFile, Home, Overrides, Rehearse
from ptl.cli.configs import local_paths, warn
from ptl.cli.run import announced, print_left_out
from ptl.config.run import pairs
from ptl.errors import InputError
from ptl.local import progress
from ptl.log import doing

Host = Annotated[str, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="API address")]
Namespace = Annotated[
    str | None, typer.Option(envvar="KFP_NAMESPACE", help="your profile in multi-user Kubeflow")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="KF_PIPELINES_SA_TOKEN_PATH",
        exists=True,
        help="file with a service-account token; default: KFP_TOKEN, or no login",
    ),
]
CaCert = Annotated[
    Path | None,
    typer.Option(
        envvar="KFP_CA_CERT", exists=True, help="CA bundle to trust (PEM); default: the public CAs"
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="do not check the server's certificate")]
UiHost = Annotated[
    str | None,
    typer.Option(
        envvar="KF_PIPELINES_UI_ENDPOINT", help="address of the UI, for links; default: --host"
    ),
]
RunId = Annotated[
    str,
    typer.Argument(help="id or name of the run, as `ptl submit` printed them", show_default=False),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", help="wait for the end; exit code 0 done, 1 failed, 3 gate not passed, 4 timeout"
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0, help="longest time to wait, in seconds; the run continues after that"),
]

_say = functools.partial(print, flush=True)


def _server_options(
    host: Host = "",
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    insecure: Insecure = False,
    ui_host: UiHost = None,
) -> None:
    """The options of every command that speaks to Kubeflow: the fields of Server."""


def _with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with these options in place of its parameter `server`: typer reads a signature."""
    signature = inspect.signature(command)
    options = inspect.signature(_server_options).parameters
    # The command's own options come first in its help.
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "server"]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        server = Server(**{name: values.pop(name) for name in options})
        command(server=server, **values)

    with_options.__signature__ = signature.replace(parameters=[*own, *options.values()])  # type: ignore[attr-defined]
    return with_options


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (submit, status, cancel, retry, doctor):
        app.command(command.__name__, rich_help_panel="Cluster")(_with_server_options(command))


def submit(
    server: Server,
    config: ConfigFile,
    sets: Overrides,
    params: Annotated[
        list[str], typer.Option("--param", help="run parameter: --param seed=1")
    ] = [],  # noqa: B006
    service_account: Annotated[
        str | None, typer.Option(help="service account of the run's pods; default: Kubeflow's own")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--new", help="take over nothing from unfinished runs of the same name")
    ] = False,
    rehearse: Rehearse = False,
    wait: Wait = False,
    timeout: Timeout = None,
) -> None:
    """Compile a config, upload it as a version of its pipeline, and start a run on Kubeflow."""
    doing(f"checking {arguments.shown(config)}")
    from pipelines.prune_tune_loop import submit as work
    from ptl.preflight import preflight

    # Warnings come before anything is sent.
    run_config = arguments.load(config, sets)
    warn(preflight.warnings(run_config))
    for warning in local_paths(run_config, config):
        _say(f"warning: {warning}")
    run_config = arguments.as_in_images(run_config, config)
    if rehearse:
        run_config, left_out = announced(run_config, None)
        print_left_out(left_out)
        _say("Its numbers will mean nothing. When it has succeeded, submit without --rehearse.")
    run_config.check_batches_on_cluster()
    code = work.submit(
        run_config,
        server,
        given=pairs("--param", params),
        service_account=service_account,
        fresh=fresh,
        wait=wait,
        timeout=timeout,
        say=_say,
    )
    raise typer.Exit(code)


def status(
    server: Server,
    run_id: Annotated[
        str,
        typer.Argument(
            help="id or name of a run, here or on a cluster; a local run may be named by its directory; "
            "default: list the newest local runs",
            show_default=False,
        ),
    ] = "",
    home: Home = HOME,
    as_json: AsJson = False,
) -> None:
    """Print a run and its steps as a table; exit code 1 if it failed, was canceled or was interrupted."""
    if not run_id:
        runs = local_status.list_runs(home)
        if as_json:
            arguments.print_json({"runs": list(map(local_status.document, runs))})
        else:
            print(local_status.runs_table(runs, home))
        return
    run = local_status.find(run_id, home)
    if run is not None:
        if as_json:
            arguments.print_json(local_status.document(run))
        else:
            print(local_status.text(run))
        raise typer.Exit(int(run.state in (progress.FAILED, progress.INTERRUPTED)))
    if not server.host:
        raise InputError(
            f"{home} has no run {run_id}, and no cluster is named",
            field="run",
            remedy="`ptl status` lists the runs here; --home names another folder, KF_PIPELINES_ENDPOINT a cluster",
        )
    documents: list[dict[str, Any]] = []
    doing(f"asking Kubeflow for {run_id}")
    with arguments.printing_json(as_json):
        code = follow.status(run_id, server, say=_say, write=documents.append)
    if as_json:
        arguments.print_json(documents[0])
    raise typer.Exit(code)


def cancel(server: Server, run_id: RunId) -> None:
    """Cancel a run; its finished steps are kept, and `ptl retry` resumes from them."""
    doing(f"asking Kubeflow to end {run_id}")
    raise typer.Exit(follow.cancel(run_id, server, say=_say))


def retry(server: Server, run_id: RunId, wait: Wait = False, timeout: Timeout = None) -> None:
    """Run the unfinished steps of a failed or canceled run again."""
    doing(f"asking Kubeflow for {run_id}")
    raise typer.Exit(follow.retry(run_id, server, wait=wait, timeout=timeout, say=_say))


def doctor(
    server: Server,
    config: ConfigFile,
    sets: Overrides,
    local: Annotated[
        bool | None,
        typer.Option(
            "--local/--cluster",
            help="where the run is to go; default: a cluster if the environment names one",
        ),
    ] = None,
    home: Home = HOME,
    kubeflow_namespace: Annotated[
        str, typer.Option(help="namespace of Kubeflow itself")
    ] = "kubeflow",
) -> None:
    """Check what a run will need before it costs anything; exit code 1 on an error."""
    doing(f"loading libraries to check {arguments.shown(config)}")
    from ptl.preflight import doctor as machine
    from ptl.preflight import doctor_cluster

    run_config = arguments.load(config, sets)
    if local is None:
        local = not server.host and not address.is_server(os.environ.get("MLFLOW_TRACKING_URI", ""))
        other = (
            "--cluster checks one on Kubeflow" if local else "--local checks one on this machine"
        )
        _say(f"checking a run on {'this machine' if local else 'a cluster'} ({other})")
    if local:
        findings = machine.local(run_config, home)
    else:
        health = functools.partial(_health, server) if server.host else None
        findings = doctor_cluster.cluster(run_config, health, server.namespace, kubeflow_namespace)
    print(*findings, sep="\n", flush=True)
    raise typer.Exit(int(any(finding.state == "error" for finding in findings)))


def _health(server: Server) -> dict[str, Any]:
    """Kubeflow's version (`tag_name`) and mode (`multi_user`), asked as `ptl submit` asks."""
    api = kfp_api.connect(server).client._healthz_api  # the client's own record has no version
    with kfp_api.explained(server.host):
        return dict(json.loads(api.healthz_service_get_healthz(_preload_content=False).data))
