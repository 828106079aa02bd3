"""A real S3 server (SeaweedFS) on loopback, whose ports answer nobody without a key."""

from __future__ import annotations

import datetime
import json
import secrets
import shutil
import sys
import time
from pathlib import Path

from ptl import extras
from ptl.errors import WorkError
from ptl.extras import AbsentError
from ptl.local import server_process
from ptl.local.server_process import HOST, START_SECONDS
from ptl.processes import Environment
from ptl.storage import local_files

BUCKET = "ptl"
GRPC = 10000  # from a port of SeaweedFS to its gRPC port


def up(root: Path, port: int) -> Environment:
    """Start SeaweedFS, unless it runs; the environment that reaches it. Its keys are made once for each root."""
    environment = {
        **access_keys(root),
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": server_process.address(port),
    }
    if not server_process.needs_start(root, "s3", port):
        return environment

    weed = binary()
    ports = {
        "s3": port,
        "filer": port + 1,
        "master": port + 2,
        "volume": port + 3,
    }
    for part_port in ports.values():
        server_process.require_free("--s3-port", part_port)
        server_process.require_free("--s3-port", part_port + GRPC)
    # Apart from `stack`: its logs and keys are no data.
    data = root / "s3"
    data.mkdir(parents=True, exist_ok=True)
    server_process.start(
        root,
        "s3",
        _command(weed, data, ports),
        environment | _closed_doors(root) | {"GOMEMLIMIT": "768MiB"},  # soft limit of its heap
        port,
        "/healthz",
    )
    _await_bucket(environment)
    return environment


def binary() -> str:
    """SeaweedFS, which has been tried. Raises InputError where there is none or it does not run here."""
    # Where pip puts it, also when that is not on PATH.
    weed = shutil.which("weed") or shutil.which("weed", path=Path(sys.executable).parent)
    if weed is None:
        raise AbsentError("no `weed` binary", field="S3 server", remedy=extras.install("pipelines"))
    remedy = "put a `weed` for this system on PATH, or set MLFLOW_TRACKING_URI and S3 servers of your own"
    extras.check_loads("SeaweedFS", (weed, "version"), field="S3 server", remedy=remedy)
    return weed


def _command(weed: str, data: Path, ports: dict[str, int]) -> list[str]:
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


def access_keys(root: Path) -> Environment:
    """The S3 server's credentials, which only this user may read."""
    path = server_process.folder(root) / "keys.json"
    if not path.is_file():
        keys = {
            "AWS_ACCESS_KEY_ID": "ptl",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        }
        local_files.replace(path, json.dumps(keys).encode(), 0o600)
    return dict(json.loads(path.read_text()))


def _closed_doors(root: Path) -> Environment:
    """Settings of SeaweedFS without which other local users could read and write: keys of its HTTP and gRPC ports.

    On the gRPC ports its parts, which are one process, know each other by one key and a certificate that signs itself.
    """
    folder = server_process.folder(root)
    certificate = folder / "grpc.crt"
    key = folder / "grpc.key"
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
