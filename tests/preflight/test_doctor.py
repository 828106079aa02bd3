"""The doctor: each check passes on real local servers, and fails with its remedy.

Kubeflow is a mock server that answers as the recorded one did (tests/data/kfp-2.17), the Kubernetes API one that
answers from a table, and docker a script.
"""

import json
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from checkout import ROOT, TINY
from kubernetes import client
from kubernetes import config as kubernetes_config
from mlflow import MlflowClient
from typer.testing import CliRunner

from ptl import kubernetes
from ptl.cli.app import app
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import servers
from ptl.preflight import doctor, doctor_cluster
from ptl.preflight.forecast_model import checkpoint_bytes, shape_of


@pytest.fixture
def config():
    return load_config(TINY, {"storage.experiment": uuid.uuid4().hex})


@pytest.fixture
def tracking(new_database, tmp_path, monkeypatch):
    """MLflow without a server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new_database(tmp_path)}/mlflow.db")
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", f"file://{tmp_path}/artifacts")


@pytest.fixture
def bucket(tracking, s3, monkeypatch):
    """The real S3 server as the location of artifacts."""
    monkeypatch.setenv("PTL_ARTIFACT_ROOT", s3.root)
    return s3


def states(findings):
    return {finding.subject: finding.state for finding in findings}


def checked(state, check, *arguments):
    """What the check says, in this state."""
    finding = doctor.as_finding("subject", check, *arguments)
    assert finding.state == state and bool(finding.remedy) == (state != "ok"), finding
    return str(finding)


def test_as_a_step_it_fails_with_every_error(config, bucket, monkeypatch, capfd):
    from components.doctor import doctor as component

    other = uuid.uuid4().hex  # the run's parameter, which wins over the config's
    monkeypatch.setenv("KFP_RUN_ID", f"run-{other}")
    component.python_func(
        step="doctor", experiment=other, settings=config.model_dump(mode="json", exclude_none=True)
    )
    experiments = [
        MlflowClient().get_experiment_by_name(name) for name in (other, config.storage.experiment)
    ]
    assert experiments[0] and not experiments[1]
    printed = capfd.readouterr().out
    assert printed.count("ok ") == 3 and "refuses a second writer" in printed
    objects = bucket.client.list_objects_v2(
        Bucket=servers.BUCKET, Prefix=bucket.root.split("/", 3)[3]
    )
    assert objects["KeyCount"] == 0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InputError, match=r"(?s)error +store: .*set AWS_ACCESS_KEY_ID"):
        doctor_cluster.task(config.model_dump(mode="json"), other)


def test_a_store_without_conditional_writes_is_a_warning(config, bucket, monkeypatch):
    real = doctor.s3.client(attempts=2)
    names = ("list_objects_v2", "get_object", "delete_object")
    unconditional = SimpleNamespace(**{name: getattr(real, name) for name in names})
    unconditional.put_object = lambda IfNoneMatch, **rest: real.put_object(**rest)
    monkeypatch.setattr(doctor.s3, "client", lambda attempts: unconditional)
    doctor.mlflow(config)
    assert "ignores If-None-Match" in checked("warning", doctor.store, config, False)


@pytest.fixture
def answers(serve):
    """The address of a server that answers (status, body) to each path of a table."""

    def start(table):
        def answer(request, path, _):
            status, body = table.get(path, (404, {}))
            refused = {"Bearer other": 401, "Bearer lesser": 403}.get(
                request.headers["Authorization"]
            )
            return refused or status, body.encode() if isinstance(body, str) else body

        return serve(answer)

    return start


def test_an_mlflow_that_takes_no_run(config, tracking, answers, monkeypatch):
    for answer, problem, remedy in (
        (
            (401, "You are not authenticated."),
            "answers HTTP 401 Unauthorized: You are not authenticated.",
            "_PASSWORD",
        ),
        (
            (403, "Invalid Host header"),
            "answers HTTP 403 Forbidden: Invalid Host header",
            "--allowed-hosts",
        ),
        (
            (200, "<html>log in</html>"),
            "answers, but not as MLflow does: an HTML page",
            "is the address right",
        ),
    ):
        monkeypatch.setenv(
            "MLFLOW_TRACKING_URI", answers({"/api/2.0/mlflow/experiments/get-by-name": answer})
        )
        said = checked("error", doctor.mlflow, config)
        assert problem in said and remedy in said, said
    # whose location only MLflow knows
    assert "store" not in states(doctor.step_environment(config))


def test_a_run_on_this_machine_and_the_disk(config, new_database, tmp_path, monkeypatch):
    """Without any setting, as `ptl run` in a folder."""
    findings = doctor.local(config, new_database(tmp_path))
    assert states(findings) == dict.fromkeys(["MLflow", "store", "GPU", "disk"], "ok"), findings
    assert (
        f"sqlite:///{tmp_path}/mlflow.db" in findings[0].message
        and f"{tmp_path}/artifacts" in findings[1].message
    )
    needed = checkpoint_bytes(config, shape_of(config.model.path))
    for free, state in ((needed, "ok"), (needed - 1, "warning")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        checked(state, doctor.disk, config, tmp_path)


def test_what_is_not_set_here_is_no_error_of_a_run_on_a_cluster(config, bucket, stack, monkeypatch):
    """The steps take addresses and keys from the cluster."""
    here = partial(doctor.tracking_and_store, config, elsewhere=True)
    assert states(here()) == {"MLflow and store": "warning"}  # a database of this machine
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack["MLFLOW_TRACKING_URI"])
    assert states(here()) == {"MLflow": "ok", "store": "ok", "MLflow's pages": "ok"}
    # A browser that has opened it by a name which the server was not told.
    monkeypatch.setenv("PTL_MLFLOW_UI", "https://mlflow.example.org/team")
    (pages,) = [finding for finding in here() if finding.subject == "MLflow's pages"]
    assert pages.state == "warning" and "Cross-origin request blocked" in pages.message
    assert (
        "add https://mlflow.example.org to the server's MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
        in pages.remedy
    )
    monkeypatch.delenv("PTL_MLFLOW_UI")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert states(here()) == {"MLflow": "ok", "store": "warning", "MLflow's pages": "ok"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # set, and wrong
    assert states(here()) == {"MLflow": "error"}


def test_the_command_checks_what_the_environment_names(world, tmp_path, monkeypatch):
    calls = []
    for module, name in ((doctor, "local"), (doctor_cluster, "cluster")):
        monkeypatch.setattr(
            module, name, lambda _, *options, name=name: calls.append((name, *options)) or []
        )

    def command(*options):
        assert CliRunner().invoke(app, ["doctor", str(TINY), *options]).exit_code == 0
        return calls.pop()

    assert command() == ("local", Path(".ptl"))
    assert command("--cluster")[0] == "cluster"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    assert command() == ("cluster", None, None, "kubeflow")
    assert command("--local")[0] == "local"
    world.token = "right"  # with the login of submit
    (tmp_path / "token").write_text("right")
    monkeypatch.setenv("KFP_NAMESPACE", "team")
    options = [
        "--host",
        world.url,
        "--token-file",
        str(tmp_path / "token"),
        "--kubeflow-namespace",
        "pipelines",
    ]
    _, health, *names = command(*options)
    assert health()["tag_name"] == "2.17.0" and names == ["team", "pipelines"]
    monkeypatch.setattr(
        doctor, "local", lambda *_: [doctor.Finding("disk", "error", "full", "free some")]
    )
    assert CliRunner().invoke(app, ["doctor", str(TINY), "--local"]).exit_code == 1


def test_images_in_a_registry(docker, monkeypatch):
    config = load_config(TINY, {"images.registry": "registry.example.com/team", "images.tag": "1"})
    assert "registry.example.com/team/ptl-recover:1" in checked("ok", doctor_cluster.images, config)
    monkeypatch.setenv("FAIL", "manifest inspect *")
    monkeypatch.setenv("ERROR", "no such manifest:")
    assert "ptl-prune:1 is not in the registry" in checked("error", doctor_cluster.images, config)
    with_vllm = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"backend": "vllm"})}
    )
    assert "ptl images push --with evaluate-vllm" in checked(
        "error", doctor_cluster.images, with_vllm
    )
    go = 'failed to configure transport: Get "https://registry/v2/": dial tcp 127.0.0.1:9: connect: connection refused'
    for text, cause in (
        ("unauthorized: authentication required", "authentication required"),
        (go, "connection refused"),
    ):
        monkeypatch.setenv("ERROR", text)
        assert f"ptl-prune:1 was not checked: {cause}\n" in checked(
            "warning", doctor_cluster.images, config
        )
    # Without one a cluster has only what its nodes hold.
    assert "images.registry" in checked("error", doctor_cluster.images, load_config(TINY))
    checked(
        "ok", doctor_cluster.images, load_config(TINY, {"resources.image_pull_policy": "Never"})
    )


# what a real server said
RECORDED = json.loads((ROOT / "tests/data/kfp-2.17/healthz.json").read_text())


def test_kubeflows_version():
    for version, oldest, state in (
        (RECORDED["tag_name"], "2.16", "ok"),
        ("v2.16.1", "2.16", "ok"),
        ("2.100.0", "2.16", "ok"),
        ("2.9.0", "2.14", "error"),
        ("unknown", "2.16", "warning"),
    ):
        config = load_config(TINY, {"resources.kfp": oldest})
        checked(state, doctor_cluster.kubeflow, config, partial(dict, tag_name=version))


@pytest.fixture
def cluster_api(answers, tmp_path, monkeypatch):
    """The Kubernetes API of a pod in the namespace `team`, with these objects and nothing else."""
    monkeypatch.setattr(kubernetes_config, "load_incluster_config", lambda: None)
    (tmp_path / "namespace").write_text("team")
    monkeypatch.setattr(kubernetes, "NAMESPACE", tmp_path / "namespace")

    def cluster(table):
        # Everything but the client's way to find the server and the token, which is for TLS only.
        connection = client.Configuration(
            answers({path: (200, body) for path, body in table.items()})
        )
        connection.proxy = None
        connection.retries = False
        connection.api_key["authorization"] = "Bearer token"
        monkeypatch.setattr(client.Configuration, "_default", connection)
        return connection

    return cluster


def test_what_the_config_names_is_looked_for(cluster_api):
    core = "/api/v1/namespaces/team"
    connection = cluster_api(
        {f"{core}/configmaps/ptl": {"data": {}}, f"{core}/secrets/ptl-s3": {"data": {}}}
    )
    names = {"storage.ca_config_map": "ptl-ca", "storage.cache_claim": "ptl-hf-cache"}
    config = load_config(TINY, names | {"resources.image_pull_secrets": ["pull"]})
    assert states(doctor_cluster.objects(config, "team", "kubeflow")) == {
        "retry policy": "warning",  # not seen
        "configmap ptl": "ok",
        "persistentvolumeclaim ptl-hf-cache": "error",
        "secret pull": "error",
        "configmap ptl-ca": "warning",  # an optional volume: the steps then trust the public CAs
        "secret ptl-s3": "ok",
        "secret ptl-mlflow": "warning",
        "secret ptl-hf": "warning",
    }
    # Not allowed to look, or nobody there: nothing is wrong for all we know.
    connection.api_key["authorization"] = "Bearer other"
    assert {*states(doctor_cluster.objects(config, "team", "kubeflow")).values()} == {"warning"}
    connection.api_key["authorization"] = "Bearer lesser"
    findings = doctor_cluster.cluster(config, None, "team", "kubeflow")
    (rights,) = [finding for finding in findings if finding.subject == "rights"]
    assert (
        rights.state == "warning"
        and "configmap ptl, persistentvolumeclaim ptl-hf-cache" in rights.message
    )
    rules = (
        "get configmaps in kubeflow; get configmaps in team; get persistentvolumeclaims in team; "
        "get secrets in team"
    )
    assert f"a Role that lets it {rules};" in rights.remedy
    assert [finding.subject for finding in findings if "ptl" in finding.subject] == []
    connection.host = "http://127.0.0.1:9"
    assert {*states(doctor_cluster.objects(config, "team", "kubeflow")).values()} == {"warning"}


def test_kubeflows_own_namespace(config, cluster_api, tmp_path, monkeypatch):
    # As Kubeflow 2.17.0's manifests have it (third-party/argo/base/workflow-controller-configmap-patch.yaml).
    kubeflows = "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}"
    for data, state in (
        ({"workflowDefaults": kubeflows}, "ok"),
        ({"workflowDefaults": "spec:"}, "ok"),
        (None, "ok"),
        ({"workflowDefaults": kubeflows.replace("OnError", "Always")}, "warning"),
        # Argo's is OnFailure
        ({"workflowDefaults": kubeflows.replace(", retryPolicy: OnError", "")}, "warning"),
    ):
        cluster_api(
            {"/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap": {"data": data}}
        )
        checked(state, doctor_cluster.retry_policy, "kubeflow")
    # Without profiles the runs' pods start there.
    for several, subject in ((False, "configmap ptl"), (True, "objects")):
        health = partial(RECORDED.__or__, {"multi_user": several})
        assert subject in states(doctor_cluster.cluster(config, health, None, "kubeflow"))
    # Else they start where kubectl works.
    kubeconfig = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "mine"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/kubeconfig")
    assert kubernetes.context_namespace() == "mine"
    assert "configmap ptl" in states(doctor_cluster.cluster(config, None, None, "kubeflow"))


def test_several_nodes_need_trainer_and_its_runtime(config, cluster_api, monkeypatch):
    api, review = (
        "/apis/trainer.kubeflow.org/v1alpha1",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
    )
    runtime = yaml.safe_load((ROOT / "manifests/components/trainer/runtime.yaml").read_text())
    with_trainer = {
        api: {"resources": [{"name": "trainjobs"}]},
        "/apis/jobset.x-k8s.io": {"kind": "APIGroup"},
        f"{api}/namespaces/team/trainingruntimes/ptl-recover": runtime,
    }
    assert doctor_cluster.trainer(config, "team") == doctor_cluster.trainer_in_step(config) == []
    two_nodes = load_config(TINY, {"resources.steps": {"recover": {"nodes": 2}}})
    cluster_api({})
    assert {*states(doctor_cluster.trainer(two_nodes, "team")).values()} == {"error"}
    cluster_api(with_trainer | {review: {"status": {"allowed": True}}})
    subjects = ["Kubeflow Trainer", "JobSet", "trainingruntime ptl-recover", "rights"]
    assert states(doctor_cluster.trainer_in_step(two_nodes)) == dict.fromkeys(subjects, "ok")
    cluster_api(with_trainer | {review: {"status": {"allowed": False}}})
    monkeypatch.setattr(doctor_cluster, "step_environment", lambda _: [])
    monkeypatch.setenv("KFP_RUN_ID", "run")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    doctor_cluster.task(two_nodes.model_dump(mode="json"), "experiment")  # a local runner
    monkeypatch.delenv("PTL_RUN_ID")
    with pytest.raises(InputError, match="may not create trainjobs in team"):
        doctor_cluster.task(two_nodes.model_dump(mode="json"), "experiment")


def test_gpus_that_are_missing_are_an_error_only_on_the_cluster(monkeypatch):
    all_steps = {"resources.accelerator": "nvidia.com/gpu", "resources.accelerators": 64}
    recover = {
        "resources.accelerator": "nvidia.com/gpu",
        "resources.steps": {"recover": {"accelerators": 64}},
    }
    # the doctor's step has what prune has
    for settings, in_step in ((all_steps, "error"), (recover, "ok")):
        config = load_config(TINY, settings)
        checked("warning", doctor.gpu, config)
        with monkeypatch.context() as cluster:
            cluster.setenv("KFP_RUN_ID", "run")
            checked(in_step, doctor.gpu, config)
