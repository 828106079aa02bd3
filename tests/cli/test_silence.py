"""A command says what it does before it loads libraries or asks a server, which may take long."""

import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest
from checkout import DENSE, ROOT

from ptl.errors import WorkError
from ptl.lineage import mlflow_client

# Runs commands in one process; each ends at its first import of a library that takes seconds.
COMMANDS = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "mlflow", "kfp", "kfp_server_api", "datasets", "numpy", "lm_eval"):
            print("loading", name, file=sys.stderr)
            sys.exit(99)

sys.meta_path.insert(0, Stop())
from ptl.cli.app import main
for line in sys.stdin:
    sys.argv = line.split()
    try:
        main()
    except SystemExit:  # at the first import, or as no server answers
        print("end", file=sys.stderr)
"""


def test_each_command_says_what_it_does_before_it_loads_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    first_lines = {
        "ptl validate tiny": "checking tiny, its data and its model ...",
        "ptl plan tiny": "forecasting the steps of tiny ...",
        f"ptl compile tiny -o {tmp_path}/pipeline.yaml": "compiling tiny ...",
        f"ptl init {DENSE} -o {tmp_path}/tiny.yaml": f"reading the config of {DENSE} ...",
        f"ptl run tiny --home {tmp_path}": "loading libraries, and checking tiny with its data and model ...",
        f"ptl export {DENSE} {tmp_path}/model.gguf": f"loading libraries to convert {DENSE} ...",
        f"ptl fetch run-1 {tmp_path}/checkpoint": "looking for run-1 ...",
        "ptl compare run-1 run-2": "comparing run-2 with run-1 ...",
        "ptl gc": "asking MLflow which checkpoints are needed ...",
        "ptl doctor tiny --cluster": "loading libraries to check tiny ...",
        "ptl submit tiny --host http://127.0.0.1:9": "checking tiny ...",
        "ptl status run-1 --host http://127.0.0.1:9": "asking Kubeflow for run-1 ...",
        "ptl retry run-1 --host http://127.0.0.1:9": "asking Kubeflow for run-1 ...",
        "ptl cancel run-1 --host http://127.0.0.1:9": "asking Kubeflow to end run-1 ...",
        f"ptl import-model {DENSE} {tmp_path}/dense": f"loading libraries to import {DENSE} ...",
        f"ptl prune {DENSE} {tmp_path}/pruned --config tiny": f"loading libraries to prune {DENSE} ...",
        f"ptl recover {DENSE} {tmp_path}/recovered --config tiny": f"loading libraries to train {DENSE} ...",
        f"ptl evaluate {DENSE} {tmp_path}/scores --config tiny": f"loading libraries to score {DENSE} ...",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(first_lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    *printed, rest = done.stderr.split("end\n")
    assert rest == "" and [text.splitlines()[0] for text in printed] == list(
        first_lines.values()
    ), done.stderr


@pytest.fixture
def listen():
    """Start a server that does something with each connection; returns its address and the connections so far."""
    with ExitStack() as stack:
        yield lambda act: stack.enter_context(listening(act))


@contextmanager
def listening(act):
    connections = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            act(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_server_that_is_there_and_slow_is_waited_for(listen, monkeypatch):
    address, connections = listen(lambda connection: None)
    monkeypatch.setattr(mlflow_client, "REACH", (5, 0.1))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    mlflow_client.ask()
    assert len(connections) == 1


def test_a_server_that_does_not_answer_is_asked_once(listen, ptl, monkeypatch):
    address, connections = listen(lambda connection: connection.close())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(WorkError, match=f"MLflow at {address} does not answer"):
        mlflow_client.ask()
    assert len(connections) == 1
    code, printed = ptl("gc")
    assert (code, len(connections)) == (1, 2) and f"MLflow at {address} does not answer" in printed
