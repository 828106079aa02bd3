"""`ptl up`: real S3 (SeaweedFS) and MLflow servers on loopback, with their data below `root`, an absolute path.

Each server is noted in `root/stack/<name>.service.json`, by which a later command finds and stops it.
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

from ptl import extras, processes
from ptl.address import experiments_page
from ptl.errors import InputError, WorkError
from ptl.extras import AbsentError
from ptl.lineage import mlflow_client
from ptl.processes import Environment
from ptl.storage import local_files

HOST = "127.0.0.1"
S3_PORT = 8433  # and the next three; SeaweedFS also takes each of the four + GRPC
GRPC = 10000  # from a port of SeaweedFS to its gRPC port
MLFLOW_PORT = 15000
BUCKET = "ptl"
START_SECONDS = 90  # for a server's first answer
STOP_SECONDS = 15  # after each signal
LOG_LINES = 15  # of a server that does not start, in the error


@dataclass(frozen=True)
class Service:
    """A server process, as it is noted."""

    pid: int
    started: str  # distinguishes it from a later process with the same id
    port: int

    @property
    def is_alive(self) -> bool:
        return processes.start_time(self.pid) == self.started != ""


def up(root: Path, *, s3_port: int | None = None, mlflow_port: int | None = None) -> Environment:
    """Start what is not running yet, wait until it answers, and return the environment for steps and `ptl run`.

    Ports are by default those of the running servers, else S3_PORT and MLFLOW_PORT. Data is in `root/s3` and
    `root/stack`. Raises InputError for a port in use, WorkError with the end of the log when a server does not start.
    """
    stack = folder(root)
    s3_port = s3_port or _last_port(root, "s3", S3_PORT)
    mlflow_port = mlflow_port or _last_port(root, "mlflow", MLFLOW_PORT)
    with processes.exclusive(stack / "lock", f"`ptl up` in {root}", wait=START_SECONDS):
        # MLflow's port is checked before S3 is started, which would be left running.
        _needs_start(root, "mlflow", mlflow_port)
        environment = s3_up(root, s3_port)
        environment["MLFLOW_TRACKING_URI"] = address(mlflow_port)
        database = f"sqlite:///{stack / 'mlflow.db'}"
        mlflow_up(root, mlflow_port, database, f"s3://{BUCKET}/mlflow", environment)
    return environment


def mlflow_up(root: Path, port: int, database: str, artifacts: str, env: Environment) -> None:
    """Start the MLflow server alone, unless it runs; `artifacts` is where new experiments keep their files."""
    if _needs_start(root, "mlflow", port):
        mlflow_client.create_database(database, artifacts)
        start(
            root,
            "mlflow",
            _mlflow_command(port, artifacts),
            env | _mlflow_environment(database),
            port,
            "/health",
        )


def s3_up(root: Path, port: int) -> Environment:
    """Start SeaweedFS, unless it runs; the environment that reaches it. Its keys are made once for each root."""
    environment = {
        **access_keys(root),
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": address(port),
    }
    if not _needs_start(root, "s3", port):
        return environment
    weed = weed_binary()
    ports = {"s3": port, "filer": port + 1, "master": port + 2, "volume": port + 3}
    for part_port in ports.values():
        _require_free("--s3-port", part_port)
        _require_free("--s3-port", part_port + GRPC)
    # Apart from `stack`: its logs and keys are no data.
    data = root / "s3"
    data.mkdir(parents=True, exist_ok=True)
    own = _closed_doors(root) | {"GOMEMLIMIT": "768MiB"}  # soft limit of its heap
    start(root, "s3", _s3_command(weed, data, ports), environment | own, port, "/healthz")
    _await_bucket(environment)
    return environment


def down(root: Path) -> list[str]:
    """Stop exactly the servers that `up` started under this root; returns their names."""
    return [name for name in ("mlflow", "s3") if stop(root, name)]


def ui(root: Path, port: int) -> NoReturn:
    """Replace this process by the MLflow server over the database of local runs, `root/mlflow.db`; Ctrl-C stops it.

    Raises InputError when there is no database yet or the port is in use.
    """
    database = root / "mlflow.db"
    if not database.is_file():
        raise InputError(
            f"no runs yet in {root} (no {database.name})",
            field="--ui",
            remedy="start one with `ptl run CONFIG`",
        )
    _require_free("--mlflow-port", port)
    print(f"your runs in MLflow: {experiments_page(address(port))} (Ctrl-C stops it)", flush=True)
    os.environ.update(_mlflow_environment(f"sqlite:///{database}"))
    # In place of this process: Ctrl-C goes to the server itself.
    os.execv(sys.executable, _mlflow_command(port, f"file://{root / 'artifacts'}"))


def _mlflow_command(port: int, artifacts: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--host={HOST}",
        f"--port={port}",
        "--workers=1",
    ]
    return [*command, f"--default-artifact-root={artifacts}", "--no-serve-artifacts"]


def _mlflow_environment(database: str) -> Environment:
    return {
        # Not as an option: a password must not be in the process list.
        "MLFLOW_BACKEND_STORE_URI": database,
        # It would start eight more processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _needs_start(root: Path, name: str, port: int) -> bool:
    """Whether a server is still to be started. Raises InputError if it runs on another port, or its port is taken."""
    service = _noted_service(root, name)
    if service is None or not service.is_alive:
        _require_free(f"--{name}-port", port)
        return True
    if service.port != port:
        raise InputError(
            f"the {name} server of {root} already runs on port {service.port}",
            field=f"--{name}-port",
            remedy="`ptl up --stop` first",
        )
    return False


def _require_free(option: str, port: int) -> None:
    """Raise InputError, naming the option, for a port that a server cannot take."""
    if not 1 <= port <= 65535:
        raise InputError(
            f"port {port} must be in 1..65535 (SeaweedFS takes its ports + 10000 too)", field=option
        )
    with socket.socket() as probe:
        # As the servers do: connections of an earlier one that are closing do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} is in use ({error.strerror})", field=option, remedy="choose another"
            ) from error


def start(
    root: Path, name: str, command: list[str], env: Environment, port: int, health: str
) -> None:
    """Start a server, note it, and wait until it answers; `health` is the path to ask."""
    log = folder(root) / f"{name}.log"
    # MLflow logs the database's address with its password.
    log.touch(mode=0o600)
    environment = os.environ | env
    # A server must not take another one's address from the caller's environment.
    if "MLFLOW_TRACKING_URI" not in env:
        environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    service = Service(process.pid, processes.start_time(process.pid), port)
    note = _note(root, name)
    local_files.replace(note, json.dumps(asdict(service)).encode())

    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if answers(f"{address(port)}{health}"):
            return
        time.sleep(0.1)
    problem = f"ended with code {process.returncode}"
    if process.returncode is None:
        problem = f"did not answer within {START_SECONDS} s"
        _end(service)
    # Nothing is left of it but its log, whose end says what was wrong.
    note.unlink()
    log_end = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    raise WorkError(f"{name} server {problem}; the end of {log}:\n{log_end}")


def stop(root: Path, name: str) -> bool:
    """Stop a server (`s3` or `mlflow`); returns whether it ran."""
    service = _noted_service(root, name)
    was_alive = service is not None and service.is_alive
    if service is not None and was_alive:
        _end(service)
    _note(root, name).unlink(missing_ok=True)
    return was_alive


def _end(service: Service) -> None:
    """SIGTERM to the process group, SIGKILL when that is not enough. MLflow's workers are in its group."""
    os.killpg(service.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while service.is_alive:
        if time.monotonic() > deadline:
            os.killpg(service.pid, signal.SIGKILL)
            deadline += STOP_SECONDS
        time.sleep(0.05)


def _last_port(root: Path, name: str, default: int) -> int:
    service = _noted_service(root, name)
    return service.port if service else default


def address(port: int) -> str:
    """Of a server on this machine."""
    return f"http://{HOST}:{port}"


def answers(url: str) -> bool:
    """Whether a server says there that all is well."""
    import requests

    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


def folder(root: Path) -> Path:
    """Where notes, logs and keys of the servers are."""
    stack = root / "stack"
    stack.mkdir(parents=True, exist_ok=True)
    return stack


def _noted_service(root: Path, name: str) -> Service | None:
    note = _note(root, name)
    return Service(**json.loads(note.read_text())) if note.is_file() else None


def _note(root: Path, name: str) -> Path:
    return root / "stack" / f"{name}.service.json"


def weed_binary() -> str:
    """SeaweedFS, which has been tried. Raises InputError where there is none or it does not run here."""
    # Where pip puts it, also when that is not on PATH.
    weed = shutil.which("weed") or shutil.which("weed", path=Path(sys.executable).parent)
    if weed is None:
        raise AbsentError("no `weed` binary", field="S3 server", remedy=extras.install("pipelines"))
    remedy = "put a `weed` for this system on PATH, or set MLFLOW_TRACKING_URI and S3 servers of your own"
    extras.check_loads("SeaweedFS", (weed, "version"), field="S3 server", remedy=remedy)
    return weed


def _s3_command(weed: str, data: Path, ports: dict[str, int]) -> list[str]:
    return [
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
        *[f"-{part}.port={port}" for part, port in ports.items()],
    ]


def _await_bucket(environment: Environment) -> None:
    """/healthz answers before the bucket is there."""
    import boto3
    from botocore.exceptions import WaiterError

    # With the server's keys alone, whatever the caller's environment holds.
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )
    waiter = client.get_waiter("bucket_exists")
    try:
        waiter.wait(Bucket=BUCKET, WaiterConfig={"Delay": 1, "MaxAttempts": START_SECONDS})
    except WaiterError as error:
        raise WorkError(
            f"bucket {BUCKET} did not appear within {START_SECONDS} s: {error}", field="s3 server"
        ) from error


def access_keys(root: Path) -> Environment:
    """The S3 server's credentials, which only this user may read."""
    path = folder(root) / "keys.json"
    if not path.is_file():
        keys = {"AWS_ACCESS_KEY_ID": "ptl", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
        local_files.replace(path, json.dumps(keys).encode(), 0o600)
    return dict(json.loads(path.read_text()))


def _closed_doors(root: Path) -> Environment:
    """Settings of SeaweedFS without which other local users could read and write: keys of its HTTP and gRPC ports.

    On the gRPC ports its parts, which are one process, know each other by one key and a certificate that signs itself.
    """
    certificate = folder(root) / "grpc.crt"
    key = folder(root) / "grpc.key"
    if not certificate.is_file():  # made once per root
        _make_certificate(certificate, key)
    settings = {"WEED_GRPC_CA": str(certificate)}
    for part in ("ADMIN", "CLIENT", "FILER", "MASTER", "S3", "VOLUME", "WORKER"):
        settings[f"WEED_GRPC_{part}_CERT"] = str(certificate)
        settings[f"WEED_GRPC_{part}_KEY"] = str(key)
    # Without these the volumes' port reads and writes with no credentials.
    for part in ("JWT_SIGNING", "JWT_FILER_SIGNING"):
        settings[f"WEED_{part}_KEY"] = secrets.token_hex(32)
        settings[f"WEED_{part}_READ_KEY"] = secrets.token_hex(32)
    return settings


def _make_certificate(certificate: Path, key: Path) -> None:
    """A new key that only this user may read, and its certificate, written last."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ptl up")])
    host_names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    # A clock that is a little late must not refuse it; 100 years are for ever.
    signed = (
        x509.CertificateBuilder(name, name, private_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 100 * 365 * day)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(host_names, critical=False)
        .sign(private_key, hashes.SHA256())
    )
    # Private before it holds anything.
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(
        private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
