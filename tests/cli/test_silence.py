"""A command says what it does before it loads libraries or asks a server, which may take long."""

import socket
import subprocess
import sys
import threading

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
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
"""


def test_each_command_says_what_it_does_before_it_loads_libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    first_lines = {
        "ptl validate tiny": "checking tiny, its data and its model ...",
        "ptl plan tiny": "forecasting the steps of tiny ...",
        f"ptl compile tiny -o {tmp_path}/pipeline.yaml": "compiling tiny ...",
        f"ptl init {DENSE} -o {tmp_path}/tiny.yaml": f"reading the config of {DENSE}, and its rows ...",
        f"ptl run tiny --home {tmp_path}": "loading libraries, and checking tiny with its data and model ...",
        f"ptl export {DENSE} {tmp_path}/model.gguf": f"loading libraries to convert {DENSE} ...",
        f"ptl fetch run-1 {tmp_path}/checkpoint": "looking for run-1 ...",
        "ptl compare run-1 run-2": "comparing run-2 with run-1 ...",
        "ptl gc": "asking MLflow which checkpoints are needed ...",
        "ptl doctor tiny --cluster": "loading libraries to check tiny ...",
        "ptl submit tiny --host http://127.0.0.1:9": "checking tiny ...",
        "ptl status run-1 --host http://127.0.0.1:9": "asking Kubeflow for run-1 ...",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input="\n".join(first_lines), cwd=ROOT, capture_output=True, text=True
    )
    *printed, rest = done.stderr.split("code 99\n")
    assert rest == "" and [text.splitlines()[0] for text in printed] == list(first_lines.values()), done.stderr


@pytest.fixture
def deaf_server():
    """The address of a server that ends each connection without an answer, and a list that grows by each."""
    connections = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_server_that_does_not_answer_is_asked_once(deaf_server, ptl, monkeypatch):
    address, connections = deaf_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(WorkError, match=f"MLflow at {address} does not answer"):
        mlflow_client.ask()
    assert len(connections) == 1
    code, printed = ptl("gc")
    assert (code, len(connections)) == (1, 2) and f"MLflow at {address} does not answer" in printed
