"""The commands for runs on a cluster: `ptl submit`, `status`, `cancel`, `retry`, `doctor`. `ptl/cli.py` adds them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.prune_tune_loop.kfp_api import Server
from ptl import advice, extras
from ptl.cli_options import Overrides
from ptl.config import load_config, pairs
from ptl.errors import InputError

Host = Annotated[str | None, typer.Option(help="API address; none: KF_PIPELINES_ENDPOINT")]
Namespace = Annotated[str | None, typer.Option(help="profile, in multi-user Kubeflow; none: KFP_NAMESPACE")]
TokenFile = Annotated[Path | None, typer.Option(help="service-account token; none: KFP_TOKEN, or no login")]
CaCert = Annotated[Path | None, typer.Option(help="PEM bundle to trust; none: KFP_CA_CERT, or the public CAs")]
Insecure = Annotated[bool, typer.Option("--insecure", help="do not check the server's certificate")]
UiHost = Annotated[str | None, typer.Option(help="address of the UI, for links; none: as --host")]
RunId = Annotated[str, typer.Argument(help="id of the run, printed by submit", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="follow to the end: 0 done, 1 failed, 3 gate not passed, 4 timeout")]
Timeout = Annotated[float | None, typer.Option(min=0, help="seconds to wait; the run continues after them")]
Poll = Annotated[float, typer.Option(min=1, max=3600, help="seconds between looks")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (submit, status, cancel, retry, doctor):
        app.command(command.__name__, rich_help_panel="Cluster")(command)


def submit(
    config: Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)],
    sets: Overrides,
    params: Annotated[list[str], typer.Option("--param", help="run parameter: --param seed=1")] = [],  # noqa: B006
    experiment: Annotated[str | None, typer.Option(help="Kubeflow experiment; none: storage.experiment")] = None,
    version_name: Annotated[str | None, typer.Option(help="none: version of ptl and digest of the YAML")] = None,
    service_account: Annotated[str | None, typer.Option(help="of the run's pods; none: Kubeflow's default")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    poll: Poll = 15,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    insecure: Insecure = False,
    ui_host: UiHost = None,
) -> None:
    """Compile a config, upload it as a version of its pipeline, and start a run on Kubeflow."""
    from pipelines.prune_tune_loop import containers
    from pipelines.prune_tune_loop import submit as work

    extras.need("kfp", "submit")
    checked = load_config(config, pairs("--set", sets))
    for warning in advice.warnings(checked):
        print(f"warning: {warning}", file=sys.stderr)
    for path in sorted(containers.files(checked)):
        if not path.is_relative_to(Path.cwd() / "examples"):  # which the images hold
            _say(f"warning: {path} is on this machine; steps on the cluster look for it in their own pods")
    code = work.submit(
        checked,
        Server(host, namespace, None, token_file, ca_cert, not insecure, ui_host),
        experiment=experiment,
        parameters=pairs("--param", params),
        version=version_name,
        service_account=service_account,
        wait=wait,
        timeout=timeout,
        poll=poll,
        say=_say,
    )
    raise typer.Exit(code)


def status(
    run_id: RunId,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    insecure: Insecure = False,
    ui_host: UiHost = None,
) -> None:
    """Print a run and its steps as a table; exit code 1 when it failed or was canceled."""
    from pipelines.prune_tune_loop import follow as work

    server = Server(host, namespace, None, token_file, ca_cert, not insecure, ui_host)
    raise typer.Exit(work.status(run_id, server, say=_say))


def cancel(
    run_id: RunId,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    insecure: Insecure = False,
) -> None:
    """End a run; its finished steps stay, and `ptl retry` resumes from them."""
    from pipelines.prune_tune_loop import follow as work

    server = Server(host, namespace, None, token_file, ca_cert, not insecure)
    raise typer.Exit(work.cancel(run_id, server, say=_say))


def retry(
    run_id: RunId,
    config: Annotated[Path | None, typer.Option(help="the run's YAML file: its gate decides the exit code")] = None,
    wait: Wait = False,
    timeout: Timeout = None,
    poll: Poll = 15,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    insecure: Insecure = False,
    ui_host: UiHost = None,
) -> None:
    """Run a failed run's unfinished steps again."""
    from pipelines.prune_tune_loop import follow as work

    server = Server(host, namespace, None, token_file, ca_cert, not insecure, ui_host)
    checked = load_config(config) if config else None
    raise typer.Exit(work.retry(run_id, server, config=checked, wait=wait, timeout=timeout, poll=poll, say=_say))


def doctor(
    config: Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)],
    sets: Overrides,
    local: Annotated[
        bool | None,
        typer.Option("--local/--cluster", help="where the run goes; none: a cluster if the environment names one"),
    ] = None,
    runner: Annotated[str, typer.Option(help="of a local run: subprocess, or docker")] = "subprocess",
    home: Annotated[Path, typer.Option(help="of a local run: where runs and checkpoints are")] = Path(".ptl"),
    host: Host = None,
    namespace: Annotated[str | None, typer.Option(help="where the run's pods start; none: KFP_NAMESPACE")] = None,
    kubeflow_namespace: Annotated[str, typer.Option(help="where Kubeflow itself is")] = "kubeflow",
) -> None:
    """Try out what a run will need before it costs anything; exit code 1 on an error."""
    import os

    from ptl import doctor as work
    from ptl import images

    checked = load_config(config, pairs("--set", sets))
    if runner not in ("subprocess", "docker"):
        raise InputError(f"--runner: {runner!r} must be subprocess or docker")
    address = host or os.environ.get("KF_PIPELINES_ENDPOINT")
    reason = work.names_a_cluster(address)
    if local is None:
        local = reason is None
        other = "--cluster checks one on Kubeflow" if local else f"{reason}; --local checks one on this machine"
        _say(f"checking a run on {'this machine' if local else 'a cluster'} ({other})")
    if local:
        lines = work.local(checked, home=home, runner=runner, missing_images=images.missing)
    else:
        own = namespace or os.environ.get("KFP_NAMESPACE")
        lines = work.cluster(checked, host=address, namespace=own, kubeflow_namespace=kubeflow_namespace)
    for line in lines:
        _say(str(line))
    raise typer.Exit(work.exit_code(lines))


def _say(text: str) -> None:
    print(text, flush=True)
