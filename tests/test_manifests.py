"""The manifests: every overlay builds, is valid and secure, names its namespaces, and no secret value is in git."""

import base64
import fnmatch
import http.server
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
import yaml
from conftest import free_port
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

from ptl import address
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import servers
from ptl.steps import trainjob
from ptl.storage import training_checkpoints

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
CLUSTER_WIDE = {"Namespace"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # how a gRPC client begins


def tool(name):
    """A checker's path; the test says loudly that it was skipped where the checker is missing."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"NOT CHECKED: {name} is not installed here; CONTRIBUTING.md says how to install it")
    return found


def run(*command, cwd=ROOT):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A copy in which every example file stands in for the file that a user fills in."""
    copy = tmp_path_factory.mktemp("manifests") / "manifests"
    shutil.copytree(MANIFESTS, copy, ignore=shutil.ignore_patterns("*.env", "ca.crt"))
    for example in copy.rglob("*.example"):
        shutil.copy(example, example.with_suffix(""))
    return copy


@pytest.fixture(scope="module", params=OVERLAYS)
def built(request, filled):
    out = filled / f"{request.param}.yaml"
    out.write_text(run(tool("kustomize"), "build", filled / "overlays" / request.param))
    return out


def objects(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_overlays_are_valid_for_kubernetes(built):
    said = run(tool("kubernetes-validate"), "--strict", built)
    assert "ERROR" not in said


def test_every_object_has_a_namespace_of_the_overlay(built):
    found = [entry for entry in objects(built) if entry["kind"] not in CLUSTER_WIDE]
    assert found and all(entry["metadata"].get("namespace") for entry in found)
    for part in ("mlflow", "runs"):
        text = (MANIFESTS / "overlays" / built.stem / part / "kustomization.yaml").read_text()
        assert yaml.safe_load(text)["namespace"]


def test_pods_meet_the_restricted_standard(built):
    (namespace,) = [entry for entry in objects(built) if entry["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [
        entry["spec"]["template"]["spec"] for entry in objects(built) if entry["kind"] in ("Deployment", "StatefulSet")
    ]
    assert len(pods) >= 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"] and container["readinessProbe"] and container["livenessProbe"]


def test_steps_find_what_the_compiled_pipeline_names(built):
    by_name = {(entry["kind"], entry["metadata"]["name"]): entry for entry in objects(built)}
    addresses = by_name["ConfigMap", "ptl"]["data"]
    assert addresses["MLFLOW_TRACKING_URI"] == "http://mlflow.ptl.svc.cluster.local:5000"
    guide = (ROOT / "docs/install.md").read_text()
    assert all(f"`{key}`" in guide for key in [*addresses, *by_name["Secret", "ptl-mlflow"]["data"]])
    assert not set(addresses) & {"AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"}  # the step sets them
    storage = load_config(ROOT / "pipelines/prune_tune_loop/configs/onprem.yaml").storage
    assert ("PersistentVolumeClaim", storage.cache_claim) in by_name
    if built.stem == "onprem":
        assert ("ConfigMap", storage.ca_config_map) in by_name and ("LocalQueue", "ptl") in by_name
        assert set(by_name["ConfigMap", storage.ca_config_map]["data"]) == {"ca.crt"}  # the key that the step reads
    if built.stem != "aws":
        assert set(by_name["Secret", "ptl-s3"]["data"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    allowed = next(entry["data"] for (_, name), entry in by_name.items() if name.startswith("mlflow-settings"))
    assert "mlflow.ptl.svc.cluster.local:*" in allowed["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    origin = address.origin(addresses["MLFLOW_TRACKING_URI"])  # of links, where PTL_MLFLOW_UI is not set
    assert origin in allowed["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    (server,) = by_name["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert any(source.get("configMapRef", {}).get("name", "").startswith("mlflow-set") for source in server["envFrom"])


def test_dev_keeps_to_what_a_profile_may_reach(filled):
    """Of Kubeflow 2.17's SeaweedFS, by its profile controller's policies and its NetworkPolicy.

    `private-artifacts/` is open to a profile as well, but Kubeflow can be set to delete old files there.
    """
    found = list(yaml.safe_load_all(run(tool("kustomize"), "build", filled / "overlays/dev")))
    (profile,) = {entry["metadata"]["namespace"] for entry in found if entry["metadata"]["name"] == "ptl-submit"}
    settings = next(entry["data"] for entry in found if entry["metadata"]["name"].startswith("mlflow-settings"))
    root = settings["ARTIFACT_ROOT"].removeprefix("s3://mlpipeline/")
    assert root.startswith(("artifacts/", f"private/{profile}/", "shared/"))
    (namespace,) = [entry for entry in found if entry["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["app.kubernetes.io/part-of"] == "kubeflow-profile"


@pytest.mark.parametrize(
    ("component", "count"), [("ingress", 2), ("istio", 1), ("kfp-launcher", 1), ("kueue", 1), ("trainer", 4)]
)
def test_components_can_be_added(filled, component, count, tmp_path):
    part = {"ingress": "mlflow", "istio": "mlflow"}.get(component, "runs")
    folder = filled / "overlays" / "dev" / f"with-{component}"
    folder.mkdir()
    added = {"resources": [f"../{part}"], "components": [f"../../../components/{component}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(added))
    out = tmp_path / "built.yaml"
    out.write_text(run(tool("kustomize"), "build", folder))
    run(tool("kubernetes-validate"), "--strict", "--quiet", out)
    plain = len(list(yaml.safe_load_all(run(tool("kustomize"), "build", filled / "overlays/dev" / part))))
    assert len(objects(out)) == plain + count
    if component == "ingress":
        assert_mlflow_knows_its_host(objects(out))


def assert_mlflow_knows_its_host(found):
    """Whose name is set in one file."""
    settings = next(entry["data"] for entry in found if entry["metadata"]["name"].startswith("mlflow-settings"))
    (ingress,) = [entry["spec"] for entry in found if entry["kind"] == "Ingress"]
    host = ingress["rules"][0]["host"]
    assert host != "HOST" and ingress["tls"][0]["hosts"] == [host]
    hosts = settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert host in hosts and "mlflow.ptl.svc.cluster.local:*" in hosts
    assert settings["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"


@pytest.fixture(params=OVERLAYS)
def with_trainer(request, filled):
    """Objects of an overlay's runs by kind and name, with the component `trainer` as its comment says."""
    runs = filled / "overlays" / request.param / "runs"
    folder = runs.with_name("runs-with-trainer")
    shutil.copytree(runs, folder, dirs_exist_ok=True)
    text = (runs / "kustomization.yaml").read_text()
    text, count = re.subn(r"^( *)# (components:| *- \S+/trainer)$", r"\1\2", text, flags=re.M)
    assert count in (1, 2)
    (folder / "kustomization.yaml").write_text(text)
    out = filled / f"{request.param}-with-trainer.yaml"
    out.write_text(run(tool("kustomize"), "build", folder))
    run(tool("kubernetes-validate"), "--strict", "--quiet", out)
    return {(entry["kind"], entry["metadata"]["name"]): entry for entry in objects(out)}


def test_the_account_of_the_steps_in_the_runs_namespace_may_start_nodes(with_trainer):
    binding = with_trainer["RoleBinding", "ptl-recover"]
    namespace = binding["metadata"]["namespace"]
    assert namespace == with_trainer["ConfigMap", "ptl"]["metadata"]["namespace"]
    assert namespace == with_trainer["TrainingRuntime", "ptl-recover"]["metadata"]["namespace"]
    subjects = {(subject["name"], subject["namespace"]) for subject in binding["subjects"]}
    assert subjects == {("pipeline-runner", namespace), ("default-editor", namespace)}
    role = with_trainer[binding["roleRef"]["kind"], binding["roleRef"]["name"]]
    granted = {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    # What a recover step does.
    assert {(verb, "trainer.kubeflow.org", "trainjobs") for verb in ("create", "get", "delete")} <= granted
    assert {("get", "", "pods"), ("list", "", "pods"), ("get", "", "pods/log")} <= granted
    # Nothing of it lets a step change anything but TrainJobs.
    assert {right for right in granted if right[0] not in ("get", "list", "watch")} == {
        ("create", "trainer.kubeflow.org", "trainjobs"),
        ("delete", "trainer.kubeflow.org", "trainjobs"),
    }


RUNTIME = MANIFESTS / "components/trainer/runtime.yaml"


def test_the_runtime_is_one_that_kubeflow_trainer_knows():
    written = yaml.safe_load(RUNTIME.read_text())
    # The types leave out what they do not know, so nothing may be missing when it comes back.
    assert TrainerV1alpha1TrainingRuntime.from_dict(written).to_dict() == written
    wrong = yaml.safe_load(RUNTIME.read_text().replace("onJobFailureReasons", "onJobFailureReason"))
    assert TrainerV1alpha1TrainingRuntime.from_dict(wrong).to_dict() != wrong


def test_nodes_start_again_together_or_not_at_all():
    jobset = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]
    (job,) = jobset["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    # A wrong input ends the whole training; anything else is restarted.
    (in_job,), (in_jobset,) = spec["podFailurePolicy"]["rules"], jobset["failurePolicy"]["rules"]
    assert in_job["action"] == "FailJob" and in_job["onExitCodes"]["values"] == [InputError.exit_code]
    assert in_jobset["action"] == "FailJobSet" and in_jobset["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert in_job["onExitCodes"]["containerName"] == "node" and in_jobset["targetReplicatedJobs"] == ["node"]
    assert jobset["failurePolicy"]["maxRestarts"] > 0


def test_a_steps_trainjob_changes_what_the_runtime_has():
    (job,) = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert (job["name"], pod["containers"][0]["name"]) == (trainjob.JOB, trainjob.CONTAINER)


def test_nodes_meet_the_restricted_standard():
    (job,) = yaml.safe_load(RUNTIME.read_text())["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["automountServiceAccountToken"] is False
    (node,) = pod["containers"]
    assert node["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # The Dockerfile's caches are below /tmp, and NCCL needs more than 64 MiB of shared memory.
    assert {mount["mountPath"] for mount in node["volumeMounts"]} == {"/tmp", "/dev/shm"}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes == {"shm": {"medium": "Memory"}, "tmp": {}}


def test_nodes_reach_each_other_and_what_a_step_reaches(with_trainer):
    """By the labels that a node's pod has: the runtime's, and JobSet's as recorded on a cluster."""
    (job,) = with_trainer["TrainingRuntime", "ptl-recover"]["spec"]["template"]["spec"]["replicatedJobs"]
    recorded = {"jobset.sigs.k8s.io/jobset-name": "ptl-recover-1"}
    labels = job["template"]["spec"]["template"]["metadata"]["labels"] | recorded

    def selects(selector, labels):
        names = [expression["key"] for expression in selector.get("matchExpressions", [])]
        return selector["matchLabels"].items() <= labels.items() and set(names) <= set(labels)

    nodes, steps = (with_trainer["NetworkPolicy", name]["spec"] for name in ("ptl-nodes", "ptl-steps"))
    assert selects(steps["podSelector"], labels) and selects(nodes["podSelector"], labels)
    (inward,), (outward,) = nodes["ingress"], nodes["egress"]
    assert set(inward) == {"from"} and set(outward) == {"to"}  # any port
    assert all(selects(peer["podSelector"], labels) for peer in [*inward["from"], *outward["to"]])
    step = {"app.kubernetes.io/part-of": "ptl"}
    assert selects(steps["podSelector"], step) and not selects(nodes["podSelector"], step)


def seaweedfs_of(overlay):
    """Of an overlay's server: arguments, environment, security.toml."""
    found = list(yaml.safe_load_all(run(tool("kustomize"), "build", overlay)))
    data = {entry["metadata"]["name"]: entry["data"] for entry in found if entry["kind"] in ("ConfigMap", "Secret")}
    (pod,) = [
        entry["spec"]["template"]["spec"]
        for entry in found
        if entry["kind"] == "StatefulSet" and entry["metadata"]["name"] == "seaweedfs"
    ]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container["volumeMounts"]}
    assert set(data[mounted["/etc/seaweedfs-tls"]["secret"]["secretName"]]) == {"tls.crt", "tls.key"}
    keys = [data[source["secretRef"]["name"]] for source in container["envFrom"]]
    environment = {name: base64.b64decode(text).decode() for secret in keys for name, text in secret.items()}
    return container["args"], environment, data[mounted["/etc/seaweedfs"]["configMap"]["name"]]["security.toml"]


@pytest.mark.slow
def test_no_port_of_seaweedfs_answers_without_a_key(filled, tmp_path):
    """The real server, on loopback and other ports, with keys by the commands of docs/install.md."""
    overlay = shutil.copytree(filled, tmp_path / "manifests") / "overlays/onprem/mlflow"
    (overlay / "s3.env").write_text("AWS_ACCESS_KEY_ID=ptl\nAWS_SECRET_ACCESS_KEY=word\n")
    tool("openssl")
    guide = (ROOT / "docs/install.md").read_text()
    run("sh", "-c", re.search(r"^for key in .*?-out tls\.crt$", guide, re.M | re.S)[0], cwd=overlay)
    arguments, environment, security = seaweedfs_of(overlay)
    stack = servers.folder(tmp_path)  # its working directory, where it looks for this file too
    (stack / "security.toml").write_text(security.replace("/etc/seaweedfs-tls", str(overlay)))
    data = tmp_path / "data"
    data.mkdir()
    port = free_port()
    changed = {"-dir=/data": f"-dir={data}", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1", "-s3.port=8333": ""}
    assert set(changed) <= set(arguments)
    command = [tool("weed"), *filter(None, (changed.get(argument, argument) for argument in arguments))]
    command += [f"-{part}.port={port + i}" for i, part in enumerate(("s3", "filer", "master", "volume", "admin"))]
    servers.start(tmp_path, "s3", command, environment, port + 4, "/health")  # of the part that starts last
    try:
        asked = {"/ptl/?list-type=2": 403, "/buckets/ptl/": 404, "/dir/status": 404, "/1,00": 401, "/api/users": 404}
        for part, (path, status) in enumerate(asked.items()):
            assert requests.get(f"http://127.0.0.1:{port + part}{path}", timeout=5).status_code == status, path
            with socket.create_connection(("127.0.0.1", port + part + servers.GRPC), timeout=5) as plain:
                plain.sendall(PREFACE)
                assert plain.recv(100) == b"", path
    finally:
        servers.down(tmp_path)


def test_checkov(built):
    """checkov pins old libraries, so it lives in an environment of its own."""
    config = MANIFESTS / ".checkov.yaml"
    said = run(tool("checkov"), "--skip-download", "--quiet", "--compact", "--config-file", config, "-f", built)
    assert "FAILED" not in said


def test_each_suppression_has_a_reason():
    lines = (MANIFESTS / ".checkov.yaml").read_text().splitlines()
    skips = [i for i, line in enumerate(lines) if line.strip().startswith("- CKV")]
    assert skips and all(lines[i - 1].strip().startswith("#") for i in skips)


def test_yamllint():
    assert run(tool("yamllint"), "--strict", "-c", MANIFESTS / ".yamllint", MANIFESTS) == ""


def test_the_image_of_mlflow_passes_hadolint():
    assert run(tool("hadolint"), MANIFESTS / "mlflow-image" / "Dockerfile") == ""


def tracked():
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard").split("\n")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# Names whose value is a credential, as assignments in text files.
SECRET = re.compile(
    r"(?:AWS_SECRET_ACCESS_KEY|POSTGRES_PASSWORD|MLFLOW_TRACKING_PASSWORD|MLFLOW_AUTH_ADMIN_PASSWORD|"
    r"MLFLOW_FLASK_SERVER_SECRET_KEY|HF_TOKEN|KFP_TOKEN)[ \t]*[=:][ \t]*[\"']?([A-Za-z0-9/+_=.-]{16,})"
)
TOKEN = re.compile(r"\b(AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|glpat-[A-Za-z0-9_-]{20,})\b")
PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def test_no_secret_value_is_in_the_repository():
    looked = 0
    for path in tracked():
        if path.suffix in (".safetensors", ".gz", ".png", ".parquet") or path.name == "test_manifests.py":
            continue
        text = path.read_text(errors="replace")
        looked += 1
        for pattern in (SECRET, TOKEN, PRIVATE):
            assert not (found := pattern.search(text)), f"{path}: {found[0]}"
        if "manifests" in path.parts and path.suffix in (".yaml", ".yml"):
            for document in yaml.safe_load_all(text):
                assert not (document and document.get("kind") == "Secret"), f"{path}: use a secretGenerator"
    assert looked > 100
    assert SECRET.search("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPx")  # the patterns do find something


def test_steps_may_delete_training_checkpoints_and_nothing_else(tmp_path):
    """The role's policy on AWS against the paths that a step writes."""
    policy = json.loads((MANIFESTS / "overlays/aws/s3-policy.json").read_text())
    (allowed,) = (one["Resource"] for one in policy["Statement"] if "s3:DeleteObject" in one["Action"])
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/weights").write_text("2")
    bucket = tmp_path / "my-bucket"
    checkpoints = training_checkpoints.TrainingCheckpoints(
        f"file://{bucket}/ptl/1/ptl", "5f0c-run", "recover-1.0", "key", 0
    )
    checkpoints.save(tmp_path / "checkpoint-2")
    written = [path.relative_to(tmp_path).as_posix() for path in bucket.rglob("*") if path.is_file()]
    assert len(written) == 3 and all(fnmatch.fnmatch(f"arn:aws:s3:::{path}", allowed) for path in written)
    kept = ("ptl/1/models/m-1/artifacts/model.safetensors", "ptl/1/ptl/5f0c-run/recover-1/manifest.json")
    assert not any(fnmatch.fnmatch(f"arn:aws:s3:::my-bucket/{path}", allowed) for path in kept)


def test_examples_hold_names_only_and_filled_in_files_are_ignored():
    examples = sorted(MANIFESTS.rglob("*.env.example"))
    assert len(examples) == 11
    for path in examples:
        for line in path.read_text().splitlines():
            assert line.startswith("#") or line.split("=")[1] in ("", "admin")
    done = subprocess.run(
        ["git", "check-ignore", "manifests/overlays/dev/runs/s3.env"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0


def test_the_command_that_makes_a_user_of_mlflow():
    """As docs/install.md has it, without mlflow[auth]; that package's own route is what it must ask for.

    It was tried on a real server of MLflow 3.17 with `--app-name basic-auth`; here a mock takes the request.
    """
    tool("curl")
    package = importlib.util.find_spec("mlflow").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("routes", f"{package}/server/auth/routes.py")
    routes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(routes)  # not by its package, which needs mlflow[auth]
    seen = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    guide = (ROOT / "docs/install.md").read_text()
    command = re.search(r"^curl (?:.*\\\n)*.*$", guide, re.M)[0]
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        changed = command.replace("localhost:5000", address).replace("--user admin ", "--user admin:word ")
        run("sh", "-c", changed.replace("curl ", "curl --noproxy '*' ", 1))
    finally:
        server.shutdown()
        server.server_close()
    login = "Basic " + base64.b64encode(b"admin:word").decode()
    assert seen == [(routes.CREATE_USER, login, "application/json", {"username": "ptl", "password": "..."})]
