"""A login in an address: where it must not appear."""

from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from checkout import TINY

from ptl import address
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.steps import records
from ptl.steps.call import Call

LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")


def test_user_and_password_are_not_shown_and_mlflows_become_variables():
    for text, shown in (
        ("http://user:pw@host:5000/path", "http://***@host:5000/path"),
        (
            "at https://pw@host and postgresql://u:p@w@db/x",
            "at https://***@host and postgresql://***@db/x",
        ),
        ("http://user:pa/ss@host/x", "http://***@host/x"),
        (
            "http://host/x@y s3://bucket/a@b models:/m@best",
            "http://host/x@y s3://bucket/a@b models:/m@best",
        ),
    ):
        assert address.without_login(text) == str(InputError(text)) == str(WorkError(text)) == shown
    environment = {
        "MLFLOW_TRACKING_URI": "https://us%40er:p%2Fw@host/base",
        "MLFLOW_TRACKING_PASSWORD": "other",
    }
    address.split_login(environment)
    assert [environment[name] for name in LOGIN] == ["us@er", "p/w", "https://host/base"]
    for uri in ("http://host", "postgresql://u:p@db/x", "http://[::1", "https://user@host"):
        environment = {"MLFLOW_TRACKING_URI": uri}
        address.split_login(environment)
        assert environment == {"MLFLOW_TRACKING_URI": uri}


@pytest.fixture
def noting(serve):
    """Start a server with one answer to all requests: its address, and the headers of each request."""

    def start(status, headers=(), body=b"{}"):
        seen = []

        def answer(request, *_):
            seen.append({name.lower(): value for name, value in request.headers.items()})
            return status, body, headers

        return serve(answer), seen

    return start


def test_mlflow_gets_the_login_and_no_message_shows_it(noting, monkeypatch):
    url, seen = noting(401, body=b'{"error_code": "UNAUTHENTICATED", "message": "no"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", "://user:secret@"))
    with (
        pytest.raises(InputError, match=r"MLflow at http://127") as error,
        mlflow_client.explained(),
    ):
        mlflow_client.connect().get_experiment("1")
    assert seen[0]["authorization"] == "Basic dXNlcjpzZWNyZXQ="
    chain = [error.value, error.value.__cause__, error.value.__cause__.__context__]
    assert not any("secret" in str(each) for each in chain)  # a traceback shows each of them


def test_no_login_follows_a_redirect(noting, ptl, monkeypatch):
    other, seen_by_other = noting(200)
    url, seen = noting(302, [("Location", f"{other}/sign-in?state=hidden")])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", "://user:secret@"))
    monkeypatch.setenv("KFP_TOKEN", "token")
    code, shown = ptl("doctor", TINY, "--cluster", "--host", url.replace("://", "://user:secret@"))
    assert code == 1 and "Traceback" not in shown
    assert seen_by_other == [] and any("authorization" in headers for headers in seen)
    assert f"{other}/sign-in" in shown and "log in again" in shown
    assert "secret" not in shown and "hidden" not in shown


def test_the_webhook_is_not_redirected(noting, monkeypatch, capsys):
    other, seen_by_other = noting(200)
    url, _ = noting(307, [("Location", f"{other}/hook")])
    monkeypatch.setenv(records.WEBHOOK, f"{url}/secret")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    monkeypatch.setattr(records, "_fail_in_mlflow", lambda *_: None)
    records.announce(
        Call("prune-1", "ptl"), SimpleNamespace(reason="broken", exit_code=1, exhausted=False)
    )
    shown = capsys.readouterr().out
    assert (
        seen_by_other == []
        and f"it redirects to {urlsplit(other).hostname}; set {records.WEBHOOK}" in shown
    )
    assert "secret" not in shown and "/hook" not in shown


@pytest.mark.parametrize(
    "url, why",
    [
        ("http://127.0.0.1:9/services/secret", "it does not answer: connection refused"),
        ("https://:443/secret", "PTL_WEBHOOK_URL is no address"),
        ("{server}/services/secret?key=secret", "it answers HTTP 404 Not Found"),
    ],
)
def test_what_keeps_the_webhook_from_hearing_does_not_show_its_path(
    url, why, noting, monkeypatch, capsys
):
    monkeypatch.setenv(records.WEBHOOK, url.format(server=noting(404)[0]))
    monkeypatch.setenv("PTL_RUN_ID", "run")
    monkeypatch.setattr(records, "_fail_in_mlflow", lambda *_: None)
    records.announce(
        Call("prune-1", "ptl"), SimpleNamespace(reason="broken", exit_code=1, exhausted=False)
    )
    shown = capsys.readouterr().out
    assert f"could not be reported to the webhook: {why}" in shown and "secret" not in shown
