"""A login in an address: where it must not appear."""

from types import SimpleNamespace

import pytest
from checkout import TINY
from command import ptl
from mock_server import MockServer

from ptl import address
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.steps import reporting
from ptl.steps.call import Call

LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host:5000/path", "http://***@host:5000/path"),
        ("at https://pw@host and postgresql://u:p@w@db/x", "at https://***@host and postgresql://***@db/x"),
        ("http://user:pa/ss@host/x", "http://***@host/x"),
        ("http://host/x@y s3://bucket/a@b models:/m@best", "http://host/x@y s3://bucket/a@b models:/m@best"),
    ],
)
def test_user_and_password_are_not_shown(text, shown):
    assert address.without_login(text) == shown
    assert str(InputError(text)) == str(WorkError(text)) == shown


def test_the_login_of_mlflows_address_becomes_variables():
    environment = {"MLFLOW_TRACKING_URI": "https://us%40er:p%2Fw@host/base", "MLFLOW_TRACKING_PASSWORD": "other"}
    address.split_login(environment)
    assert [environment[name] for name in LOGIN] == ["us@er", "p/w", "https://host/base"]
    for uri in ("http://host", "postgresql://u:p@db/x", "http://[::1", "https://user@host"):
        environment = {"MLFLOW_TRACKING_URI": uri}
        address.split_login(environment)
        assert environment == {"MLFLOW_TRACKING_URI": uri}


class Answering(MockServer):
    """Every request is noted and gets the server's one answer."""

    def __init__(self, status, headers, body):
        self.seen, self.status, self.headers, self.body = [], status, headers, body
        super().__init__()

    def respond(self, handler, path, query, body):
        self.seen.append({name.lower(): value for name, value in handler.headers.items()})
        handler.send(self.status, self.body, self.headers.items())


@pytest.fixture
def serve(request):
    def start(status, headers=None, body=b"{}"):
        server = Answering(status, headers or {}, body)
        request.addfinalizer(server.close)
        return server

    return start


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What `split_login` sets is taken back after the test."""
    for name in LOGIN:
        monkeypatch.setenv(name, "")


def test_mlflow_gets_the_login_and_no_message_shows_it(serve, monkeypatch):
    server = serve(401, body=b'{"error_code": "UNAUTHENTICATED", "message": "no"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://user:secret@"))
    with pytest.raises(InputError, match=r"MLflow at http://127") as error, mlflow_client.explained():
        mlflow_client.connect().get_experiment("1")
    assert server.seen[0]["authorization"] == "Basic dXNlcjpzZWNyZXQ="
    chain = [error.value, error.value.__cause__, error.value.__cause__.__context__]
    assert not any("secret" in str(each) for each in chain)  # a traceback shows each of them


def test_no_login_follows_a_redirect(serve, monkeypatch):
    other = serve(200)
    server = serve(302, {"Location": f"{other.url}/sign-in?state=hidden"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://user:secret@"))
    monkeypatch.setenv("KFP_TOKEN", "token")
    done = ptl("doctor", TINY, "--cluster", "--host", server.url.replace("://", "://user:secret@"))
    shown = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in shown
    assert other.seen == [] and any("authorization" in headers for headers in server.seen)
    assert f"{other.url}/sign-in" in shown and "log in again" in shown
    assert "secret" not in shown and "hidden" not in shown


def test_the_webhook_is_not_redirected(serve, monkeypatch, capsys):
    other = serve(200)
    server = serve(307, {"Location": f"{other.url}/hook"})
    monkeypatch.setenv(reporting.WEBHOOK, f"{server.url}/secret")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    monkeypatch.setattr(reporting, "_fail_in_mlflow", lambda *_: None)
    reporting.announce(Call("prune-1", "ptl"), SimpleNamespace(reason="broken", exit_code=1, exhausted=False))
    shown = capsys.readouterr().out
    assert other.seen == [] and f"it points to {other.url}/hook" in shown and "secret" not in shown
