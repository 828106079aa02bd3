"""What all tests share: plain test ids, the mark `slow`, and places to store things in (a folder, a real S3 server)."""

import inspect
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import boto3
import durations
import one_process
import pytest
import whole_run
import yaml
from checkout import ROOT, TINY
from mock_kfp import MockKubeflow
from mock_server import MockServer

from pipelines.prune_tune_loop import kfp_api
from ptl import processes
from ptl.config import image_names
from ptl.config.run import load_config
from ptl.errors import InputError, WorkError
from ptl.lineage import mlflow_client, run_status
from ptl.local import images, servers
from ptl.storage.local_files import path_of
from ptl.storage.s3 import SETTINGS, split

# how a gRPC client begins
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def stack_without_sources(context=0):
    """The callers, without the lines of their sources."""
    frames, frame = [], sys._getframe(1)
    while frame:
        code = frame.f_code
        frames.append(
            inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None)
        )
        frame = frame.f_back
    return frames


# kfp asks for the whole stack at every setting of a task, to know one name. Below pytest-xdist are frames of no file,
# for which `inspect` looks through all modules that are loaded: a compile took 50 times as long.
inspect.stack = stack_without_sources


def pytest_configure(config):
    if "PTL_DURATIONS" in os.environ:
        config.pluginmanager.register(durations)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test is slow that takes longer than FAST, or needs what does. The fast ones come first, then the longest.

    A group of pytest-xdist stays together: a second process would make its fixtures again.
    """
    slow = json.loads(durations.FILE.read_text())
    groups = {}
    for item in items:
        module = item.nodeid.partition("::")[0]
        # some are names of fixtures
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        fixtures = [*item.fixturenames, *(value for value in params if isinstance(value, str))]
        needs = [f"{scope}::{name}" for name in fixtures for scope in (module, "tests")]
        seconds = sum(slow.get(name, 0) for name in [durations.function_of(item.nodeid), *needs])
        if seconds:
            item.add_marker(pytest.mark.slow)
        group = item.get_closest_marker("xdist_group")
        groups.setdefault(group.args[0] if group else item.nodeid, []).append((seconds, item))
    order = sorted(groups.values(), key=lambda group: -sum(seconds for seconds, _ in group))
    order.sort(key=lambda group: any(seconds for seconds, _ in group))
    items[:] = [item for group in order for _, item in group]


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        # Servers end with the tests, also where these are killed: it sees the end of this, the first process.
        everything = session.config._tmp_path_factory.getbasetemp()
        command = [sys.executable, Path(__file__).with_name("end_servers.py"), everything]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        session.config.watcher = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, **pipes
        )


def pytest_sessionfinish(session):
    if watcher := getattr(session.config, "watcher", None):
        watcher.communicate()  # its input ends, and so do the servers


def pytest_make_parametrize_id(config, val, argname):
    """An id of plain words: the same in every process, whatever the value holds."""
    if isinstance(val, bytes) or getattr(val, "__name__", "") == "<lambda>":
        return argname
    if isinstance(val, str | list | tuple | dict | set | frozenset | Path):
        text = val.name if isinstance(val, Path) else str(val)
        return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:40].strip("-.") or argname
    return None  # numbers, functions and classes have plain names


class FilePlace:
    """A root for one test, with the few raw operations that damage needs."""

    def __init__(self, root):
        self.root = root

    def change(self, uri, edit):
        path = path_of(uri)
        path.write_bytes(edit(path.read_bytes()))

    def delete(self, uri):
        path = path_of(uri)
        for entry in [path] if path.is_file() else sorted(path.rglob("*"), reverse=True):
            entry.unlink() if entry.is_file() else entry.rmdir()


class S3Place(FilePlace):
    def __init__(self, root):
        super().__init__(root)
        self.client = boto3.session.Session().client(
            "s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"]
        )

    def change(self, uri, edit):
        bucket, key = split(uri)
        data = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        self.client.put_object(Bucket=bucket, Key=key, Body=edit(data))

    def delete(self, uri):
        bucket, key = split(uri)
        for item in self.client.list_objects_v2(Bucket=bucket, Prefix=key)["Contents"]:
            self.client.delete_object(Bucket=bucket, Key=item["Key"])


# Of a shell, or of a command in this process: addresses, logins and runs, and the patience of MLflow's client
UNSET = (
    *SETTINGS,
    *run_status.WATCHING,
    "KF_PIPELINES_ENDPOINT",
    "KF_PIPELINES_SA_TOKEN_PATH",
    "KUBECONFIG",
)
UNSET += tuple(
    f"KFP_{name}" for name in ("RUN_ID", "POD_UID", "RETRY_INDEX", "NAMESPACE", "TOKEN", "CA_CERT")
)
UNSET += tuple(f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD"))
UNSET += tuple(
    f"PTL_{name}" for name in ("RUN_ID", "RUN_DIR", "LAUNCH", "RETRIES", "TIMEOUT", "ARGO_NODE")
)
UNSET += ("PTL_ARTIFACT_ROOT",)


@pytest.fixture(autouse=True)
def as_before_any_test(monkeypatch):
    """Without what a shell or commands in this process set, and without boto3's session, which keeps its keys."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with mock.patch.dict(os.environ):
        for name in UNSET:
            os.environ.pop(name, None)
        yield


@pytest.fixture
def ptl(monkeypatch, tmp_path):
    """A command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return one_process.ptl


@pytest.fixture
def calibration(tmp_path):
    from tiny_models import word_calibration

    return word_calibration(tmp_path)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models are faster with one thread, and their times steadier."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def weed():
    """SeaweedFS runs on this system."""
    try:
        servers.weed_binary()
    except InputError as error:
        pytest.skip(f"skipped: {error}")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of all processes of the suite."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(note, make):
    """What `make` returns, as JSON: called by the first process of the suite that asks."""
    with processes.exclusive(note.with_suffix(".lock"), note.stem, wait=servers.START_SECONDS):
        if not note.exists():
            note.write_text(json.dumps(make()))
    return json.loads(note.read_text())


@pytest.fixture(scope="session")
def server(weed, shared):
    """The suite's SeaweedFS: the environment that reaches it."""
    return once(shared / "s3.json", lambda: servers.s3_up(shared, free_port()))


@pytest.fixture(scope="session")
def stack(server, new_database, shared):
    """The suite's SeaweedFS and, over it, its MLflow server: the environment that reaches them."""

    def make():
        port, database = free_port(), f"sqlite:///{new_database(shared)}/mlflow.db"
        servers.mlflow_up(shared, port, database, f"s3://{servers.BUCKET}/mlflow", server)
        return server | {"MLFLOW_TRACKING_URI": servers.address(port)}

    return once(shared / "mlflow.json", make)


def free_port():
    """A port p with p..p+3 and each of these + 10000 free."""
    while True:
        # Not the global generator: training seeds it, and then two workers of xdist take the same port.
        # Those of gRPC are other ports, and below 32768, from where the system takes those of outgoing connections.
        port = random.SystemRandom().randrange(11000, 20990)
        if all(unused(port + shift + extra) for shift in range(4) for extra in (0, servers.GRPC)):
            return port


def unused(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def full_disk(size):
    """A file size limit stands for the full disk: the kernel refuses the write in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def s3(server, monkeypatch):
    """The environment set for one test, and a fresh root in the bucket."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return S3Place(f"s3://{servers.BUCKET}/{uuid.uuid4().hex}/ptl")


@pytest.fixture(params=["file", "s3"])
def place(request, tmp_path):
    return (
        FilePlace(f"file://{tmp_path}/art/ptl")
        if request.param == "file"
        else request.getfixturevalue("s3")
    )


def require_images(*steps):
    """Skip, saying so, where no engine holds these images; not where `.ci/docker.sh run` has promised them."""
    try:
        absent = images.missing([image_names.image(step) for step in steps])
    except WorkError as error:
        pytest.skip(f"skipped: no engine ({error})")
    promised = os.environ.get("PTL_IMAGES", "").split()
    assert not absent or not {*steps} <= {*promised}, (
        f"built before the tests, and not there: {absent}"
    )
    if absent:
        pytest.skip(
            f"skipped: the engine has no {', '.join(absent)}; `.ci/docker.sh build` makes them"
        )


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A stub named docker: it notes arguments and settings in docker.log, says ANSWER, or ERROR where FAIL matches."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$* | ${REGISTRY-} ${TAG-} ${BASE_IMAGE-} ${LOCKS-} ${HASHES-}" >>"$0.log"\n'
        'case "$*" in $FAIL) echo "${ERROR-no such thing}" >&2; exit 1 ;; esac\nprintf %s "${ANSWER-}"\n'
    )
    program.chmod(0o755)
    for name, value in {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "FAIL": "nothing",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    return program


@pytest.fixture(scope="session")
def engine():
    """An engine that holds the images of every run."""
    require_images(*image_names.IMAGES)


@pytest.fixture(scope="session")
def evaluate_image():
    """An engine that holds the one image that import-model needs too."""
    require_images("evaluate")


@pytest.fixture(scope="session")
def llmcompressor():
    """A Python that has it."""
    from ptl.export.compressed_tensors import interpreter

    try:
        return interpreter()
    except InputError as error:
        pytest.skip(f"skipped: {error}")


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """tiny.yaml with two short iterations and no control."""
    raw = load_config(TINY).model_dump(mode="json")  # with the paths of its own folder
    raw["schedule"] |= {"iterations": 2, "target": 0.2, "recovery_tokens": 24_000}
    raw["recover"][0] |= {"save_steps": 2}
    raw["evaluate"]["tasks"][0]["limit"] = 64
    raw["evaluate"]["speed"] = {"batch_sizes": [1], "repeats": 1}
    raw["control"] = False
    raw["training"]["decontaminate"] = {"tasks": True}
    path = tmp_path_factory.mktemp("config") / "short.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """A whole run with the control and an export, undisturbed, in a local store: its home, and what was printed.

    Without the export where the system has no llama.cpp.
    """
    from gguf_files import NO_LLAMA_CPP  # and transformers

    home = tmp_path_factory.mktemp("finished")
    whole = home / "with-control.yaml"
    more = {"control": True, "export": [] if NO_LLAMA_CPP else [{"format": "gguf", "type": "q8_0"}]}
    whole.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | more))
    return home, whole_run.finish(whole_run.start(whole, home))


@pytest.fixture(scope="session")
def new_database(shared):
    """Put an empty MLflow database, mlflow.db, into a folder, and return the folder.

    MLflow takes seconds to make one, so one is made for all processes of the suite, and copied.
    """
    mlflow_client.create_database(f"sqlite:///{shared}/empty.db", f"file://{shared}/artifacts")
    return lambda folder: Path(shutil.copyfile(shared / "empty.db", folder / "mlflow.db")).parent


@pytest.fixture(scope="session")
def mlflow_folder(new_database, tmp_path_factory):
    """A folder whose mlflow.db serves all tests."""
    return new_database(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def tracked(mlflow_folder, monkeypatch):
    """Make the MLflow runs of a pipeline run: a function of its id and of its steps; returns the parent's id.

    A step is a dict of status, tags (without `ptl.`), metrics and `ended` (seconds since 1970).
    """
    from mlflow import MlflowClient

    uri = f"sqlite:///{mlflow_folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client, made = MlflowClient(uri), []

    def end(run_id, status, ended=None):
        if status != "RUNNING":
            client.set_terminated(run_id, status, None if ended is None else int(ended * 1000))

    def make(run, steps, status="RUNNING", experiment="tracked"):
        if client.get_experiment_by_name(experiment) is None:
            client.create_experiment(experiment, f"file://{mlflow_folder}/artifacts")
        place = client.get_experiment_by_name(experiment).experiment_id
        parent = client.create_run(place, tags={"ptl.run": run, "ptl.role": "parent"}).info.run_id
        made.append(parent)
        for name, step in steps.items():
            tags = {
                "ptl.run": run,
                "ptl.role": "step",
                "ptl.step": name,
                "mlflow.parentRunId": parent,
            }
            tags |= {f"ptl.{key}": str(value) for key, value in step.get("tags", {}).items()}
            made.append(client.create_run(place, tags=tags).info.run_id)
            for key, value in step.get("metrics", {}).items():
                client.log_metric(made[-1], key, value)
            end(made[-1], step.get("status", "FINISHED"), step.get("ended"))
        end(parent, status)
        return parent

    yield make
    for run_id in made:
        client.delete_run(run_id)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The tiny reasoner, pruned."""
    from recovering import DENSE, cut  # and transformers

    return cut(DENSE, tmp_path_factory.mktemp("small"), 130_000)


@pytest.fixture
def converter_in_process():
    """Run llama.cpp's converter in this process, which saves the start of another for each file."""
    import gguf_files  # and transformers

    with gguf_files.converter_in_process():
        yield


@pytest.fixture
def world(monkeypatch):
    """The mock of Kubeflow's API server, which needs no patience; there is no Kubernetes."""
    monkeypatch.setattr(kfp_api, "PAUSE", 0.01)
    monkeypatch.setenv("KUBECONFIG", "none")
    made = MockKubeflow()
    yield made
    made.close()


@pytest.fixture
def serve():
    """Start a server, of which a function of a request, its path and its body makes the answers; gives its address."""
    started = []

    def start(answer):
        class Server(MockServer):
            def respond(self, handler, path, query, body):
                handler.send(*answer(handler, path, body))

        started.append(Server())
        return started[-1].url

    yield start
    for server in started:
        server.close()


@pytest.fixture
def said():
    """What a command of the cluster has printed."""
    return []
