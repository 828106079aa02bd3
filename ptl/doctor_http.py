"""The doctor's plain HTTP requests: MLflow's front door, image registries, Kubeflow's version."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.errors import InputError

SECONDS = 10
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)


def get(url: str, headers: dict[str, str] | None = None, ca_cert: str | None = None) -> tuple[int, str, Any]:
    """Status, body and headers, whatever the status. Raises InputError where nobody answers."""
    try:
        request = urllib.request.Request(url, headers=headers or {})
        trust = ssl.create_default_context(cafile=ca_cert) if ca_cert else None
        with urllib.request.urlopen(request, timeout=SECONDS, context=trust) as answer:
            return answer.status, answer.read().decode(errors="replace"), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace"), error.headers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        remedy = "is the server up, is the address right, may this machine reach it?"
        if isinstance(reason, ssl.SSLCertVerificationError):
            remedy = "name the CA bundle to trust: KFP_CA_CERT for Kubeflow, SSL_CERT_FILE for all else"
        raise InputError(f"{url}: {reason}; {remedy}") from error


def mlflow_fault(uri: str) -> tuple[str, str] | None:
    """What keeps requests out of an MLflow server, and the remedy; None when they come in.

    /health says 200 even where the host check or the login refuses everything else, so the API itself is asked.
    """
    parts = urllib.parse.urlsplit(uri)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or parts.username
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or parts.password
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    base = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    status, body, _ = get(f"{base}/api/2.0/mlflow/experiments/search?max_results=1", headers)
    if status == 403 and "host" in body.lower():
        name = parts.netloc.rpartition("@")[2]
        remedy = f'start it with --allowed-hosts "{name.partition(":")[0]}:*" (this replaces the default list)'
        return f"{base} refuses the host name {name} (403)", remedy
    if status in (401, 403):
        return f"{base} refuses this user ({status})", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status != 200:
        return f"{base} answers {status}: {body[:100]}", "is MLFLOW_TRACKING_URI an MLflow server of version 3?"
    return None


def manifest_status(image: str) -> int:
    """HTTP status of an image's manifest in its registry, asked as anybody may ask (with an anonymous token)."""
    name, _, tag = image.rpartition(":")
    host, _, repository = name.partition("/")
    local = host.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if local else 'https'}://{host}/v2/{repository}/manifests/{tag}"
    status, _, headers = get(url, {"Accept": MANIFESTS})
    challenge = headers.get("WWW-Authenticate", "")
    if status == 401 and challenge.lower().startswith("bearer "):
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = {key: fields[key] for key in ("service", "scope") if key in fields}
        answer_status, body, _ = get(f"{fields.get('realm', '')}?{urllib.parse.urlencode(query)}")
        answer = _object(body) if answer_status == 200 else None
        if answer is not None:
            token = answer.get("token") or answer.get("access_token")
            status, _, _ = get(url, {"Accept": MANIFESTS, "Authorization": f"Bearer {token}"})
    return status


@dataclass(frozen=True)
class Kubeflow:
    """What an API server says of itself; None where it does not say it."""

    version: str | None
    multi_user: bool | None


def kubeflow(host: str) -> Kubeflow:
    """The API server's version and mode. Raises InputError where it is not Kubeflow, or lets nobody in."""
    token, ca_cert = os.environ.get("KFP_TOKEN"), os.environ.get("KFP_CA_CERT")  # as `ptl submit` takes them
    file = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH")
    if file and not token:
        if not Path(file).is_file():
            raise InputError(f"KF_PIPELINES_SA_TOKEN_PATH: no file {file}")
        token = Path(file).read_text().strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = host.rstrip("/")
    status, body, _ = get(f"{base}/apis/v2beta1/healthz", headers, ca_cert)
    if status in (401, 403):
        raise InputError(
            f"{base} refuses this user ({status}); set KFP_TOKEN, or KF_PIPELINES_SA_TOKEN_PATH, to a token that is "
            "valid now"
        )
    if status != 200:
        raise InputError(f"{base} answers {status} to /apis/v2beta1/healthz; is --host the address of the API?")
    health = _object(body)
    if health is None:
        raise InputError(
            f"{base} answers with a page instead of JSON, which is what a login page does; set KFP_TOKEN to a token "
            "that is valid now, and make sure that --host is the address of the API"
        )
    tag, mode = health.get("tag_name"), health.get("multi_user")
    version = tag if isinstance(tag, str) and re.match(r"v?\d+\.\d+", tag) else None
    return Kubeflow(version, mode if isinstance(mode, bool) else None)


def _object(body: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else, such as a login page."""
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def numbers(version: str) -> tuple[int, int]:
    """Major and minor of `2.17.0`."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
