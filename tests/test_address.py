"""A login in an address: where it must not appear."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.prune_tune_loop import kfp_api
from ptl import address
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client
from ptl.steps import reporting
from ptl.steps.call import Call

ROOT = Path(__file__).parents[1]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pw@host:5000/path", "http://***@host:5000/path"),
        ("at https://pw@host and postgresql://u:p%40@db/x", "at https://***@host and postgresql://***@db/x"),
        ("http://user:p@w@host", "http://***@host"),
        ("http://user:pa/ss@host/x", "http://***@host/x"),
        ("http://host:5000/models/m@best", "http://host:5000/models/m@best"),
        ("http://host/x@y s3://bucket/a@b models:/m@best", "http://host/x@y s3://bucket/a@b models:/m@best"),
    ],
)
def test_user_and_password_are_not_shown(text, shown):
    assert address.without_login(text) == shown
    assert str(InputError(text)) == str(WorkError(text)) == shown


def test_the_page_of_runs_and_its_origin_are_those_of_a_browser():
    """Looked at in MLflow 3.17: another order shows another page or all runs."""
    assert address.runs_page("http://host", "1") == "http://host/#/experiments/1/runs?workflowType=machine_learning"
    assert address.runs_page("http://host", "1", "r").endswith("/#/experiments/1/runs/r?workflowType=machine_learning")
    assert address.origin("https://user:pw@MLflow.example.com:443/base/") == "https://mlflow.example.com"
    assert address.origin("http://host:443") == "http://host:443"


def test_the_login_of_mlflows_address_becomes_variables():
    environment = {"MLFLOW_TRACKING_URI": "https://us%40er:p%2Fw@host/base", "MLFLOW_TRACKING_PASSWORD": "other"}
    address.split_login(environment)
    assert [environment[name] for name in LOGIN] == ["us@er", "p/w", "https://host/base"]
    for uri in ("", "http://host", "sqlite:////a/mlflow.db", "postgresql://u:p@db/x", "http://[::1"):
        environment = {"MLFLOW_TRACKING_URI": uri}
        address.split_login(environment)
        assert environment == {"MLFLOW_TRACKING_URI": uri}


class _Handler(BaseHTTPRequestHandler):
    """Every request is noted and gets the server's one answer."""

    def do_GET(self):
        self.server.seen.append(dict(self.headers))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    started = []

    def start(status, headers=None, body=b"{}"):
        made = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        made.seen, made.answer = [], (status, headers or {}, body)
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        started.append(made)
        return made, f"http://127.0.0.1:{made.server_port}"

    yield start
    for made in started:
        made.shutdown()
        made.server_close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What `split_login` sets is taken back after the test."""
    for name in LOGIN:
        monkeypatch.setenv(name, "")


def test_mlflow_gets_the_login_and_no_message_shows_it(serve, monkeypatch):
    server, url = serve(401, body=b'{"error_code": "UNAUTHENTICATED", "message": "no"}')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", "://user:secret@"))
    with pytest.raises(InputError, match=r"MLflow at http://127") as error, mlflow_client.explained():
        mlflow_client.connect().get_experiment("1")
    assert server.seen[0]["Authorization"] == "Basic dXNlcjpzZWNyZXQ="
    chain = [error.value, error.value.__cause__, error.value.__cause__.__context__]
    assert not any("secret" in str(each) for each in chain)  # a traceback shows each of them


@pytest.mark.parametrize("command", ["doctor", "status"])
def test_no_login_follows_a_redirect(serve, monkeypatch, command):
    other, target = serve(200)
    server, url = serve(302, {"Location": f"{target}/sign-in?state=hidden"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", "://user:secret@"))
    monkeypatch.setenv("KFP_TOKEN", "token")
    arguments = {"doctor": ["doctor", TINY, "--cluster", "--host", url], "status": ["status", "run", "--host", url]}
    done = subprocess.run(
        [sys.executable, "-m", "ptl", *map(str, arguments[command])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    shown = done.stdout + done.stderr
    assert done.returncode == (1 if command == "doctor" else 2) and "Traceback" not in shown
    assert other.seen == [] and any("Authorization" in headers or "authorization" in headers for headers in server.seen)
    assert f"{target}/sign-in" in shown and "log in again" in shown
    assert "secret" not in shown and "hidden" not in shown


def test_the_webhook_is_not_redirected(serve, monkeypatch, capsys):
    other, target = serve(200)
    _, url = serve(307, {"Location": f"{target}/hook"})
    monkeypatch.setenv(reporting.WEBHOOK, f"{url}/secret")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    monkeypatch.setattr(reporting, "_fail_in_mlflow", lambda *_: None)
    reporting.announce(Call("prune-1", "ptl"), SimpleNamespace(reason="broken", exit_code=1, exhausted=False))
    assert other.seen == []
    assert f"it points to {target}/hook" in (said := capsys.readouterr().out) and "secret" not in said


def test_links_to_kubeflow_have_no_login():
    assert kfp_api.connect(kfp_api.Server("http://user:secret@127.0.0.1:9/")).ui == "http://127.0.0.1:9"
