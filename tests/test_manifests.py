"""The manifests: every overlay builds, is valid and secure, and no secret value is in git. The linters of all files."""

import base64
import fnmatch
import functools
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import yaml
from checkout import CONFIGS, ROOT
from conftest import PREFACE, free_port

from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import servers
from ptl.steps import trainjob
from ptl.storage.training_checkpoints import TrainingCheckpoints

MANIFESTS = ROOT / "manifests"
CI = ROOT / "examples/ci"
SCRIPTS = ("examples/ci/*.sh", "docker/*.sh", ".ci/docker.sh", ".ci/run")  # a release has no .ci
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())


def tool(name):
    """A checker's path; the test says loudly that it was skipped where the checker is missing."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(
            f"NOT CHECKED: {name} is not installed here; CONTRIBUTING.md says how to install it"
        )
    return found


def run(name, *arguments, cwd=ROOT):
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
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


def by_name(text):
    return {(entry["kind"], entry["metadata"]["name"]): entry for entry in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def kustomized(filled):
    """The file that a folder builds, below the overlays; it is valid for Kubernetes."""

    @functools.cache
    def build(folder):
        out = filled / f"{folder.replace('/', '-')}.yaml"
        out.write_text(run("kustomize", "build", filled / "overlays" / folder))
        assert "ERROR" not in run("kubernetes-validate", "--strict", out)
        return out

    return build


@pytest.fixture(params=OVERLAYS)
def built(request, kustomized):
    return kustomized(request.param)


def allowed_hosts(found):
    (settings,) = [
        entry["data"] for (_, name), entry in found.items() if name.startswith("mlflow-settings")
    ]
    return settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def assert_restricted(pod):
    """As Pod Security's standard `restricted` wants it, and a little more."""
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_an_overlay_is_secure_and_has_what_steps_name(built):
    found = by_name(built.read_text())
    assert all(
        kind == "Namespace" or entry["metadata"].get("namespace")
        for (kind, _), entry in found.items()
    )
    workloads = [
        entry for (kind, _), entry in found.items() if kind in ("Deployment", "StatefulSet")
    ]
    pods = [workload["spec"]["template"]["spec"] for workload in workloads]
    assert len(pods) >= 2
    for pod in pods:
        assert_restricted(pod)
        for container in pod["containers"]:
            assert (
                container["resources"]["limits"]
                and container["readinessProbe"]
                and container["livenessProbe"]
            )
    storage = load_config(CONFIGS / "onprem.yaml").storage
    assert ("PersistentVolumeClaim", storage.cache_claim) in found
    if built.stem == "onprem":
        assert ("LocalQueue", "ptl") in found
        # the key that the step reads
        assert set(found["ConfigMap", storage.ca_config_map]["data"]) == {"ca.crt"}
    if built.stem != "aws":
        assert set(found["Secret", "ptl-s3"]["data"]) == {
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        }
    assert "mlflow.ptl.svc.cluster.local:*" in allowed_hosts(found)
    assert (
        found["ConfigMap", "ptl"]["data"]["MLFLOW_TRACKING_URI"]
        == "http://mlflow.ptl.svc.cluster.local:5000"
    )


@pytest.fixture(scope="module")
def with_component(filled, kustomized):
    """Objects of the overlay dev with one component more."""

    @functools.cache
    def build(component):
        part = filled / "overlays/dev" / ("mlflow" if component in ("ingress", "istio") else "runs")
        file = shutil.copytree(part, part.with_name(f"with-{component}")) / "kustomization.yaml"
        settings = yaml.safe_load(file.read_text())
        file.write_text(
            yaml.safe_dump(settings | {"components": [f"../../../components/{component}"]})
        )
        return by_name(kustomized(f"dev/with-{component}").read_text())

    return build


def test_components_can_be_added_and_steps_then_start_nodes_and_change_nothing_else(with_component):
    assert all(map(with_component, ("istio", "kfp-launcher", "kueue")))
    found = with_component("ingress")  # MLflow knows its host, whose name is set in one file
    (host,) = [
        entry["spec"]["rules"][0]["host"] for (kind, _), entry in found.items() if kind == "Ingress"
    ]
    assert {host, "mlflow.ptl.svc.cluster.local:*"} <= set(allowed_hosts(found))
    found = with_component("trainer")
    binding = found["RoleBinding", "ptl-recover"]
    namespace = binding["metadata"]["namespace"]
    assert namespace == found["TrainingRuntime", "ptl-recover"]["metadata"]["namespace"]
    subjects = {(subject["name"], subject["namespace"]) for subject in binding["subjects"]}
    assert subjects == {("pipeline-runner", namespace), ("default-editor", namespace)}
    rules = found[binding["roleRef"]["kind"], binding["roleRef"]["name"]]["rules"]
    granted = {
        (verb, resource)
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {("get", "trainjobs"), ("get", "pods"), ("list", "pods"), ("get", "pods/log")} <= granted
    changes = {right for right in granted if right[0] not in ("get", "list", "watch")}
    assert changes == {("create", "trainjobs"), ("delete", "trainjobs")}


def test_the_account_of_runs_reads_what_status_says_of_pods_and_changes_only_runs():
    documents = yaml.safe_load_all((MANIFESTS / "base/runs/rbac.yaml").read_text())
    (role,) = [document for document in documents if document["kind"] == "Role"]
    rights = [(set(rule["verbs"]), rule["resources"], rule["apiGroups"]) for rule in role["rules"]]
    granted = {
        (verb, resource)
        for verbs, resources, _ in rights
        for resource in resources
        for verb in verbs
    }
    assert {
        ("list", "pods"),
        ("list", "events"),
        ("list", "workflows"),
        ("get", "pods/log"),
    } <= granted
    for verbs, _, groups in rights:
        assert verbs <= {"get", "list"} or groups == ["pipelines.kubeflow.org"]


def test_nodes_are_restarted_together_except_for_wrong_input():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

    runtime = yaml.safe_load((MANIFESTS / "components/trainer/runtime.yaml").read_text())
    # The types leave out what they do not know, so nothing may be missing when it comes back.
    assert TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    jobset = runtime["spec"]["template"]["spec"]
    (job,) = jobset["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never") and jobset["failurePolicy"][
        "maxRestarts"
    ] > 0
    (in_job,), (in_jobset,) = spec["podFailurePolicy"]["rules"], jobset["failurePolicy"]["rules"]
    assert in_job["action"] == "FailJob" and in_job["onExitCodes"]["values"] == [
        InputError.exit_code
    ]
    assert in_jobset["action"] == "FailJobSet" and in_jobset["onJobFailureReasons"] == [
        "PodFailurePolicy"
    ]
    # A step's TrainJob changes what is there.
    (node,) = pod["containers"]
    assert (job["name"], node["name"]) == (trainjob.JOB, trainjob.CONTAINER)
    assert_restricted(pod)


@pytest.mark.nightly
def test_no_port_of_seaweedfs_answers_without_a_key(filled, tmp_path):
    """The real server, on loopback and other ports, with keys by the commands of docs/install.md."""
    overlay = shutil.copytree(filled, tmp_path / "manifests") / "overlays/onprem/mlflow"
    (overlay / "s3.env").write_text("AWS_ACCESS_KEY_ID=ptl\nAWS_SECRET_ACCESS_KEY=word\n")
    tool("openssl")
    guide = (ROOT / "docs/install.md").read_text()
    run("sh", "-c", re.search(r"^for key in .*?-out tls\.crt$", guide, re.M | re.S)[0], cwd=overlay)
    found = by_name(run("kustomize", "build", overlay))
    (container,) = found["StatefulSet", "seaweedfs"]["spec"]["template"]["spec"]["containers"]
    contents = [entry.get("data", {}) for entry in found.values()]
    keys = [found["Secret", source["secretRef"]["name"]]["data"] for source in container["envFrom"]]
    environment = {
        name: base64.b64decode(text).decode() for secret in keys for name, text in secret.items()
    }
    (security,) = [data["security.toml"] for data in contents if "security.toml" in data]
    stack = servers.folder(tmp_path)  # its working directory, where it looks for this file too
    (stack / "security.toml").write_text(security.replace("/etc/seaweedfs-tls", str(overlay)))
    (tmp_path / "data").mkdir()
    port = free_port()
    changed = {
        "-dir=/data": f"-dir={tmp_path}/data",
        "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
        "-s3.port=8333": "",
    }
    assert set(changed) <= set(container["args"])
    command = [
        tool("weed"),
        *filter(None, (changed.get(argument, argument) for argument in container["args"])),
    ]
    command += [
        f"-{part}.port={port + i}"
        for i, part in enumerate(("s3", "filer", "master", "volume", "admin"))
    ]
    # of the part that starts last
    servers.start(tmp_path, "s3", command, environment, port + 4, "/health")
    try:
        asked = {
            "/ptl/?list-type=2": 403,
            "/buckets/ptl/": 404,
            "/dir/status": 404,
            "/1,00": 401,
            "/api/users": 404,
        }
        for part, (path, status) in enumerate(asked.items()):
            assert (
                requests.get(f"http://127.0.0.1:{port + part}{path}", timeout=5).status_code
                == status
            ), path
            with socket.create_connection(
                ("127.0.0.1", port + part + servers.GRPC), timeout=5
            ) as plain:
                plain.sendall(PREFACE)
                assert plain.recv(100) == b"", path
    finally:
        servers.down(tmp_path)


def test_checkov(built):
    """checkov pins old libraries, so it lives in an environment of its own."""
    options = [
        "--skip-download",
        "--quiet",
        "--compact",
        "--config-file",
        MANIFESTS / ".checkov.yaml",
    ]
    assert "FAILED" not in run("checkov", *options, "-f", built)


@pytest.mark.parametrize(
    "command",
    [
        ("yamllint", "--strict", "-c", MANIFESTS / ".yamllint", MANIFESTS, CI),
        ("hadolint", MANIFESTS / "mlflow-image/Dockerfile", ROOT / "docker/Dockerfile"),
        ("actionlint", *sorted(CI.glob("github/*.yml"))),
        ("zizmor", "--offline", *sorted(CI.glob("github/*.yml"))),
        ("shellcheck", *(path for pattern in SCRIPTS for path in sorted(ROOT.glob(pattern)))),
    ],
    ids=lambda command: command[0],
)
def test_linters(command):
    run(*command)


# Assignments to names whose value is a credential, tokens, and private keys.
SECRETS = re.compile(
    r"\w*(?:SECRET_ACCESS_KEY|PASSWORD|SERVER_SECRET_KEY|_TOKEN)[ \t]*[=:][ \t]*[\"']?[A-Za-z0-9/+_=.-]{16,}|"
    r"\b(AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|glpat-[A-Za-z0-9_-]{20,})\b|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def test_no_secret_value_is_in_the_repository():
    assert SECRETS.search("AWS_SECRET_ACCESS_KEY" + "=wJalrXUtnFEMIK7MDENGbPx")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".safetensors", ".gz", ".png", ".parquet"):
            found = SECRETS.search(path.read_text(errors="replace"))
            assert not found, f"{name}: {found[0]}"


def test_steps_may_delete_training_checkpoints_and_nothing_else(tmp_path):
    """The role's policy on AWS against the paths that a step writes."""
    policy = json.loads((MANIFESTS / "overlays/aws/s3-policy.json").read_text())
    (allowed,) = (
        one["Resource"] for one in policy["Statement"] if "s3:DeleteObject" in one["Action"]
    )
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/weights").write_text("2")
    bucket = tmp_path / "my-bucket"
    root = f"file://{bucket}/ptl/1/ptl"
    TrainingCheckpoints(root, "5f0c-run", "recover-1.0", "key", 0).save(tmp_path / "checkpoint-2")
    written = [
        path.relative_to(tmp_path).as_posix() for path in bucket.rglob("*") if path.is_file()
    ]
    assert len(written) == 3 and all(
        fnmatch.fnmatch(f"arn:aws:s3:::{path}", allowed) for path in written
    )
    kept = (
        "ptl/1/models/m-1/artifacts/model.safetensors",
        "ptl/1/ptl/5f0c-run/recover-1/manifest.json",
    )
    assert not any(fnmatch.fnmatch(f"arn:aws:s3:::my-bucket/{path}", allowed) for path in kept)
