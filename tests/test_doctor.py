"""The doctor: all is well on the real local servers, and each single fault is named with its remedy."""

import http.server
import os
import socket
import ssl
import stat
import subprocess
import threading
import uuid
from pathlib import Path

import pytest
from conftest import free_port
from mlflow import MlflowClient
from mock_kfp import MockKubeflow

from ptl import doctor, doctor_http, stack
from ptl.config import load_config
from ptl.errors import WorkError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture
def config():
    return load_config(TINY, {"storage.experiment": uuid.uuid4().hex})


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("database") / "mlflow.db"  # its tables take seconds to make


@pytest.fixture
def tracking(database, tmp_path, monkeypatch):
    """MLflow without a server, and no S3 or Kubeflow settings of the machine."""
    for name in ("PTL_ARTIFACT_ROOT", "KFP_RUN_ID", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")


@pytest.fixture
def bucket(tracking, s3, monkeypatch):
    """The real S3 server as the place of artifacts."""
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", s3.root)
    return s3


@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory):
    """A real MLflow server."""
    root, port = tmp_path_factory.mktemp("mlflow"), free_port()
    stack.mlflow_up(root, port, f"sqlite:///{root}/mlflow.db", f"file://{root}/artifacts", {})
    yield f"http://127.0.0.1:{port}"
    stack.down(root)


def states(lines):
    return {line.what: line.state for line in lines}


def fault(lines, what):
    (line,) = [line for line in lines if line.what == what]
    assert line.state == "error" and line.remedy, line
    assert doctor.exit_code(lines) == 1
    return f"{line.said} -> {line.remedy}"


def test_all_is_well_on_one_machine(config, tracking):
    lines = doctor.here(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}
    assert doctor.exit_code(lines) == 0 and not any(line.remedy for line in lines)


def test_all_is_well_with_s3(config, bucket):
    lines = doctor.here(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}, lines
    assert "refuses a second writer" in lines[1].said
    left = bucket.client.list_objects_v2(Bucket=stack.BUCKET, Prefix=bucket.root.partition("//")[2].partition("/")[2])
    assert left["KeyCount"] == 0


def test_all_is_well_with_the_real_server(config, tracking, tracking_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    assert states(doctor.here(config))["MLflow"] == "ok"


def test_s3_down(config, bucket, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    said = fault(doctor.here(config), "store")
    assert "127.0.0.1:9" in said and "is the server up" in said


def test_wrong_key(config, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in fault(doctor.here(config), "store")


def test_no_key(config, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no S3 credentials" in fault(doctor.here(config), "store")


def test_bucket_missing(config, bucket, monkeypatch):
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", "s3://no-such-bucket/ptl")
    said = fault(doctor.here(config), "store")
    assert "s3://no-such-bucket/ptl" in said and "create it" in said


def test_folder_that_cannot_be_written(config, tracking, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/file/artifacts")
    assert "cannot write" in fault(doctor.here(config), "store")


def test_a_store_without_conditional_writes_is_a_warning(config, bucket, monkeypatch):
    monkeypatch.setattr(doctor, "_second_put_is_refused", lambda *_: False)  # a mock: SeaweedFS does refuse
    (line,) = [line for line in doctor.here(config) if line.what == "store"]
    assert line.state == "warning" and "ignores If-None-Match" in line.said


def test_mlflow_unset_and_down(config, tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    lines = doctor.here(config)
    assert "is the address right" in fault(lines, "MLflow") and states(lines)["store"] == "warning"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "MLFLOW_TRACKING_URI is not set" in fault(doctor.here(config), "MLflow")


def test_mlflow_403_by_host_check(config, tracking, tracking_server, monkeypatch):
    """The real server, reached under a name of a Kubernetes Service."""
    port = tracking_server.rpartition(":")[2]
    name = "mlflow.ptl.svc.cluster.local"
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1" if host == name else host, *rest, **more)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{name}:{port}")
    said = fault(doctor.here(config), "MLflow")
    assert "refuses the host name" in said and f'--allowed-hosts "{name}:*"' in said


class Answers(http.server.BaseHTTPRequestHandler):
    """A stand-in that gives every path of `table` its status."""

    table = None

    def do_GET(self):
        path = self.path.partition("?")[0]
        status = self.table.get(path, 404)
        if path == "/token":
            body = b'{"token": "anonymous"}'
        elif "login" in path and self.headers.get("Authorization") != "Bearer anonymous":
            status, body = 401, b"{}"
        else:
            body = b"{}"
        self.send_response(status)
        realm = f"http://127.0.0.1:{self.server.server_port}/token"
        self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="pull"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def answers():
    started = []

    def start(table):
        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"table": table}))
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        started.append(made)
        return f"127.0.0.1:{made.server_port}"

    yield start
    for made in started:
        made.shutdown()
        made.server_close()


def test_mlflow_wrong_password(config, tracking, answers, monkeypatch):
    host = answers({"/api/2.0/mlflow/experiments/search": 401})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{host}")
    assert "MLFLOW_TRACKING_PASSWORD" in fault(doctor.here(config), "MLflow")


def with_registry(host, folder):
    return load_config(TINY, {"images.registry": f"{host}/{folder}", "images.tag": "1"})


def registry(folder, names=("prune", "recover", "evaluate")):
    return {f"/v2/{folder}/ptl-{name}/manifests/1": 200 for name in names} | {"/token": 200}


@pytest.mark.parametrize("folder", ["team", "login"])
def test_images_in_a_registry(answers, folder):
    config = with_registry(answers(registry(folder)), folder)
    assert doctor.images(config).state == "ok"


def test_an_image_that_is_missing(answers):
    host = answers(registry("team", ("prune", "evaluate")))
    lines = doctor.outside(with_registry(host, "team"), host=None, namespace=None)
    said = fault(lines, "images")
    assert f"{host}/team/ptl-recover:1 is not in the registry" in said and "ptl images push" in said


def test_the_image_for_vllm_is_looked_for_too(answers):
    host = answers(registry("team"))
    config = with_registry(host, "team")
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"backend": "vllm"})})
    assert "ptl-evaluate-vllm:1 is not in the registry" in fault([doctor.images(config)], "images")


def test_a_registry_that_is_ill(answers):
    host = answers({**registry("team"), "/v2/team/ptl-recover/manifests/1": 503})
    assert "answers 503" in fault([doctor.images(with_registry(host, "team"))], "images")


def test_a_registry_that_is_down(tracking):
    lines = doctor.outside(with_registry("127.0.0.1:9", "team"), host=None, namespace=None)
    assert "is the server up" in fault(lines, "images")


def test_images_of_the_local_engine_that_are_missing(config, monkeypatch):
    monkeypatch.setattr("ptl.images.missing", lambda names: names[1:2])  # a mock of the engine
    assert "build them: ptl images build" in fault(doctor.outside(config, host=None, namespace=None), "images")


@pytest.mark.parametrize(
    ("version", "state"), [("2.17.0", "ok"), ("2.16.1", "warning"), ("2.15.2", "error"), (None, "warning")]
)
def test_kubeflows_version(config, monkeypatch, version, state):
    world = MockKubeflow()
    try:
        real = doctor_http.get

        def get(url, headers=None, ca_cert=None):
            if "v1beta1" in url and version:
                return 200, f'{{"tag_name": "{version}"}}', {}
            return real(url, headers, ca_cert)

        monkeypatch.setattr(doctor_http, "get", get)
        line = doctor.kubeflow(config, world.url)
        assert line.state == state
        assert ("resources.kfp" in line.remedy) == (state == "error")
    finally:
        world.close()


def test_kubeflows_login_is_that_of_submit(config, tmp_path, monkeypatch):
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    world = MockKubeflow(token="right")
    try:
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
        assert "no file" in fault(doctor.outside(config, host=world.url, namespace=None), "Kubeflow")
        (tmp_path / "token").write_text("wrong")
        said = fault(doctor.outside(config, host=world.url, namespace=None), "Kubeflow")
        assert "refuses this user (401)" in said and "KF_PIPELINES_SA_TOKEN_PATH" in said
        (tmp_path / "token").write_text("right\n")
        assert doctor.kubeflow(config, world.url).state == "warning"  # the stand-in tells no version
    finally:
        world.close()


def test_kubeflow_behind_a_house_ca(config, tmp_path, monkeypatch):
    """A real TLS server with a certificate of its own making."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *names]
    subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    made = http.server.HTTPServer(("127.0.0.1", 0), type("H", (Answers,), {"table": {"/apis/v2beta1/healthz": 200}}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    made.socket = context.wrap_socket(made.socket, server_side=True)
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    try:
        host = f"https://localhost:{made.server_port}"
        monkeypatch.delenv("KFP_CA_CERT", raising=False)
        assert "KFP_CA_CERT" in fault(doctor.outside(config, host=host, namespace=None), "Kubeflow")
        monkeypatch.setenv("KFP_CA_CERT", files[1])
        assert doctor.kubeflow(config, host).state == "warning"
    finally:
        made.shutdown()
        made.server_close()


def test_secrets_are_looked_for_by_name(config, tmp_path, monkeypatch):
    """A stand-in for kubectl, which knows one Secret and the ConfigMap."""
    tool = tmp_path / "kubectl"
    tool.write_text('#!/bin/sh\ncase "$3" in ptl|ptl-s3) echo "$2/$3";; *) echo "NotFound: $3" >&2; exit 1;; esac\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pulls = config.model_copy(
        update={"resources": config.resources.model_copy(update={"image_pull_secrets": ("pull",)})}
    )
    lines = doctor.secrets(pulls, "team")
    assert states(lines) == {
        "configmap ptl": "ok",
        "secret ptl-s3": "ok",
        "secret ptl-mlflow": "warning",
        "secret ptl-hf": "warning",
        "secret pull": "error",
    }
    assert "is not in team" in fault(lines, "secret pull")


def test_gpus_that_are_missing_are_an_error_only_on_the_cluster(monkeypatch):
    config = load_config(TINY, {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 64})
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    assert doctor.gpu(config).state == "warning"
    monkeypatch.setenv("KFP_RUN_ID", "run")
    assert "tolerations" in fault([doctor.gpu(config)], "GPU")
    own = {"resources.accelerator": "nvidia.com/gpu", "resources.steps": {"recover": {"accelerators": 64}}}
    config = load_config(TINY, own)
    assert doctor.gpu(config).state == "ok"  # the doctor's step has what prune has
    monkeypatch.delenv("KFP_RUN_ID")
    assert "asks for 64" in doctor.gpu(config).said


def test_as_a_step_it_fails_with_every_fault(config, bucket, monkeypatch, capsys):
    from components.doctor import doctor as component

    other = uuid.uuid4().hex  # the run's parameter, which wins over the config's
    component.python_func(step="doctor", experiment=other, settings=config.model_dump(mode="json", exclude_none=True))
    assert MlflowClient().get_experiment_by_name(other) and not MlflowClient().get_experiment_by_name(
        config.storage.experiment
    )
    assert capsys.readouterr().out.count("ok ") == 3
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(WorkError, match=r"error +store: .*\n.*set AWS_ACCESS_KEY_ID"):
        doctor.task(config.model_dump(mode="json"), other)
