"""The tiny pipeline against the real S3 and MLflow servers: in processes while servers fail, and in containers.

What needs an engine with the images is marked `docker` and skips loudly without one; the rest runs everywhere.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import whole_run
import yaml
from conftest import free_port
from safetensors.torch import load_file, save_file
from whole_run import CHAIN

from pipelines.prune_tune_loop import containers
from pipelines.prune_tune_loop.pipeline import compile_pipeline
from ptl.config import image_names
from ptl.config.run import load_config
from ptl.errors import InputError
from ptl.local import runs, servers
from ptl.storage import store

ROOT = Path(__file__).parents[2]
TINY = ROOT / "pipelines/prune_tune_loop/configs/tiny.yaml"
S3_DOWN, MLFLOW_DOWN = 6, 10  # seconds

pytestmark = pytest.mark.xdist_group("loop")  # beside the undisturbed run that is compared with


# ---- refused before any work


@pytest.fixture
def stub_docker(tmp_path, monkeypatch):
    """A stub named docker on PATH; fails where FAIL matches its arguments."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncase "$*" in $FAIL) echo "no such thing" >&2; exit 1 ;; esac\necho "$ANSWER"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "nothing")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")


@pytest.mark.parametrize(
    ("fails", "arguments", "said"),
    [
        ("version*", ["--s3"], "--runner docker: docker: no engine answers (no such thing); start Docker"),
        ("image inspect ptl-recover*", ["--s3"], f"the engine has no {image_names.image('recover')}; make them with"),
        (
            "image inspect ptl-export-gguf*",
            ["--s3", "--set", "export=[{format: gguf, type: q8_0}]"],
            f"no {image_names.image('export-gguf')}; make them with `ptl images build --with export-gguf`",
        ),
        ("nothing", [], "speak to an MLflow server only, and none is given; add --s3"),
    ],
    ids=["no-engine", "no-image", "no-optional-image", "no-server"],
)
def test_what_containers_need_is_asked_first(stub_docker, monkeypatch, tmp_path, fails, arguments, said):
    monkeypatch.setenv("FAIL", fails)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-m", "ptl", "run", TINY, "--runner", "docker", "--home", tmp_path / "home", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "home").exists()


def test_unknown_runner_and_server_that_does_not_answer(tmp_path):
    for arguments, said in (
        (["--runner", "podman"], "'podman' is not one of"),
        ([], "MLFLOW_TRACKING_URI: MLflow at http://127.0.0.1:9: "),
    ):
        command = [sys.executable, "-m", "ptl", "run", TINY, "--home", tmp_path / "home", *arguments]
        environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert not (tmp_path / "home" / "runs").exists()


def test_a_server_that_is_no_mlflow_is_reported(monkeypatch):
    """A mock: a plain web server, asked with a password in its address."""
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that what is taken from the address is undone
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(InputError, match=f"MLflow at http://127.0.0.1:{server.server_port}: ") as caught:
            runs.artifact_location("ptl")
        assert "secret" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


# ---- what a container gets


def test_mounts_are_the_files_that_the_config_names(stub_docker, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    config = load_config(TINY)
    example = ROOT / "examples/tiny_reasoner"
    assert {path for path in containers.files(config) if example not in path.parents} == {example}
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    given = containers.arguments(config, tmp_path / "run", {"PTL_RUN_ID": "r"}, f"file://{tmp_path}/artifacts")
    mounts = {mount["Target"]: mount["ReadOnly"] for mount in given["mounts"]}
    writable = [str(tmp_path / "run"), str(tmp_path / "artifacts"), *containers.hub_caches().values()]
    assert {path for path, read_only in mounts.items() if not read_only} == set(writable)
    assert {path for path, read_only in mounts.items() if read_only} - {
        os.environ.get(n) for n in containers.mounts.BUNDLES
    } == {str(example)}
    assert given["working_dir"] == str(ROOT) and given["environment"]["PTL_RUN_ID"] == "r"
    assert "device_requests" not in given
    monkeypatch.setenv("ANSWER", '{"nvidia":{"path":"nvidia-container-runtime"}}')
    (gpus,) = containers.arguments(config, tmp_path / "run", {}, "s3://ptl/x")["device_requests"]
    assert gpus["Count"] == -1 and gpus["Capabilities"] == [["gpu"]]
    assert given["read_only"] and given["cap_drop"] == ["ALL"] and "privileged" not in given


def test_of_a_snapshot_in_the_hubs_cache_the_blobs_are_mounted_too(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert all(Path(path).is_absolute() for path in containers.hub_caches().values())
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = load_config(TINY, {"model.path": str(snapshot)})
    assert snapshot.parents[1] in containers.files(config)


# ---- whole runs


class Servers:
    """The stack of one home, and what tests do to it."""

    def __init__(self, home):
        self.home = home
        self.ports = {"s3_port": free_port(), "mlflow_port": free_port()}
        try:
            self.env = servers.up(home, **self.ports)
        except BaseException:
            servers.down(home)
            raise

    def restart_s3(self):
        os.kill(json.loads((self.home / "stack" / "s3.service.json").read_text())["pid"], signal.SIGKILL)
        time.sleep(S3_DOWN)
        servers.s3_up(self.home, self.ports["s3_port"])

    def pause_mlflow(self):
        servers.stop(self.home, "mlflow")
        time.sleep(MLFLOW_DOWN)
        servers.up(self.home, **self.ports)


class Run:
    """A `ptl run` whose lines of progress are read as they come; `on` is called at those that begin with its keys."""

    def __init__(self, config, home, *arguments, on=None):
        self.process = whole_run.start(config, home, "--s3", *arguments)
        self.on, self.lines, self.home = on or {}, [], home
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        threads = []
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))
            for beginning, act in self.on.items():
                if line.startswith(beginning):
                    threads.append(threading.Thread(target=act))
                    threads[-1].start()
        for thread in threads:
            thread.join()

    def finish(self):
        code = self.process.wait(900)
        self.reader.join()
        assert code == 0, self.output
        return self

    @property
    def output(self):
        return "\n".join(line for _, line in self.lines)

    @property
    def folder(self):
        return Path(next(line for _, line in self.lines if " run " in line and " in /" in line).rpartition(" in ")[2])

    def seconds(self, start, end):
        """Between the first lines that begin like this."""
        first, last = (next(at for at, line in self.lines if line.startswith(text)) for text in (start, end))
        return last - first


@pytest.fixture(scope="module")
def stack_up(tmp_path_factory):
    up = Servers(tmp_path_factory.mktemp("home"))
    yield up
    servers.down(up.home)


@pytest.fixture
def records(stack_up, monkeypatch):
    """Records of a run's steps, from the store."""
    for name, value in stack_up.env.items():
        monkeypatch.setenv(name, value)
    location = runs.artifact_location("ptl")
    assert location.startswith(f"s3://{servers.BUCKET}/")

    def read(run):
        found = {step: store.committed(f"{location}/ptl", run.folder.name, step) for step in CHAIN}
        return {step: asdict(record) for step, record in found.items() if record}

    return read


def kill(run):
    """kill -9 of `ptl run`; its container stays at work."""
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.reader.join()


def wait_for(found, run):
    deadline = time.monotonic() + 300
    while not found():
        assert run.process.poll() is None and time.monotonic() < deadline, run.output
        time.sleep(0.02)


def tasks(run):
    """In the order of their first start."""
    found = re.findall(r"Executing task (?:\x1b\[\d+m)?'([\w-]+)'", (run.folder / "log.txt").read_text())
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def killed(config, stack_up):
    """In processes; the S3 server is killed in recover-1, and `ptl run` (kill -9) in the middle of recover-2."""
    run = Run(config, stack_up.home, on={"recover-1: started": stack_up.restart_s3})
    wait_for(lambda: list(stack_up.home.glob("runs/*/scratch/recover-2/training-*/checkpoint-*/ptl-complete")), run)
    run.process.kill()  # alone: what it has started must end by itself, before the same command writes there
    run.reader.join()
    return run


@pytest.fixture(scope="module")
def disturbed(config, stack_up, killed):
    """The same command again; the MLflow server is away in recover-2."""
    return Run(config, stack_up.home, on={"recover-2: started": stack_up.pause_mlflow}).finish()


def test_s3_server_restarted_in_mid_run(killed):
    assert killed.seconds("recover-1: started", "recover-1: done") > S3_DOWN


def test_a_killed_run_is_resumed_and_ends_the_same(finished, killed, disturbed, records):
    """Finished steps stay, training resumes from its checkpoint, and all bytes are those of an undisturbed run."""
    assert disturbed.folder == killed.folder and "continuing run" in disturbed.output
    resumed, straight = records(disturbed), whole_run.records(finished[0])
    for step in CHAIN:
        assert (f"{step}: done before" in disturbed.output) == (CHAIN.index(step) < CHAIN.index("recover-2"))
    assert resumed["recover-2"]["metadata"]["resumed_at"] >= 2
    assert whole_run.digests(resumed) == whole_run.digests(straight)


def test_mlflow_server_down_in_mid_run(disturbed, stack_up):
    assert disturbed.seconds("recover-2: started", "recover-2: done") > MLFLOW_DOWN
    from mlflow import MlflowClient

    client = MlflowClient(stack_up.env["MLFLOW_TRACKING_URI"])
    (experiment,) = (found for found in client.search_experiments() if found.name == "ptl")
    found = client.search_runs([experiment.experiment_id], f"tags.`ptl.run` = '{disturbed.folder.name}'")
    assert {run.data.tags.get("ptl.step", "parent") for run in found} == {"parent", "report", *CHAIN}
    assert {run.info.status for run in found} == {"FINISHED"}
    (recovery,) = (run for run in found if run.data.tags.get("ptl.step") == "recover-2")
    assert len(client.get_metric_history(recovery.info.run_id, "train/loss")) >= 12


def test_no_secret_is_written_into_the_run(disturbed, stack_up):
    secret = stack_up.env["AWS_SECRET_ACCESS_KEY"].encode()
    written = [path for path in disturbed.folder.rglob("*") if path.is_file()]
    assert {"pipeline.yaml", "log.txt", "result.json"} <= {path.name for path in written}
    assert not [path for path in written if secret in path.read_bytes()]


def inspect(folder):
    found = subprocess.run(
        ["docker", "ps", "--quiet", "--filter", f"label={containers.LABEL}={folder}"], capture_output=True, text=True
    ).stdout.split()
    return [json.loads(subprocess.check_output(["docker", "inspect", one]))[0] for one in found]


@pytest.fixture(scope="module")
def contained(engine, config, stack_up, disturbed):
    """In containers; what the engine says of one of them is kept."""
    seen = []
    look = {"recover-1: started": lambda: seen.extend(inspect(run.folder))}
    run = Run(config, stack_up.home, "--runner", "docker", on=look)
    run.finish()
    return run, seen


@pytest.mark.docker
def test_both_runners_execute_the_same_tasks(contained, disturbed, records):
    assert tasks(contained[0]) == tasks(disturbed) != []
    found = records(contained[0])
    assert sorted(CHAIN, key=lambda step: found[step]["metadata"]["started"]) == CHAIN


@pytest.mark.docker
def test_containers_end_like_processes(contained, disturbed, records):
    """The same digests for the same torch build, else accuracies within the interval."""
    one, other = records(contained[0]), records(disturbed)
    builds = [record["import-model"]["metadata"]["versions"] for record in (one, other)]
    if builds[0] == builds[1]:
        print("same builds: digests are compared")
        assert whole_run.digests(one) == whole_run.digests(other)
    else:
        print(f"other builds: accuracies are compared ({builds})")
        rows = [json.loads((run.folder / "result.json").read_text())["rows"] for run in (contained[0], disturbed)]
        assert len(rows[0]) == len(rows[1]) == 3
        assert all(theirs["low"] <= mine["accuracy"] <= theirs["high"] for mine, theirs in zip(*rows, strict=True))


@pytest.mark.docker
def test_containers_are_unprivileged(contained, config):
    run, (seen, *_) = contained
    assert seen["Config"]["User"] == f"{os.getuid()}:0"
    host = seen["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    writable = {mount["Destination"] for mount in seen["Mounts"] if mount["RW"]} - {"/kfp-workspace"}
    allowed = {run.folder, *map(Path, containers.hub_caches().values())}
    assert all(allowed & {Path(path), *Path(path).parents} for path in writable), writable
    assert inspect(run.folder) == []  # none is left


@pytest.mark.docker
def test_a_killed_run_resumes_in_containers(contained, config, stack_up, records):
    """In mid-recovery; the same command removes the container that is left and resumes from its training checkpoint."""
    first = Run(config, stack_up.home, "--runner", "docker")
    wait_for(lambda: list(stack_up.home.glob("runs/*/scratch/recover-1/training-*/checkpoint-*/ptl-complete")), first)
    left = [container["Id"] for container in inspect(first.folder)]
    subprocess.run(
        ["docker", "pause", *left], check=True, capture_output=True
    )  # else it might finish before it is removed
    kill(first)
    second = Run(config, stack_up.home, "--runner", "docker")
    wait_for(lambda: "recover-1: done" in second.output, second)  # the rest would be as in a run without a kill
    kill(second)
    containers.remove_leftovers(second.folder)
    there = subprocess.check_output(["docker", "ps", "--all", "--quiet", "--no-trunc"], text=True)
    assert left and not set(left) & set(there.split()) and inspect(second.folder) == []
    assert second.folder == first.folder and "continuing run" in second.output
    assert "prune-1: done before" in second.output
    found, straight = records(second), records(contained[0])
    assert found["recover-1"]["metadata"]["resumed_at"] >= 2
    for step in ("import-model", "prune-1", "recover-1"):
        assert found[step]["pointer"]["digest"] == straight[step]["pointer"]["digest"]


@pytest.mark.docker
def test_a_failing_container_reports_its_own_error_and_code(engine, config, stack_up, tmp_path):
    checkpoint = Path(shutil.copytree(ROOT / "examples/tiny_reasoner/checkpoint", tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    run = Run(config, stack_up.home, "--runner", "docker", "--set", f"model.path={checkpoint}")
    assert run.process.wait(300) == 2
    run.reader.join()
    assert "import-model: " in run.output and "tensor model.norm.weight" in run.output
    assert "Traceback" not in run.output


# ---- as a cluster starts a step


POD = {
    "KFP_POD_UID": "399d90a8-b29c-45bc-8b83-72354165788b",
    "PTL_ARGO_NODE": "tiny-w6n7q(0).root(0).import-model(0).executor(0)",
    "PTL_NODE": "node-1",
}


def pod(folder, env, name, values):
    """Start the compiled import-model as Kubeflow's launcher does: its command, its executor input, its mounts.

    Files in place of volumes, and no variable of MLflow or S3 in the pod. Returns exit code, log and output folder.
    """
    pipeline = folder / "pipeline.yaml"
    compile_pipeline(load_config(TINY), pipeline)
    spec, _ = yaml.safe_load_all(pipeline.read_text())
    task = spec["root"]["dag"]["tasks"]["import-model"]
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    parameters = {
        key: defaults[source["componentInputParameter"]]["defaultValue"]
        if "componentInputParameter" in source
        else source["runtimeValue"]["constant"]
        for key, source in task["inputs"]["parameters"].items()
    }
    container = spec["deploymentSpec"]["executors"]["exec-import-model"]["container"]
    out = "minio://mlpipeline/v2/artifacts/tiny/run/import-model/1/out"
    given = {
        "inputs": {"parameterValues": parameters | values},
        "outputs": {
            "artifacts": {"out": {"artifacts": [{"name": "out", "type": {"schemaTitle": "system.Model"}, "uri": out}]}},
            "outputFile": "/minio/output_metadata.json",
        },
    }
    volumes = {"config": ("MLFLOW_", "AWS_DEFAULT"), "s3": ("AWS_ACCESS", "AWS_SECRET")}
    for volume, prefixes in volumes.items():
        (folder / volume).mkdir(exist_ok=True)
        for key, value in env.items():
            if key.startswith(prefixes):
                (folder / volume / key).write_text(value)
    (folder / "minio").mkdir(exist_ok=True)
    (folder / "minio").chmod(0o777)
    mounts = [f"--mount=type=bind,src={folder / volume},dst=/etc/ptl/{volume},readonly" for volume in volumes]
    variables = POD | {"KFP_RUN_ID": name, "PTL_KFP_UI": "https://kubeflow.example.com/pipeline"}
    command = ["docker", "run", "--rm", "--network=host", "--user=12345:0", "--read-only", "--tmpfs=/tmp:rw,exec"]
    command += ["--cap-drop=ALL", "--security-opt=no-new-privileges", *mounts]
    command += [f"--mount=type=bind,src={folder / 'minio'},dst=/minio"]
    command += [f"--env={key}={value}" for key, value in variables.items()]
    command += [container["image"], *container["command"]]
    command += [json.dumps(given) if argument == "{{$}}" else argument for argument in container["args"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, folder / "minio"


@pytest.mark.docker
def test_a_pods_files_become_the_steps_environment(engine, stack_up, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    name = f"kfp-{os.urandom(4).hex()}"
    done, minio = pod(tmp_path, stack_up.env, name, {"run_name": "tiny-20261125-184122-9d1f"})
    assert done.returncode == 0, done.stderr
    pointer = store.Pointer.load((minio / "mlpipeline/v2/artifacts/tiny/run/import-model/1/out").read_text())
    (artifact,) = json.loads((minio / "output_metadata.json").read_text())["artifacts"]["out"]["artifacts"]
    assert artifact["metadata"]["uri"] == pointer.uri and artifact["uri"].startswith("minio://")
    assert stack_up.env["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    client = MlflowClient(stack_up.env["MLFLOW_TRACKING_URI"])
    everywhere = [each.experiment_id for each in client.search_experiments()]
    runs_ = client.search_runs(everywhere, f"tags.`ptl.run` = '{name}'")
    by_role = {run.data.tags["ptl.role"]: run for run in runs_}
    assert by_role["parent"].info.run_name == "tiny-20261125-184122-9d1f"
    page = f"https://kubeflow.example.com/pipeline/#/runs/details/{name}"
    assert by_role["parent"].data.tags["ptl.kubeflow"] == page
    assert by_role["step"].data.tags["ptl.node"] == "node-1" and by_role["step"].data.tags["ptl.attempt"] == "1"


@pytest.mark.docker
def test_a_pod_with_wrong_input_ends_its_log_with_one_line(engine, stack_up, tmp_path):
    name = f"kfp-{os.urandom(4).hex()}"
    done, minio = pod(tmp_path, stack_up.env, name, {"gate": {"enabled": True}})
    assert done.returncode == 2 and not (minio / "output_metadata.json").exists()
    assert done.stderr.splitlines()[-1].startswith("error: import-model: gate.enabled: true, but this pipeline was")
    assert "Traceback" not in done.stdout + done.stderr
