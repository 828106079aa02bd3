"""Errors of servers become one phrase, whichever library asked: each is asked for real where nobody listens."""

import http.client
import socket
import ssl
import subprocess
from unittest import mock

import boto3
import pytest
import requests
import urllib3
from botocore.config import Config
from huggingface_hub.utils import get_session
from kubernetes import client as kubernetes_client
from mlflow import MlflowClient

from ptl import connections

NOBODY = "http://127.0.0.1:9"
NO_NAME = "http://no-such-host.invalid"
LIBRARIES = ("mlflow", "boto3", "requests", "urllib3", "kubernetes", "hub")


def ask(library, url):
    """One request, which is not repeated and waits for a second at most."""
    match library:
        case "mlflow":
            MlflowClient(url).search_experiments()
        case "boto3":
            once = Config(retries={"total_max_attempts": 1}, read_timeout=1)
            keys = {
                "aws_access_key_id": "a",
                "aws_secret_access_key": "b",
                "region_name": "us-east-1",
            }
            boto3.session.Session().client(
                "s3", endpoint_url=url, config=once, **keys
            ).list_buckets()
        case "requests":
            requests.post(url, timeout=1)
        case "urllib3":
            urllib3.PoolManager().request("GET", url, retries=urllib3.Retry(0), timeout=1)
        case "kubernetes":
            configuration = kubernetes_client.Configuration(url)
            configuration.retries = False
            kubernetes_client.VersionApi(kubernetes_client.ApiClient(configuration)).get_code(
                _request_timeout=1
            )
        case "hub":
            get_session().get(url, timeout=1)


def said(library, url, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(Exception) as caught:  # each library has its own
        ask(library, url)
    return connections.failure(caught.value)


@pytest.mark.parametrize("library", LIBRARIES)
def test_why_a_server_does_not_answer_is_found_below_each_librarys_errors(library, monkeypatch):
    assert said(library, NOBODY, monkeypatch) == "connection refused"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert (
            said(library, f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch) == "timed out"
        )
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with mock.patch("socket.getaddrinfo", side_effect=unknown):
        assert said(library, NO_NAME, monkeypatch) == "host name not known"


def raised_from(cause, error=None):
    """An error of a library, raised while `cause` is handled."""
    try:
        try:
            raise cause
        except Exception:
            nested = RuntimeError("HTTPSConnectionPool(host='x', port=443): Max retries exceeded")
            raise error or nested  # noqa: B904
    except Exception as caught:
        return caught


def test_other_reasons_and_errors_of_other_kinds():
    certificate = ssl.SSLCertVerificationError(
        1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"
    )
    certificate.verify_message = "self-signed certificate"
    plain = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    plain.reason = "WRONG_VERSION_NUMBER"
    for cause, phrase in (
        (certificate, "its certificate is not trusted (self-signed certificate)"),
        (plain, "TLS failed (wrong version number)"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "the name server does not answer"),
        (http.client.RemoteDisconnected("Remote end closed"), "it closed the connection"),
        (http.client.IncompleteRead(b""), "it closed the connection"),
        (OSError(113, "No route to host"), "no route to host"),
        (subprocess.TimeoutExpired("docker", 60), "timed out"),
        (
            urllib3.exceptions.ResponseError("too many 503 error responses"),
            "too many 503 error responses",
        ),
        (FileNotFoundError(2, "No such file"), ""),
        (ValueError("connection refused"), ""),
    ):
        assert connections.failure(raised_from(cause)) == phrase, cause
    transfer = RuntimeError("retries exceeded")
    transfer.last_exception = ConnectionResetError(104, "reset")
    assert connections.failure(transfer) == "it closed the connection"
    try:
        raise ValueError("unknown experiment") from None
    except ValueError as error:
        error.__context__ = ConnectionRefusedError()  # an earlier one, which was dealt with
        assert connections.failure(error) == ""
        assert connections.sentence("MLflow", error) == "MLflow: unknown experiment"


def test_what_a_server_says_ends_after_a_whole_word():
    text = connections.shortened("word " * 100)
    assert text.endswith("word ...") and len(text) <= connections.LIMIT
    assert connections.shortened("a\n  b") == "a b"
    assert connections.shortened("\n<!DOCTYPE html><p>log in") == "an HTML page"
    assert (
        connections.status_name(403) == "HTTP 403 Forbidden"
        and connections.status_name(799) == "HTTP 799"
    )
