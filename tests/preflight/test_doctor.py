"""The doctor: all is well on the real local servers, and each single fault is named with its remedy.

Kubeflow is a mock server that answers as the recorded one did (tests/data/kfp-2.17), the Kubernetes API one that
answers from a table, and docker a script.
"""

import http.server
import json
import shutil
import socket
import threading
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import free_port
from kubernetes import client
from kubernetes import config as kubernetes_config
from mlflow import MlflowClient
from mock_kfp import MockKubeflow
from typer.testing import CliRunner

from ptl.cli.app import app
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import servers
from ptl.preflight import doctor, doctor_cluster, in_cluster
from ptl.preflight.forecast_model import checkpoint_bytes

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


def fault(findings, subject):
    (finding,) = [finding for finding in findings if finding.subject == subject]
    assert finding.state == "error" and finding.remedy, finding
    return f"{finding.message} -> {finding.remedy}"


def doubt(subject, check, *arguments):
    finding = doctor.as_finding(subject, check, *arguments)
    assert finding.state == "warning" and finding.remedy, finding
    return f"{finding.message} -> {finding.remedy}"


def wrong(subject, check, *arguments):
    return fault([doctor.as_finding(subject, check, *arguments)], subject)


def test_all_is_well_on_one_machine(config, tracking):
    lines = doctor.step_environment(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}
    assert not any(line.remedy for line in lines)


def test_all_is_well_with_s3(config, bucket):
    lines = doctor.step_environment(config)
    assert states(lines) == {"MLflow": "ok", "store": "ok", "GPU": "ok"}, lines
    assert "refuses a second writer" in lines[1].message
    left = bucket.client.list_objects_v2(Bucket=servers.BUCKET, Prefix=bucket.root.partition("//")[2].partition("/")[2])
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
    real = doctor.s3.client(attempts=2)
    monkeypatch.setattr(doctor.s3, "client", lambda attempts: Unconditional(real))
    doctor.mlflow(config)
    assert "ignores If-None-Match" in doubt("store", doctor.store, config, False)


class Unconditional:
    """A mock of a client of a store that knows no conditions: SeaweedFS does."""

    def __init__(self, real):
        self.head_bucket, self.get_object, self.delete_object = real.head_bucket, real.get_object, real.delete_object
        self.put_object = lambda IfNoneMatch, **rest: real.put_object(**rest)


def test_mlflow_unset_and_down(config, tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    lines = doctor.step_environment(config)
    assert "is the server up" in fault(lines, "MLflow") and "store" not in states(lines)
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
    assert name in said and "--allowed-hosts" in said


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


@pytest.fixture
def answers(monkeypatch):
    """A mock of a server that answers (status, body) to each path of a table."""
    started = []

    def start(table):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = table.get(self.path.partition("?")[0], (404, "{}"))
                self.send_response(401 if self.headers["Authorization"] == "Bearer other" else status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        ((401, "You are not authenticated."), "MLFLOW_TRACKING_PASSWORD"),
        ((403, "Permission denied"), "EDIT"),
        ((200, "<html>log in</html>"), "is MLFLOW_TRACKING_URI"),
    ],
    ids=["login", "rights", "page"],
)
def test_mlflow_that_lets_nobody_in(answer, remedy, config, tracking, answers, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answers({"/api/2.0/mlflow/experiments/get-by-name": answer}))
    assert remedy in fault(doctor.step_environment(config), "MLflow")


def test_a_run_on_this_machine(config, tmp_path, monkeypatch):
    """Without any setting, as `ptl run` in a new folder."""
    for name in ("MLFLOW_TRACKING_URI", "PTL_ARTIFACT_ROOT", "KFP_RUN_ID"):
        monkeypatch.setenv(name, "")  # so that what the doctor sets is undone
        monkeypatch.delenv(name)
    lines = doctor.local(config, tmp_path / "home")
    assert set(states(lines)) == {"MLflow", "store", "GPU", "disk"}
    assert set(states(lines).values()) == {"ok"}, lines
    assert (tmp_path / "home/mlflow.db").is_file() and f"{tmp_path}/home/artifacts" in lines[1].message


def test_disk(config, tmp_path, monkeypatch):
    """Two checkpoints an iteration and two of the control; all but the last two of the loop hold Adam's state."""
    two = config.model_copy(update={"schedule": config.schedule.model_copy(update={"iterations": 2})})
    small = SimpleNamespace(params=1000, itemsize=2)
    assert checkpoint_bytes(two, small) == 2000 + 2 * 1000 * (2 + 8) + 2 * 2 * 1000 * 2
    assert "free" in doctor.disk(config, tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    said = doubt("disk", doctor.disk, config, tmp_path)
    assert "1.0 MB free" in said and "--home" in said


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
    assert "is the server up" in fault(doctor.tracking_and_store(config, elsewhere=True), "MLflow")


@pytest.fixture
def command(monkeypatch):
    """The command with the checks themselves replaced: what it checks."""
    for name in ("KF_PIPELINES_ENDPOINT", "KFP_NAMESPACE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    well = [doctor.Finding("all", "ok", "well")]
    monkeypatch.setattr(doctor, "local", lambda _, *options: calls.append(("local", *options)) or well)
    monkeypatch.setattr(doctor_cluster, "cluster", lambda _, *options: calls.append(("cluster", *options)) or well)

    def run(*options):
        return CliRunner().invoke(app, ["doctor", str(TINY), *options]), calls.pop()

    return run


def test_the_command_checks_what_the_environment_names(command, monkeypatch):
    answer, checked = command()
    assert checked == ("local", Path(".ptl"))
    assert "checking a run on this machine" in answer.stdout and answer.exit_code == 0
    answer, (kind, health, *_) = command("--host", "https://kubeflow")
    assert kind == "cluster" and health and "--local checks one" in answer.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    assert command()[1] == ("cluster", None, None, "kubeflow")
    assert command("--local")[1][0] == "local"
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "https://other")
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    _, (_, health, *names) = command("--kubeflow-namespace", "pipelines")
    assert health and names == ["team", "pipelines"]
    for name in ("KF_PIPELINES_ENDPOINT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name)
    assert command("--cluster")[1][0] == "cluster"


def test_the_command_ends_with_1_for_an_error_only(monkeypatch):
    for state, code in (("warning", 0), ("error", 1)):
        monkeypatch.setattr(doctor, "local", lambda *_, state=state: [doctor.Finding("x", state, "y", "z")])
        assert CliRunner().invoke(app, ["doctor", str(TINY), "--local"]).exit_code == code


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A mock of the docker command that says this of each image."""

    def says(text, code=1):
        (tmp_path / "docker").write_text(f"#!/bin/sh\necho '{text}' \"$4\" >&2\nexit {code}\n")
        (tmp_path / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return says


def test_images_in_a_registry(docker, monkeypatch):
    config = load_config(TINY, {"images.registry": "registry.example.com/team", "images.tag": "1"})
    docker("", code=0)
    assert "registry.example.com/team/ptl-recover:1" in doctor_cluster.images(config)
    docker("no such manifest:")
    said = wrong("images", doctor_cluster.images, config)
    assert "ptl-prune:1 is not in the registry" in said and "ptl images push" in said
    with_vllm = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"backend": "vllm"})})
    assert "ptl images push --with evaluate-vllm" in wrong("images", doctor_cluster.images, with_vllm)
    docker("unauthorized: authentication required")
    assert "unauthorized" in doubt("images", doctor_cluster.images, config)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "docker gave no answer (FileNotFoundError)" in doubt("images", doctor_cluster.images, config)


def test_a_cluster_cannot_pull_from_a_local_engine(config):
    said = wrong("images", doctor_cluster.images, config)
    assert "cannot pull from the Docker engine of this machine" in said and "images.registry" in said
    loaded = load_config(TINY, {"resources.image_pull_policy": "Never"})
    assert "the nodes must hold" in doctor_cluster.images(loaded)


RECORDED = json.loads((ROOT / "tests/data/kfp-2.17/healthz.json").read_text())  # what a real server said


@pytest.mark.parametrize(
    ("version", "oldest", "state"),
    [
        (RECORDED["tag_name"], "2.16", "ok"),
        ("2.100.0", "2.16", "ok"),
        ("3.0.1", "2.16", "ok"),
        ("2.16.1", "2.16", "ok"),
        ("2.9.0", "2.14", "error"),
        ("2.15.2", "2.16", "error"),
        ("unknown", "2.16", "warning"),
        (None, "2.16", "warning"),
    ],
)
def test_kubeflows_version(version, oldest, state):
    config = load_config(TINY, {"resources.kfp": oldest})
    finding = doctor.as_finding("x", doctor_cluster.kubeflow, config, lambda: RECORDED | {"tag_name": version})
    assert finding.state == state, finding
    assert ("resources.kfp" in finding.remedy) == (state == "error")


def test_kubeflow_is_asked_with_the_login_of_submit(config, tmp_path, monkeypatch):
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    world = MockKubeflow(token="right")
    try:
        for token, said in (("wrong", "401"), ("right", "ok      Kubeflow: it is 2.17.0")):
            (tmp_path / "token").write_text(token)
            options = ["--cluster", "--host", world.url, "--token-file", str(tmp_path / "token")]
            assert said in CliRunner().invoke(app, ["doctor", str(TINY), *options]).stdout
    finally:
        world.close()


@pytest.fixture
def kubernetes(answers, tmp_path, monkeypatch):
    """The Kubernetes API of a pod in the namespace `team`, with these objects and nothing else."""
    monkeypatch.setattr(kubernetes_config, "load_incluster_config", lambda: None)
    (tmp_path / "namespace").write_text("team")
    monkeypatch.setattr(in_cluster, "NAMESPACE", tmp_path / "namespace")

    def cluster(table):
        # Everything but the client's way to find the server and the token, which is for TLS only.
        connection = client.Configuration(answers({path: (200, body) for path, body in table.items()}))
        connection.proxy = None
        connection.retries = False
        connection.api_key["authorization"] = "Bearer token"
        monkeypatch.setattr(client.Configuration, "_default", connection)
        return connection

    return cluster


def test_what_the_config_names_is_looked_for(kubernetes):
    core = "/api/v1/namespaces/team"
    connection = kubernetes({f"{core}/configmaps/ptl": {"data": {}}, f"{core}/secrets/ptl-s3": {"data": {}}})
    names = {"ca_config_map": "ptl-ca", "cache_claim": "ptl-hf-cache"}
    config = load_config(
        TINY, {f"storage.{field}": name for field, name in names.items()} | {"resources.image_pull_secrets": ["pull"]}
    )
    findings = doctor_cluster.objects(config, "team", "kubeflow")
    assert states(findings) == {
        "retry policy": "warning",  # not seen
        "configmap ptl": "ok",
        "persistentvolumeclaim ptl-hf-cache": "error",
        "secret pull": "error",
        "configmap ptl-ca": "warning",  # an optional volume: the steps then trust the public CAs
        "secret ptl-s3": "ok",
        "secret ptl-mlflow": "warning",
        "secret ptl-hf": "warning",
    }
    assert "is not in team -> make it" in fault(findings, "secret pull")
    # Not allowed to look, or nobody there: nothing is wrong for all we know.
    connection.api_key["authorization"] = "Bearer other"
    findings = doctor_cluster.objects(config, "team", "kubeflow")
    assert {finding.state for finding in findings} == {"warning"} and "(401)" in findings[1].message
    connection.host = "http://127.0.0.1:9"
    assert "no answer" in doctor_cluster.objects(config, "team", "kubeflow")[1].message
    assert "--namespace" in doctor_cluster.objects(config, None, "kubeflow")[1].remedy


def test_no_kubeconfig_is_a_warning(config, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    findings = doctor_cluster.objects(config, "team", "kubeflow")
    assert {finding.state for finding in findings} == {"warning"} and "ConfigException" in findings[0].message


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
    ("data", "doubtful", "message"),
    [
        ({"workflowDefaults": OWN_DEFAULTS}, False, "OnError"),
        ({"workflowDefaults": OWN_DEFAULTS.replace("OnError", "Always")}, True, "Always (limit 2)"),
        ({"workflowDefaults": OWN_DEFAULTS.replace("retryPolicy: OnError", "")}, True, "OnFailure"),  # Argo's default
        ({"workflowDefaults": "spec:"}, False, "no default"),
        ({}, False, "no default"),
        (None, False, "no default"),
    ],
)
def test_the_clusters_retry_policy(kubernetes, data, doubtful, message):
    kubernetes({"/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap": {"data": data}})
    if not doubtful:
        assert message in doctor_cluster.retry_policy("kubeflow")
        return
    said = doubt("retry policy", doctor_cluster.retry_policy, "kubeflow")
    assert message in said and "36 times" in said and "retryPolicy: OnError" in said


def test_without_profiles_the_runs_pods_start_beside_kubeflow(config, kubernetes):
    kubernetes({"/api/v1/namespaces/kubeflow/configmaps/ptl": {"data": {}}})
    for several, subject in ((False, "configmap ptl"), (True, "objects")):
        health = partial(RECORDED.__or__, {"multi_user": several})
        findings = doctor_cluster.cluster(config, health, None, "kubeflow")
        assert subject in states(findings)


OURS = yaml.safe_load((ROOT / "manifests/components/trainer/runtime.yaml").read_text())
API = "/apis/trainer.kubeflow.org/v1alpha1"
WITH_TRAINER = {
    API: {"resources": [{"name": "trainjobs"}]},
    "/apis/jobset.x-k8s.io": {"kind": "APIGroup"},
    f"{API}/namespaces/team/trainingruntimes/ptl-recover": OURS,
}
REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@pytest.fixture
def two_nodes():
    return load_config(TINY, {"resources.steps": {"recover": {"nodes": 2}}})


def test_single_nodes_need_no_trainer(config):
    assert doctor_cluster.trainer(config, "team") == doctor_cluster.trainer_in_step(config) == []


def test_trainer_and_its_runtime_are_looked_for(two_nodes, kubernetes):
    kubernetes(WITH_TRAINER)
    findings = doctor_cluster.objects(two_nodes, "team", "kubeflow")[-3:]
    assert states(findings) == {"Kubeflow Trainer": "ok", "JobSet": "ok", "trainingruntime ptl-recover": "ok"}
    kubernetes({})
    findings = doctor_cluster.trainer(two_nodes, "team")
    assert "Kubeflow Trainer 2.3" in fault(findings, "Kubeflow Trainer")
    assert "is not in team -> make it" in fault(findings, "trainingruntime ptl-recover")


def test_in_a_pod_the_account_must_be_allowed_to_make_nodes(two_nodes, kubernetes, tmp_path, monkeypatch):
    kubernetes(WITH_TRAINER | {REVIEW: {"status": {"allowed": True}}})
    assert set(states(doctor_cluster.trainer_in_step(two_nodes)).values()) == {"ok"}
    kubernetes(WITH_TRAINER | {REVIEW: {"status": {"allowed": False}}})
    monkeypatch.setattr(doctor_cluster, "step_environment", lambda _: [])
    monkeypatch.setenv("KFP_RUN_ID", "run")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    doctor_cluster.task(two_nodes.model_dump(mode="json"), "experiment")  # a local runner
    monkeypatch.delenv("PTL_RUN_ID")
    with pytest.raises(InputError, match="may not create trainjobs in team"):
        doctor_cluster.task(two_nodes.model_dump(mode="json"), "experiment")
    monkeypatch.setattr(in_cluster, "NAMESPACE", tmp_path / "nothing")
    assert "no token" in fault(doctor_cluster.trainer_in_step(two_nodes), "Kubeflow Trainer")


def test_gpus_that_are_missing_are_an_error_only_on_the_cluster(monkeypatch):
    config = load_config(TINY, {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 64})
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    assert "asks for 64" in doubt("GPU", doctor.gpu, config)
    monkeypatch.setenv("KFP_RUN_ID", "run")
    assert "tolerations" in wrong("GPU", doctor.gpu, config)
    own = {"resources.accelerator": "nvidia.com/gpu", "resources.steps": {"recover": {"accelerators": 64}}}
    config = load_config(TINY, own)
    assert "visible" in doctor.gpu(config)  # the doctor's step has what prune has
    monkeypatch.delenv("KFP_RUN_ID")
    assert "asks for 64" in doubt("GPU", doctor.gpu, config)


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
        doctor_cluster.task(config.model_dump(mode="json"), other)
