"""Steps in containers: what is asked before a run, what a container gets, a step as a cluster starts it, whole runs.

What needs an engine with the images is marked `docker` and skips loudly without one; the rest runs everywhere.
"""

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import compiled
import pytest
import whole_run
from checkout import ROOT, TINY
from conftest import free_port
from mlflow import MlflowClient
from whole_run import CHAIN, Run, Servers

from pipelines.prune_tune_loop import containers
from ptl.config import image_names
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import runs, servers
from ptl.storage import store

pytestmark = pytest.mark.xdist_group("loop")  # beside the run in processes that is compared with


def test_what_containers_need_is_asked_first(docker, monkeypatch):
    config = load_config(TINY, {"export": [{"format": "gguf", "type": "q8_0"}]})
    containers.check(config, "http://")
    no_image = "the engine has no {}; make them with `ptl images build"
    for fails, message in (
        ("version*", r"--runner docker: docker: no engine answers \(no such thing\); start Docker"),
        ("image inspect ptl-recover*", no_image.format(image_names.image("recover"))),
        (
            "image inspect ptl-export-gguf*",
            f"{no_image.format(image_names.image('export-gguf'))} --with export-gguf`",
        ),
    ):
        monkeypatch.setenv("FAIL", fails)
        with pytest.raises(InputError, match=message):
            containers.check(config, "http://")
    monkeypatch.setenv("FAIL", "nothing")
    monkeypatch.setenv("ANSWER", '["name=seccomp,profile=builtin","name=rootless"]')
    with pytest.raises(InputError, match=r"the engine is rootless.*; use the system's engine"):
        containers.check(config, "http://")


def test_mounts_are_the_files_that_the_config_names(docker, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = load_config(TINY)
    given = containers.arguments(
        config, tmp_path / "run", {"PTL_RUN_ID": "r"}, f"file://{tmp_path}/artifacts"
    )
    mounts = {mount["Target"]: mount["ReadOnly"] for mount in given["mounts"]}
    writable = {
        str(tmp_path / "run"),
        str(tmp_path / "artifacts"),
        *containers.hub_caches().values(),
    }
    certificates = {os.environ.get(name) for name in containers.mounts.BUNDLES}
    assert {path for path, read_only in mounts.items() if not read_only} == writable
    assert {*mounts} - writable - certificates == {str(ROOT / "examples/tiny_reasoner")}
    assert all(Path(path).is_absolute() for path in writable)
    assert given["working_dir"] == str(ROOT) and given["environment"]["PTL_RUN_ID"] == "r"
    assert given["user"] == f"{os.getuid()}:0" and given["labels"] == {
        containers.LABEL: str(tmp_path / "run")
    }
    assert given["read_only"] and given["cap_drop"] == ["ALL"] and "privileged" not in given
    assert given["security_opt"] == ["no-new-privileges:true"] and "device_requests" not in given
    monkeypatch.setenv("ANSWER", '{"nvidia":{"path":"nvidia-container-runtime"}}')
    (gpus,) = containers.arguments(config, tmp_path / "run", {}, "s3://ptl/x")["device_requests"]
    assert gpus["Count"] == -1 and gpus["Capabilities"] == [["gpu"]]
    # Of a snapshot in the Hub's cache the blobs are mounted too
    snapshot = tmp_path / "models--someone--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert snapshot.parents[1] in containers.files(load_config(TINY, {"model.path": str(snapshot)}))
    # Of a task what its YAML includes, and beside it all but what the working directory is in
    task = tmp_path / "tasks" / "own.yaml"
    task.parent.mkdir()
    included = tmp_path / "base.yaml"
    included.write_text((ROOT / config.evaluate.tasks[0].name).read_text())
    data = ROOT / "examples/tiny_reasoner/test.jsonl"
    task.write_text(
        f"include: ../base.yaml\ntask: own\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    )
    own = load_config(TINY, {"evaluate.tasks.0.name": str(task)})
    assert {task.parent, included} <= containers.files(own)
    monkeypatch.chdir(task.parent)
    assert task.parent not in (found := containers.files(own)) and {task, included} <= found
    # A file that is in a step's key is in its container.
    module = task.parent / "inner" / "grade.py"
    module.parent.mkdir()
    module.touch()
    assert module not in found
    task.write_text(f"{task.read_text()}process_docs: !function inner.grade.ask\n")
    assert module in containers.files(own)


@pytest.fixture(scope="module")
def stack_up(evaluate_image, weed, new_database, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    new_database(servers.folder(home))
    with Servers(home, free_port(), free_port()) as up:
        yield up


POD = {
    "KFP_POD_UID": "399d90a8",
    "PTL_ARGO_NODE": "tiny-w6n7q(0).root(0).import-model(0).executor(0)",
}
POD |= {"PTL_KFP_UI": "https://kubeflow.example.com/pipeline"}
RESTRICTED = [
    "--network=host",
    "--user=12345:0",
    "--read-only",
    "--tmpfs=/tmp:rw,exec",
    "--cap-drop=ALL",
]
RESTRICTED += ["--security-opt=no-new-privileges"]
OUT = "mlpipeline/v2/artifacts/tiny/run/import-model/1/out"


def pod(folder, env, name):
    """Start the compiled import-model as Kubeflow's launcher does: its command, its executor input, its mounts.

    Files in place of volumes, and no variable of MLflow or S3 in the pod. Returns the output's artifact and pointer.
    """
    spec, _ = compiled.documents()
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    parameters = {
        key: defaults[source["componentInputParameter"]]["defaultValue"]
        if "componentInputParameter" in source
        else source["runtimeValue"]["constant"]
        for key, source in spec["root"]["dag"]["tasks"]["import-model"]["inputs"][
            "parameters"
        ].items()
    }
    out = {"name": "out", "type": {"schemaTitle": "system.Model"}, "uri": f"minio://{OUT}"}
    given = {
        "inputs": {"parameterValues": parameters | {"run_name": "tiny-1"}},
        "outputs": {
            "artifacts": {"out": {"artifacts": [out]}},
            "outputFile": "/minio/output_metadata.json",
        },
    }
    command = [
        "docker",
        "run",
        "--rm",
        *RESTRICTED,
        f"--mount=type=bind,src={folder / 'minio'},dst=/minio",
    ]
    for volume, prefixes in {
        "config": ("MLFLOW_", "AWS_DEFAULT"),
        "s3": ("AWS_ACCESS", "AWS_SECRET"),
    }.items():
        (folder / volume).mkdir()
        for key in filter(lambda key: key.startswith(prefixes), env):
            (folder / volume / key).write_text(env[key])
        command.append(f"--mount=type=bind,src={folder / volume},dst=/etc/ptl/{volume},readonly")
    (folder / "minio").mkdir()
    (folder / "minio").chmod(0o777)
    command += [f"--env={key}={value}" for key, value in (POD | {"KFP_RUN_ID": name}).items()]
    container = spec["deploymentSpec"]["executors"]["exec-import-model"]["container"]
    command += [container["image"], *container["command"]]
    command += [
        json.dumps(given) if argument == "{{$}}" else argument for argument in container["args"]
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert env["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    (artifact,) = json.loads((folder / "minio/output_metadata.json").read_text())["artifacts"][
        "out"
    ]["artifacts"]
    return artifact, store.Pointer.load((folder / "minio" / OUT).read_text())


@pytest.mark.docker
def test_a_pods_files_become_the_steps_environment(stack_up, tmp_path):
    name = f"kfp-{os.urandom(4).hex()}"
    artifact, pointer = pod(tmp_path, stack_up.env, name)
    assert artifact["metadata"]["uri"] == pointer.uri and artifact["uri"] == f"minio://{OUT}"
    client = MlflowClient(stack_up.env["MLFLOW_TRACKING_URI"])
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs_ = client.search_runs(experiments, f"tags.`ptl.run` = '{name}'")
    by_role = {run.data.tags["ptl.role"]: run for run in runs_}
    assert by_role["parent"].info.run_name == "tiny-1"
    page = f"https://kubeflow.example.com/pipeline/#/runs/details/{name}"
    assert by_role["parent"].data.tags["ptl.kubeflow"] == page
    assert by_role["step"].data.tags["ptl.attempt"] == "1"


def containers_of(folder):
    command = [
        "docker",
        "ps",
        "--quiet",
        "--no-trunc",
        "--filter",
        f"label={containers.LABEL}={folder}",
    ]
    return subprocess.check_output(command, text=True).split()


@pytest.mark.docker
@pytest.mark.nightly
def test_a_run_in_containers_is_killed_and_resumed_and_ends_as_one_in_processes(
    engine, config, stack_up, finished, monkeypatch
):
    """Killed in mid-recovery; the same command removes the container that is left and resumes from its checkpoint.

    The same digests for the same torch build, else accuracies within the interval.
    """
    first = Run(config, stack_up.home, "--s3", "--runner", "docker")
    first.wait_for(
        lambda: [
            *stack_up.home.glob("runs/*/scratch/recover-1/training-*/checkpoint-*/ptl-complete")
        ]
    )
    left = containers_of(first.folder)
    # Else it might finish before it is removed.
    subprocess.run(["docker", "pause", *left], check=True, capture_output=True)
    first.kill()
    second = Run(config, stack_up.home, "--s3", "--runner", "docker").end()
    there = subprocess.check_output(["docker", "ps", "--all", "--quiet", "--no-trunc"], text=True)
    assert left and not set(left) & set(there.split()) and containers_of(second.folder) == []
    assert second.folder == first.folder and "prune-1: done before" in second.output
    log = (second.folder / "log.txt").read_text()
    assert [*dict.fromkeys(re.findall(r"Executing task (?:\x1b\[\d+m)?'([\w-]+)'", log))] == [
        *CHAIN,
        "report",
    ]

    for name, value in stack_up.env.items():
        monkeypatch.setenv(name, value)
    location = runs.artifact_location("ptl")
    one = {
        step: asdict(store.committed(f"{location}/ptl", second.folder.name, step)) for step in CHAIN
    }
    other = whole_run.records(finished[0])
    assert one["recover-1"]["metadata"]["resumed_at"] >= 2
    if one["import-model"]["metadata"]["versions"] == other["import-model"]["metadata"]["versions"]:
        assert whole_run.digests(one) == whole_run.digests(other)
    else:
        results = (second.folder / "result.json", finished[0] / "latest/result.json")
        rows = [json.loads(path.read_text())["rows"][:3] for path in results]
        assert all(
            theirs["low"] <= mine["accuracy"] <= theirs["high"]
            for mine, theirs in zip(*rows, strict=True)
        )
