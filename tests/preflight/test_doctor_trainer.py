"""The doctor's checks of Kubeflow Trainer: kubectl is a script, the Kubernetes API a server that answers from a table.

The stock runtime is the one of Kubeflow Trainer 2.3.0, as a cluster answered with it (tests/data/trainer-2.3).
"""

import http.server
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from kubernetes import config as kubernetes_config

from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.preflight import doctor, doctor_trainer, in_cluster

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
STOCK = json.loads((ROOT / "tests/data/trainer-2.3/runtime-torch-distributed.json").read_text())
OURS = yaml.safe_load((ROOT / "manifests/components/trainer/runtime.yaml").read_text())
API = "/apis/trainer.kubeflow.org/v1alpha1"
SERVED = {"kind": "APIResourceList", "resources": [{"name": "trainingruntimes"}, {"name": "trainjobs"}]}
RUNTIME = f"{API}/namespaces/team/trainingruntimes/ptl-recover"
ALL = {
    "create trainjobs.trainer.kubeflow.org",
    "get trainjobs.trainer.kubeflow.org",
    "delete trainjobs.trainer.kubeflow.org",
    "get pods",
    "list pods",
    "get pods/log",
}


@pytest.fixture
def config():
    return load_config(TINY, {"resources.steps": {"recover": {"nodes": 2}}})


KUBECTL = """#!{python} -S
import json, sys
cluster = json.load(open({table!r}))
command, what, *options = sys.argv[1:]
if command == "get":
    if options[0] not in cluster["objects"]:
        sys.exit("Error from server (NotFound): the server could not find the requested resource")
    print(json.dumps(cluster["objects"][options[0]]))
else:
    right, user = " ".join(options[:2]), options[options.index("--as") + 1]
    if user not in cluster["rights"]:
        sys.exit('Error from server (Forbidden): users is forbidden: User "me" cannot impersonate resource "users"')
    right += "".join("/" + option.partition("=")[2] for option in options if option.startswith("--subresource="))
    if right not in cluster["rights"][user]:
        sys.exit(print("no - no RBAC policy matched") or 1)
    print("yes")
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A mock of kubectl on PATH, for a cluster with these objects and these rights of users."""
    tool, table = tmp_path / "bin" / "kubectl", tmp_path / "cluster.json"
    tool.parent.mkdir()
    tool.write_text(KUBECTL.format(python=sys.executable, table=str(table)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def cluster(objects, rights=None):
        table.write_text(json.dumps({"objects": objects, "rights": rights or {}}))

    return cluster


@pytest.fixture
def api(tmp_path, monkeypatch):
    """The Kubernetes API of a pod in the namespace `team`, whose account has these rights."""
    objects, rights = {}, set()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(objects.get(self.path))

        def do_POST(self):
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
            asked = review["spec"]["resourceAttributes"]
            assert asked["namespace"] == "team"
            kind = ".".join(filter(None, (asked["resource"], asked["group"])))
            name = "/".join(filter(None, (kind, asked["subresource"])))
            self.answer(review | {"status": {"allowed": f"{asked['verb']} {name}" in rights}}, 201)

        def answer(self, body, status=200):
            status = status if body else 404
            if self.headers["Authorization"] != "Bearer token":
                status = 401
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # Everything but the client's way to find the server and the token, which is for TLS only.
    connection = client.Configuration(f"http://127.0.0.1:{server.server_port}")
    connection.api_key["authorization"] = "Bearer token"
    connection.proxy = None
    connection.retries = False
    monkeypatch.setattr(client.Configuration, "_default", connection)
    monkeypatch.setattr(kubernetes_config, "load_incluster_config", lambda: None)
    (tmp_path / "namespace").write_text("team")
    monkeypatch.setattr(in_cluster, "NAMESPACE", tmp_path / "namespace")

    def cluster(new_objects, new_rights=()):
        objects.update(new_objects)
        rights.update(new_rights)
        return server

    yield cluster
    server.shutdown()
    server.server_close()


def user(account):
    return f"system:serviceaccount:team:{account}"


def asked(config, kubeflow_namespace="kubeflow"):
    findings = doctor_trainer.by_kubectl(config, "team", kubeflow_namespace)
    return {finding.subject: finding for finding in findings}


def states(findings):
    return {finding.subject: finding.state for finding in findings}


def test_all_is_well_with_the_component_trainer(config, kubectl):
    kubectl({API: SERVED, RUNTIME: OURS}, {user("default-editor"): sorted(ALL)})
    findings = doctor_trainer.by_kubectl(config, "team", "kubeflow")
    assert states(findings) == {
        "Kubeflow Trainer": "ok",
        "trainingruntime ptl-recover": "ok",
        "rights of default-editor": "ok",
    }
    assert not any(finding.remedy for finding in findings)


def test_single_nodes_need_no_trainer(kubectl):
    kubectl({})
    assert doctor_trainer.by_kubectl(load_config(TINY), "team", "kubeflow") == []
    assert doctor_trainer.in_step(load_config(TINY)) == []


def test_a_cluster_without_trainer_is_one_error(config, kubectl):
    # JobSet alone, or a Trainer that has no TrainJobs.
    for objects in ({}, {API: {"resources": [{"name": "trainingruntimes"}]}}):
        kubectl(objects)
        (finding,) = asked(config).values()
        assert finding.state == "error" and "trainjobs.trainer.kubeflow.org" in finding.message
        assert "Kubeflow Trainer 2.3" in finding.remedy


def test_a_runtime_that_is_missing(config, kubectl):
    kubectl({API: SERVED})
    finding = asked(config)["trainingruntime ptl-recover"]
    assert finding.state == "error" and finding.message == "is not in team"
    assert "manifests/components/trainer" in finding.remedy and "resources.steps.recover.runtime" in finding.remedy


def test_the_runtime_is_the_one_that_the_config_names(kubectl):
    config = load_config(TINY, {"resources.steps": {"recover": {"nodes": 2, "runtime": "mine"}}})
    kubectl({API: SERVED, f"{API}/namespaces/team/trainingruntimes/mine": OURS})
    assert asked(config)["trainingruntime mine"].state == "ok"


def test_the_stock_runtime_restarts_in_place(config, kubectl):
    kubectl({API: SERVED, RUNTIME: STOCK})
    finding = asked(config)["trainingruntime ptl-recover"]
    assert finding.state == "warning"
    assert "(backoffLimit 6, restartPolicy OnFailure)" in finding.message and "for minutes" in finding.message
    assert "restartPolicy Never and backoffLimit 0" in finding.remedy


def test_jobsets_restart_in_place_is_one_too():
    jobset = OURS["spec"]["template"]["spec"]
    policy = jobset["failurePolicy"] | {"restartStrategy": "InPlaceRestart"}
    spec = {"template": {"spec": jobset | {"failurePolicy": policy}}}
    assert doctor_trainer.restarts_in_place(spec) == ["restartStrategy InPlaceRestart"]


def test_a_job_that_loads_the_data_may_be_restarted():
    job = {"name": "dataset-initializer", "template": {"spec": {"template": {"spec": {}}}}}
    jobset = OURS["spec"]["template"]["spec"]
    spec = {"template": {"spec": jobset | {"replicatedJobs": [job, *jobset["replicatedJobs"]]}}}
    assert doctor_trainer.restarts_in_place(spec) == []


def test_rights_that_the_account_lacks_are_named(config, kubectl):
    lacking = ALL - {"create trainjobs.trainer.kubeflow.org", "get pods/log"}
    kubectl({API: SERVED, RUNTIME: OURS}, {user("default-editor"): sorted(lacking)})
    finding = asked(config)["rights of default-editor"]
    assert finding.state == "error"
    assert finding.message == "may not create trainjobs, get pods/log in team"
    assert "Role ptl-recover" in finding.remedy


def test_without_profiles_the_account_is_pipeline_runner(config, kubectl):
    kubectl({API: SERVED, RUNTIME: OURS}, {user("pipeline-runner"): sorted(ALL)})
    assert asked(config, kubeflow_namespace="team")["rights of pipeline-runner"].state == "ok"


def test_a_user_who_may_not_ask_for_another_is_a_warning(config, kubectl):
    kubectl({API: SERVED, RUNTIME: OURS})
    finding = asked(config)["rights of default-editor"]
    assert finding.state == "warning" and "cannot impersonate" in finding.message
    assert "resources.doctor: true" in finding.remedy


def test_what_kubectl_cannot_answer_is_a_warning(config, kubectl, monkeypatch):
    (finding,) = doctor_trainer.by_kubectl(config, None, "kubeflow")
    assert finding.state == "warning" and "--namespace" in finding.remedy
    monkeypatch.setenv("PATH", "/nowhere")
    assert {finding.state for finding in asked(config).values()} == {"warning"}
    assert "FileNotFoundError" in asked(config)["Kubeflow Trainer"].message


def test_the_doctor_of_a_cluster_asks_for_trainer(config, kubectl, monkeypatch):
    monkeypatch.setattr(doctor, "tracking_and_store", lambda *_, **__: [])
    kubectl({API: SERVED, RUNTIME: OURS}, {user("default-editor"): sorted(ALL)})
    findings = doctor.cluster(config, host=None, namespace="team", kubeflow_namespace="kubeflow")
    assert states(findings)["rights of default-editor"] == "ok"


def test_in_a_pod_all_is_well(config, api):
    api({API: SERVED, RUNTIME: OURS}, ALL)
    findings = doctor_trainer.in_step(config)
    assert states(findings) == {
        "Kubeflow Trainer": "ok",
        "trainingruntime ptl-recover": "ok",
        "rights of the steps' account": "ok",
    }, findings


def test_in_a_pod_each_fault_is_named(config, api):
    (finding,) = doctor_trainer.in_step(config)
    assert finding.state == "error" and "no trainjobs.trainer.kubeflow.org" in finding.message
    api({API: SERVED}, ALL - {"delete trainjobs.trainer.kubeflow.org"})
    _, runtime, rights = doctor_trainer.in_step(config)
    assert (runtime.state, runtime.message) == ("error", "is not in team")
    assert (rights.state, rights.message) == ("error", "may not delete trainjobs in team")


def test_in_a_pod_an_api_that_does_not_answer_is_a_warning(config, api):
    server = api({API: SERVED})
    client.Configuration._default.api_key["authorization"] = "Bearer other"
    assert {finding.state for finding in doctor_trainer.in_step(config)} == {"warning"}
    client.Configuration._default.host = f"http://127.0.0.1:{server.server_port + 1}"
    finding = doctor_trainer.in_step(config)[0]
    assert finding.state == "warning" and "gave no answer" in finding.message


def test_a_pod_without_a_token_cannot_create_nodes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(in_cluster, "NAMESPACE", tmp_path / "nothing")
    (finding,) = doctor_trainer.in_step(config)
    assert finding.state == "error" and "no token of a service account" in finding.message


def test_the_doctors_step_asks_on_a_cluster_only(config, api, monkeypatch):
    monkeypatch.setattr(doctor, "step_environment", lambda _: [])
    monkeypatch.setenv("KFP_RUN_ID", "run")
    monkeypatch.setenv("PTL_RUN_ID", "run")
    doctor.task(config.model_dump(mode="json"), "experiment")  # a local runner
    monkeypatch.delenv("PTL_RUN_ID")
    api({API: SERVED, RUNTIME: OURS})
    with pytest.raises(InputError, match="may not create trainjobs"):
        doctor.task(config.model_dump(mode="json"), "experiment")
