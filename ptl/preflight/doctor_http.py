"""The doctor's plain HTTP requests: MLflow's front door, image registries, Kubeflow's version."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import requests
import urllib3

from ptl import address
from ptl.errors import InputError

SECONDS = 10  # for the connection, for each read, and for all of the content
LIMIT = 1 << 20  # bytes of an answer
REDIRECTS = (301, 302, 303, 307, 308)
REFUSED = (401, 403)
LOCAL = ("localhost", "127.0.0.1")
# Media types of an image's manifest.
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, "
    "application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)


@dataclass(frozen=True)
class Answer:
    """What a server says."""

    status: int
    text: str  # at most LIMIT bytes
    headers: Mapping[str, str]  # upper and lower case are the same

    def json_object(self) -> dict[str, Any] | None:
        """A JSON object, or None for anything else, such as a login page."""
        try:
            content = json.loads(self.text)
        except ValueError:
            return None
        return content if isinstance(content, dict) else None


def get(
    url: str,
    headers: Mapping[str, str] | None = None,
    ca_cert: str | None = None,
    *,
    follow: bool = False,
    body: Mapping[str, Any] | None = None,
) -> Answer:
    """The answer, whatever its status; with a `body` to a POST.

    A login would go wherever a redirect points to, so only `follow`, for requests without a login of the user's, goes
    there. Raises InputError for a redirect, and where nobody answers.
    """
    page = address.page(url)
    if not url.startswith(("http://", "https://")):  # a registry may name anything
        raise InputError(
            "not the address of a server", field=page[:200], remedy="it must begin with https:// or http://"
        )
    try:
        with _session(url, ca_cert) as session:
            response = session.request(
                "GET" if body is None else "POST",
                url,
                headers=headers,
                json=body,
                timeout=SECONDS,
                allow_redirects=follow,
                stream=True,
            )
            answer = Answer(response.status_code, _text(response), response.headers)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        raise _no_answer(url, error) from error
    if answer.status in REDIRECTS and not follow:
        target = address.page(urljoin(url, answer.headers.get("Location", "")))
        raise InputError(
            f"{page} redirects to {target}, where no login is sent",
            remedy="give that address if it is the server's own, or log in again if it is a login page",
        )
    return answer


def _session(url: str, ca_cert: str | None) -> requests.Session:
    session = requests.Session()
    # Of the environment only the proxies: ~/.netrc would add a login of its own, and replace ours.
    session.trust_env = False
    session.proxies = requests.utils.get_environ_proxies(url)
    # What OpenSSL trusts, unless a CA bundle is named: requests alone would trust a bundle of its own.
    # It reads SSL_CERT_FILE and SSL_CERT_DIR, and passes over what does not exist.
    system = ssl.get_default_verify_paths()
    session.verify = ca_cert or system.cafile or system.capath or True
    session.headers["Accept-Encoding"] = "identity"  # the limit is one of bytes on the wire
    return session


def _text(response: requests.Response) -> str:
    """The content, as far as it matters: no answer that is asked for is long. Raises TimeoutError for a slow one."""
    deadline = time.monotonic() + SECONDS
    content = b""
    while len(content) < LIMIT:
        piece = response.raw.read1(LIMIT)  # what has arrived, so that a server which drips is noticed
        if not piece:
            break
        content += piece
        if time.monotonic() > deadline:
            raise TimeoutError("the answer takes too long")
    return content[:LIMIT].decode(errors="replace")


def _no_answer(url: str, error: BaseException) -> InputError:
    """requests wraps the reason three times; the innermost error says it in words."""
    while error.__context__ is not None:
        error = error.__context__
    reason = str(error) or type(error).__name__
    remedy = "is the server up, is the address right, may this machine reach it?"
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = "name the CA bundle to trust: KFP_CA_CERT for Kubeflow, SSL_CERT_FILE for all else"
    return InputError(reason, field=url, remedy=remedy)


def check_mlflow(uri: str) -> None:
    """Raise InputError for an MLflow server that lets no request in. `uri` has no login in it.

    /health says 200 even where the host check or the login refuses everything else, so the API itself is asked.
    """
    base = uri.rstrip("/")
    # A request that any user may make, and that costs the server little.
    answer = get(f"{base}/api/2.0/mlflow/experiments/search?max_results=1", _mlflow_login())
    # MLflow 3 checks the Host header against a list, and answers 403 as for a wrong user.
    if answer.status == 403 and "host" in answer.text.lower():
        name = urlsplit(uri).netloc
        host = name.partition(":")[0]
        raise InputError(
            f"{base} refuses the host name {name} (403)",
            remedy=f'start it with --allowed-hosts "{host}:*" (this replaces the default list)',
        )
    if answer.status in REFUSED:
        raise InputError(
            f"{base} refuses this user ({answer.status})",
            remedy="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    if answer.status != 200:
        raise InputError(
            f"{base} answers {answer.status}: {answer.text[:100]}",
            remedy="is MLFLOW_TRACKING_URI an MLflow server of version 3?",
        )
    if answer.json_object() is None:
        raise InputError(
            f"{base} answers with a page instead of JSON",
            remedy="log in again where it is a login page, or correct MLFLOW_TRACKING_URI",
        )


def page_refusal(uri: str, ui: str) -> str:
    """Why MLflow refuses what its own page asks where it is open at `ui`; empty: it does not."""
    # A browser sends the page's address with each POST, and MLflow 3 has a list of those that it takes.
    headers = {**_mlflow_login(), "Origin": address.origin(ui)}
    search = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    answer = get(search, headers, body={"max_results": 1})
    return "" if answer.status == 200 else f"{answer.status} {answer.text[:100]}"


def _mlflow_login() -> dict[str, str]:
    """The header that MLflow's own client would send."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user:
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {encoded}"}
    return _bearer(os.environ.get("MLFLOW_TRACKING_TOKEN"))


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def manifest_status(image: str) -> int:
    """HTTP status of an image's manifest in its registry, asked as anybody may ask (with an anonymous token)."""
    tagged, _, digest = image.partition("@")
    name, _, tag = tagged.rpartition(":")
    host, _, repository = name.partition("/")
    # As Docker does: a registry of this machine may be without TLS.
    machine = host.partition(":")[0]
    scheme = "http" if machine in LOCAL else "https"
    url = f"{scheme}://{host}/v2/{repository}/manifests/{digest or tag}"
    answer = get(url, {"Accept": MANIFESTS}, follow=True)

    # Public registries give a token to anybody who asks, and nothing without one.
    challenge = answer.headers.get("WWW-Authenticate", "")
    if answer.status == 401 and challenge.lower().startswith("bearer "):
        token = _anonymous_token(challenge)
        if token is not None:
            answer = get(url, {"Accept": MANIFESTS, **_bearer(token)}, follow=True)
    return answer.status


def _anonymous_token(challenge: str) -> str | None:
    """The token that a registry's token server gives to anybody; None where it gives none."""
    # Bearer realm="https://auth.example.com/token",service="...",scope="repository:...:pull"
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    asked = {name: fields[name] for name in ("service", "scope") if name in fields}
    realm = fields.get("realm", "")
    answer = get(f"{realm}?{urlencode(asked)}", follow=True)
    content = answer.json_object()
    if answer.status != 200 or content is None:
        return None
    token = content.get("token") or content.get("access_token")
    return str(token) if token else None


@dataclass(frozen=True)
class Kubeflow:
    """What an API server says of itself; None where it does not say it."""

    version: str | None  # for example 2.17.0
    multi_user: bool | None  # whether each user has a namespace


def kubeflow_server(host: str) -> Kubeflow:
    """The API server's version and mode. Raises InputError where it is not Kubeflow, or lets nobody in."""
    base = host.rstrip("/")
    answer = get(f"{base}/apis/v2beta1/healthz", _bearer(_kubeflow_token()), os.environ.get("KFP_CA_CERT"))
    if answer.status in REFUSED:
        raise InputError(
            f"{base} refuses this user ({answer.status})",
            remedy="set KFP_TOKEN, or KF_PIPELINES_SA_TOKEN_PATH, to a token that is valid now",
        )
    if answer.status != 200:
        raise InputError(
            f"{base} answers {answer.status} to /apis/v2beta1/healthz",
            remedy="is --host the address of the API?",
        )
    health = answer.json_object()
    if health is None:
        raise InputError(
            f"{base} answers with a page instead of JSON, which is what a login page does",
            remedy="set KFP_TOKEN to a token that is valid now, and make sure that --host is the address of the API",
        )
    # A build of somebody's own may have any tag.
    version = health.get("tag_name")
    if not isinstance(version, str) or not re.match(r"v?\d+\.\d+", version):
        version = None
    multi_user = health.get("multi_user")
    return Kubeflow(version, multi_user if isinstance(multi_user, bool) else None)


def _kubeflow_token() -> str | None:
    """The token that `ptl submit` takes."""
    token = os.environ.get("KFP_TOKEN")
    file = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH")
    if token or not file:
        return token
    if not Path(file).is_file():
        raise InputError(f"no file {file}", field="KF_PIPELINES_SA_TOKEN_PATH")
    return Path(file).read_text().strip()


def release(version: str) -> tuple[int, ...]:
    """Major and minor of `2.17.0`."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
