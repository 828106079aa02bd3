"""A mock of the Kubernetes API with Kubeflow Trainer and JobSet, over HTTP on loopback.

It answers as the recorded clusters did (tests/data/trainer-2.3, and of pipeline runs kfp-2.17). A TrainJob that is
created is checked by the types of Kubeflow Trainer's own package. Nodes are either said by a test (`play`), or real
processes on this machine (`Processes`), which are restarted together as JobSet does.
"""

import copy
import json
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from operator import getitem
from pathlib import Path

import yaml
from mock_server import MockServer

from ptl.steps import trainjob

DATA = Path(__file__).parent / "data" / "trainer-2.3"
OF_RUNS = Path(__file__).parent / "data" / "kfp-2.17"
NAMESPACE = "kubeflow"
ENDED = "2026-11-25T18:20:29Z"
RESTARTS = 3  # of a failed TrainJob
OWN_POD = "loop-abcde-coordinator-1"
JOBS = rf"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = rf"/api/v1/namespaces/{NAMESPACE}/pods"
EVENTS = rf"/api/v1/namespaces/{NAMESPACE}/events"
WORKFLOWS = rf"/apis/argoproj.io/v1alpha1/namespaces/{NAMESPACE}/workflows"


def recorded(name):
    return json.loads((DATA / f"{name}.json").read_text())


def refusal(heading):
    """What the cluster said under a heading of refusals.txt, without kubectl's own words."""
    text = (
        (DATA / "refusals.txt")
        .read_text()
        .partition(f"## {heading}\n")[2]
        .partition("\n\n")[0]
        .strip()
    )
    return re.sub(r'^Error from server \(\w+\): (error when creating "[^"]*": )?', "", text)


UNKNOWN_RUNTIME = (403, refusal("create with an unknown runtime"))
WHO = "system:serviceaccount:kubeflow:pipeline-runner"
NO_RIGHT = (
    403,
    f'trainjobs.trainer.kubeflow.org is forbidden: User "{WHO}" cannot create resource "trainjobs"',
)
NO_TRAINER = (404, "the server could not find the requested resource")


def pod(
    job, node, attempt=0, phase="Running", exit_code=None, message="", reason="Error", ended=ENDED
):
    """A node's pod, made from the recorded one."""
    made = recorded("pod-of-node-0")
    made["metadata"]["name"] = f"{job}-node-0-{node}-{attempt}abcd"
    made["metadata"]["labels"] |= {
        trainjob.OF_JOB_SET: job,
        trainjob.INDEX: str(node),
        trainjob.ATTEMPT: str(attempt),
    }
    state = {"running": {"startedAt": "2026-11-25T18:17:51Z"}} if phase == "Running" else {}
    if exit_code is not None:
        phase = "Failed" if exit_code else "Succeeded"
        state = {
            "terminated": {
                "exitCode": exit_code,
                "message": message,
                "reason": reason,
                "finishedAt": ended,
            }
        }
    made["status"]["containerStatuses"][0]["state"] = state
    made["status"]["phase"] = phase
    return made


class MockKubernetes(MockServer):
    """The objects of one namespace. `refusal` (status, message) answers every creation."""

    def __init__(self):
        self.jobs, self.pods, self.logs = {}, [], {}
        self.refusal = None
        self.created, self.deleted = [], []
        self.looks = []  # functions, one for each look at a TrainJob
        self.on_create = lambda job: None
        self.on_delete = lambda name: None
        self.outage = []  # the status of answers to come
        self.own_env = []  # of the coordinator's pod
        self.forbidden = None  # pattern of paths that the account may not read
        # objects of a pipeline run, and the events of its pods
        self.of_run = {PODS: [], EVENTS: [], WORKFLOWS: []}
        super().__init__()

    def respond(self, handler, path, query, body):
        name = path.rpartition("/")[2]
        if handler.command == "POST":
            assert re.fullmatch(JOBS, path)
            status, answer = self.create(json.loads(body))
        elif handler.command == "DELETE":
            answer = self.delete(name) or f'trainjobs.trainer.kubeflow.org "{name}" not found'
            status = 404 if isinstance(answer, str) else 200
        elif self.outage:
            status, answer = (
                self.outage.pop(),
                "the server is currently unable to handle the request",
            )
        elif self.forbidden and re.fullmatch(self.forbidden, path):
            status, answer = 403, f"{path} is forbidden"
        elif match := re.fullmatch(rf"{PODS}/([^/]+)/log", path):
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            lines = self.logs.get(match[1], lambda: [f"hello from {match[1]}\n"])()
            for line in chain(lines, [""]):  # which is the end
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(line.encode()), line.encode()))
            return
        else:
            status, answer = self.read(path, query)
        if isinstance(answer, str):
            answer = {"kind": "Status", "status": "Failure", "message": answer, "code": status}
        handler.send(status, answer)

    def read(self, path, query):
        if match := re.fullmatch(rf"{JOBS}/([^/]+)", path):
            job = self.job(match[1])
            return (200, job) if job else (404, f'"{match[1]}" not found')
        if path == f"{PODS}/{OWN_POD}":
            owner = {
                "apiVersion": "argoproj.io/v1alpha1",
                "kind": "Workflow",
                "name": "loop-abcde",
                "uid": "u-1",
            }
            owners = [owner | {"controller": True, "blockOwnerDeletion": True}]
            spec = {
                "serviceAccountName": "pipeline-runner",
                "containers": [{"name": "main", "env": self.own_env}],
            }
            return 200, {
                "kind": "Pod",
                "metadata": {"name": OWN_POD, "ownerReferences": owners},
                "spec": spec,
            }
        if path in self.of_run:
            is_of_job = query.get("labelSelector", "").startswith(trainjob.OF_JOB_SET)
            objects = self.pods if is_of_job else self.of_run[path]
            return 200, {"items": [item for item in objects if selected(query, item)]}
        return 404, f"no such path: {path}"

    def play(self, *looks):
        """What the cluster has at each look at a TrainJob: the name of a recorded one, and its pods."""
        self.looks = list(looks)

    def show(self, name):
        """The pods and the workflow of a recorded pipeline run, as far as they were recorded."""
        for path, kind in ((PODS, "pods"), (WORKFLOWS, "workflow")):
            file = OF_RUNS / f"{kind}-{name}.json"
            self.of_run[path] = json.loads(file.read_text())["items"] if file.is_file() else []

    def create(self, job):
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        name = job["metadata"]["name"]
        if self.refusal:
            return self.refusal
        if name in self.jobs:
            return 409, refusal("create with a name that exists")
        checked = TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_dict()
        assert checked["spec"] == job["spec"], "a field that TrainJobs do not have"
        assert len(name) <= 63
        self.jobs[name] = job | {"status": {}}
        self.created.append(job)
        self.on_create(job)
        return 201, self.jobs[name]

    def job(self, name):
        if name in self.jobs and self.looks:
            record, self.pods = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
            self.jobs[name]["status"] = recorded(record)["status"]
        return self.jobs.get(name)

    def delete(self, name):
        self.deleted.append(name)
        self.on_delete(name)
        return self.jobs.pop(name, None)


def selected(selectors, item):
    """Whether the API lists an object for these selectors, of the kinds that are used for pipeline runs."""
    name, _, label = selectors.get("labelSelector", "").partition("=")
    if name and item["metadata"].get("labels", {}).get(name) != label:
        return False
    for term in filter(None, selectors.get("fieldSelector", "").split(",")):
        path, negated, wanted = re.fullmatch(r"([\w.]+)(!?)=(.*)", term).groups()
        value = reduce(getitem, path.split("."), item)
        if (value == wanted) == bool(negated):
            return False
    return True


@contextmanager
def serving(folder):
    """The mock, with a kubeconfig that names it: the file's path is `cluster.kubeconfig`."""
    cluster = MockKubernetes()
    config = {"current-context": "mock"}
    config["clusters"] = [{"name": "mock", "cluster": {"server": cluster.url}}]
    config["users"] = [{"name": "mock", "user": {"token": "t"}}]
    context = {"cluster": "mock", "user": "mock", "namespace": NAMESPACE}
    config["contexts"] = [{"name": "mock", "context": context}]
    cluster.kubeconfig = folder / "kubeconfig"
    cluster.kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield cluster
    finally:
        cluster.close()


class Processes:
    """JobSet and kubelet in one: the nodes of a TrainJob are processes here, each with a disk of its own."""

    def __init__(self, cluster, folder, environment, port):
        self.cluster, self.folder, self.environment, self.port = cluster, folder, environment, port
        self.nodes = []
        self.stopped = threading.Event()
        cluster.on_create = lambda job: threading.Thread(
            target=self.run, args=(job,), daemon=True
        ).start()
        cluster.on_delete = lambda name: self.stop()

    def stop(self):
        self.stopped.set()
        self.kill()

    def kill(self):
        for node in self.nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)

    def run(self, job):
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        for attempt in range(RESTARTS + 1):
            codes = self.attempt(name, trainer, attempt)
            if self.stopped.is_set():
                return
            if not any(codes) or 2 in codes:  # the runtime's rule about wrong input
                break
        end = "trainjob-failed" if any(codes) else "trainjob-complete"
        self.cluster.jobs[name]["status"] = recorded(end)["status"]

    def attempt(self, name, trainer, attempt):
        pods = [pod(name, rank, attempt) for rank in range(trainer["numNodes"])]
        self.nodes = [
            self.start(trainer, rank, attempt, made["metadata"]["name"])
            for rank, made in enumerate(pods)
        ]
        self.cluster.pods = pods
        while any(node.poll() is None for node in self.nodes):
            time.sleep(0.1)
            for rank, node in enumerate(self.nodes):
                if node.poll() is not None and pods[rank]["status"]["phase"] == "Running":
                    last_words = self.folder / f"words-{attempt}-{rank}"
                    message = last_words.read_text() if last_words.is_file() else ""
                    pods[rank] = pod(name, rank, attempt, exit_code=node.poll(), message=message)
                    self.cluster.pods = list(pods)
            if any(node.poll() for node in self.nodes):  # the Job has failed: JobSet recreates all
                time.sleep(0.5)
                self.kill()
        return [node.wait() for node in self.nodes]

    def start(self, trainer, rank, attempt, pod_name):
        # as the kubelet expands them
        variables = {
            entry["name"]: entry["value"].replace("$$", "$")
            for entry in trainer["env"]
            if "value" in entry
        }
        # as Kubeflow Trainer sets them
        torch = {
            "NNODES": trainer["numNodes"],
            "NPROC_PER_NODE": trainer["numProcPerNode"],
            "NODE_RANK": rank,
        }
        torch |= {"MASTER_ADDR": "localhost", "MASTER_PORT": self.port}
        variables |= {f"PET_{name}": str(value) for name, value in torch.items()}
        for name, file in (("PTL_SCRATCH", "disk"), ("PTL_TERMINATION_LOG", "words")):
            variables[name] = str(self.folder / f"{file}-{attempt}-{rank}")
        output = self.folder / f"log-{attempt}-{rank}"
        self.cluster.logs[pod_name] = lambda: follow(
            output, lambda: self.nodes[rank].poll() is not None
        )
        with output.open("w") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            return subprocess.Popen(trainer["command"], env=self.environment | variables, **options)


def follow(path, ended):
    """Lines of a file as they come, until whoever writes it has ended."""
    with path.open() as file:
        while True:
            last = ended()
            yield from file
            if last:
                return
            time.sleep(0.1)
