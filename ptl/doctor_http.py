"""The doctor's plain HTTP requests: MLflow's front door, image registries, Kubeflow's version."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl import address
from ptl.errors import InputError

SECONDS = 10
LIMIT = 1 << 20  # bytes of an answer
REDIRECTS = (301, 302, 303, 307, 308)
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the redirect itself is the answer."""


def get(
    url: str, headers: dict[str, str] | None = None, ca_cert: str | None = None, *, follow: bool = False
) -> tuple[int, str, Any]:
    """Status, body and headers, whatever the status.

    A login would go wherever a redirect points to, so only `follow`, for requests without a login of the user's, goes
    there. Raises InputError for a redirect, and where nobody answers.
    """
    if not url.startswith(("http://", "https://")):  # urllib also reads files, which a registry may name
        raise InputError(
            f"{address.page(url)[:200]}: not the address of a server; it must begin with https:// or http://"
        )
    try:
        request = urllib.request.Request(url)
        for name, value in (headers or {}).items():  # what a redirect does not take along
            request.add_unredirected_header(name, value)
        secure = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_cert))
        opener = urllib.request.build_opener(secure, *([] if follow else [_NoRedirect]))
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, _text(answer), answer.headers
    except urllib.error.HTTPError as error:
        if error.code in REDIRECTS and not follow:
            target = address.page(urllib.parse.urljoin(url, error.headers.get("Location", "")))
            raise InputError(
                f"{address.page(url)} redirects to {target}, where no login is sent; give that address if it is the "
                "server's own, or log in again if it is a login page"
            ) from error
        return error.code, _text(error), error.headers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        remedy = "is the server up, is the address right, may this machine reach it?"
        if isinstance(reason, ssl.SSLCertVerificationError):
            remedy = "name the CA bundle to trust: KFP_CA_CERT for Kubeflow, SSL_CERT_FILE for all else"
        raise InputError(f"{url}: {reason}; {remedy}") from error


def _text(answer: Any) -> str:
    """The body, as far as it matters here: no answer that is asked for is long. Raises TimeoutError for a slow one."""
    deadline, body = time.monotonic() + SECONDS, b""
    while len(body) < LIMIT and (piece := answer.read1(LIMIT)):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError("the answer takes too long")
    if len(body) < min(LIMIT, int(answer.headers.get("Content-Length") or 0)):
        raise http.client.IncompleteRead(body)
    return body[:LIMIT].decode(errors="replace")


def mlflow_fault(uri: str) -> tuple[str, str] | None:
    """What keeps requests out of an MLflow server, and the remedy; None when they come in. `uri` has no login in it.

    /health says 200 even where the host check or the login refuses everything else, so the API itself is asked.
    """
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    base = uri.rstrip("/")
    status, body, _ = get(f"{base}/api/2.0/mlflow/experiments/search?max_results=1", headers)
    if status == 403 and "host" in body.lower():
        name = urllib.parse.urlsplit(uri).netloc
        remedy = f'start it with --allowed-hosts "{name.partition(":")[0]}:*" (this replaces the default list)'
        return f"{base} refuses the host name {name} (403)", remedy
    if status in (401, 403):
        return f"{base} refuses this user ({status})", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status != 200:
        return f"{base} answers {status}: {body[:100]}", "is MLFLOW_TRACKING_URI an MLflow server of version 3?"
    if _object(body) is None:
        remedy = "log in again where it is a login page, or correct MLFLOW_TRACKING_URI"
        return f"{base} answers with a page instead of JSON", remedy
    return None


def manifest_status(image: str) -> int:
    """HTTP status of an image's manifest in its registry, asked as anybody may ask (with an anonymous token)."""
    name, _, tag = image.rpartition(":")
    host, _, repository = name.partition("/")
    local = host.partition(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if local else 'https'}://{host}/v2/{repository}/manifests/{tag}"
    status, _, headers = get(url, {"Accept": MANIFESTS}, follow=True)
    challenge = headers.get("WWW-Authenticate", "")
    if status == 401 and challenge.lower().startswith("bearer "):
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = {key: fields[key] for key in ("service", "scope") if key in fields}
        answer_status, body, _ = get(f"{fields.get('realm', '')}?{urllib.parse.urlencode(query)}", follow=True)
        answer = _object(body) if answer_status == 200 else None
        if answer is not None:
            token = answer.get("token") or answer.get("access_token")
            status, _, _ = get(url, {"Accept": MANIFESTS, "Authorization": f"Bearer {token}"}, follow=True)
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
