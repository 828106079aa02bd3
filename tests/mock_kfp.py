"""A mock of Kubeflow Pipelines' API server, which answers what a real one of version 2.17.0 answered.

`play` loads recorded answers (tests/data/kfp-2.17) as what each look at a run finds; `answers` gives single requests a
recorded or an added answer. ADDED are faults that were not recorded. Beside these it keeps pipelines, versions,
experiments and runs in memory by the published v2beta1 OpenAPI, and `script` makes up the states of such a run.
"""

import json
import re
from email.parser import BytesParser
from pathlib import Path

import yaml
from mock_server import MockServer

API = "/apis/v2beta1"
DATA = Path(__file__).parent / "data" / "kfp-2.17"
STATUS = {  # of the recorded answers that are not 200
    "run-unknown": 404,
    "post-retry-succeeded": 409,
    "post-run-no-experiment": 404,
    "post-run-unknown-parameter": 400,
    "post-run-unknown-version": 500,
    "post-run-wrong-type": 400,
    "post-terminate-finished": 400,
    "post-terminate-unknown": 404,
    "upload-duplicate-version": 409,
    "upload-invalid": 400,
}
CUT, HANG = object(), object()
ADDED = {  # not recorded: what proxies and broken connections make of an answer of 200
    "login page": b"<!DOCTYPE html><html><body>Log in</body></html>",
    "empty object": b"{}",
    "empty body": b"",
    "bad JSON": b'{"run_id": "run-0", "state": ',
    "cut answer": CUT,
    "hang": HANG,
}


def recorded(name):
    return json.loads((DATA / f"{name}.json").read_text())


class MockKubeflow(MockServer):
    def __init__(self, token=None):
        self.token = token
        self.pipelines, self.versions, self.experiments, self.runs = [], [], [], []
        self.script = ["SUCCEEDED"]  # the state that each look at a run finds
        self.played = []  # recorded answers for each look at a run, instead of the script
        self.version = None  # the recorded version of a played run
        self.faults = []  # (method, part of the path, status, whether the request takes effect), each used once
        self.answers = []  # (method, part of the path, name of a recorded or an added answer), each used once
        self.redirect = ""  # the server that every request is redirected to
        self.requests, self.bodies = [], []
        super().__init__()

    def play(self, *names, version="version-of-run-succeeded-6-tasks"):
        """Recorded answers to one look at a run after another, the last one for ever; returns the run's id."""
        self.played = [recorded(name) for name in names]
        self.version = version and recorded(version)
        return self.played[-1]["run_id"]

    def calls(self, method, part):
        return [entry for entry in self.requests if entry[0] == method and part in entry[1]]

    # Each returns (status, body).

    def healthz(self, **_):
        return 200, recorded("healthz")

    def list_pipelines(self, query, **_):
        return 200, {"pipelines": _matching(self.pipelines, query, namespace=query.get("namespace"))}

    def create_pipeline(self, body, **_):
        if any(entry["display_name"] == body["display_name"] for entry in self.pipelines):
            return 409, {"error": "pipeline exists"}
        made = {**body, "pipeline_id": f"pipeline-{len(self.pipelines)}"}
        self.pipelines.append(made)
        return 200, made

    def upload_version(self, query, body, **_):
        taken = [entry for entry in self.versions if entry["pipeline_id"] == query["pipelineid"]]
        if any(entry["display_name"] == query["name"] for entry in taken):
            return 409, {"error": "version exists"}
        made = {
            "pipeline_id": query["pipelineid"],
            "pipeline_version_id": f"version-{len(self.versions)}",
            "display_name": query["name"],
        }
        self.versions.append({**made, "yaml": body})
        return 200, made

    def list_versions(self, query, ids, **_):
        own = [entry for entry in self.versions if entry["pipeline_id"] == ids[0]]
        return 200, {"pipeline_versions": [{k: v for k, v in e.items() if k != "yaml"} for e in _matching(own, query)]}

    def list_experiments(self, query, **_):
        return 200, {"experiments": _matching(self.experiments, query, namespace=query.get("namespace"))}

    def create_experiment(self, body, **_):
        made = {**body, "experiment_id": f"experiment-{len(self.experiments)}"}
        self.experiments.append(made)
        return 200, made

    def create_run(self, body, **_):
        made = {**body, "run_id": f"run-{len(self.runs)}", "state": "PENDING", "looks": 0}
        made["created_at"] = "2026-01-01T00:00:00Z"
        made["state_history"] = [{"state": "PENDING", "update_time": made["created_at"]}]
        self.runs.append(made)
        return 200, _shown(made)

    def list_runs(self, query, **_):
        return 200, {"runs": [_shown(run) for run in _matching(self.runs, query)]}

    def get_version(self, ids, **_):
        if self.version is not None:
            return 200, self.version
        made = next((entry for entry in self.versions if entry["pipeline_version_id"] == ids[1]), None)
        return (200, {**made, "yaml": None, "pipeline_spec": _spec(made)}) if made else (404, {"error": "no version"})

    def get_run(self, ids, **_):
        if self.played:
            return 200, self.played.pop(0) if len(self.played) > 1 else self.played[0]
        run = self._run(ids[0])
        if run is None:
            return 404, recorded("run-unknown")
        state = self.script[min(run["looks"], len(self.script) - 1)]
        run["looks"] += 1
        self.enter(run, state)
        return 200, _shown(run)

    def enter(self, run, state):
        """A state that a run is in from now on."""
        run["state"] = state
        now = f"2026-01-01T00:00:{len(run['state_history']):02d}Z"
        if run["state_history"][-1]["state"] != state:
            run["state_history"].append({"state": state, "update_time": now})
        if state in ("SUCCEEDED", "FAILED"):
            run["finished_at"] = f"2026-01-01T00:00:{run['looks']:02d}Z"

    def terminate(self, ids, **_):
        run = self._run(ids[0])
        if run is None:
            return 404, recorded("post-terminate-unknown")
        if run["state"] in ("SUCCEEDED", "FAILED"):
            return 400, recorded("post-terminate-finished")
        self.enter(run, "CANCELING")
        self.script = ["CANCELING", "FAILED"]
        run["looks"] = 0
        return 200, recorded("post-terminate")

    def retry(self, ids, **_):
        if self.played:
            return 200, {}
        if self._run(ids[0])["state"] != "FAILED":
            return 409, recorded("post-retry-succeeded")
        self.script = ["RUNNING"]
        return 200, {}

    def _run(self, run_id):
        return next((run for run in self.runs if run["run_id"] == run_id), None)

    def respond(self, handler, path, query, body):
        self.requests.append((handler.command, path, dict(handler.headers), query))
        self.bodies.append(body)
        status, answer = self.answer(handler, path, query, body)
        if answer is HANG:
            self.closing.wait(30)
        elif answer is CUT:
            handler.send(status, b'{"run_id": "run-0"', missing=100)
        else:
            redirection = [("Location", f"{self.redirect}{handler.path}")] if status == 302 else ()
            handler.send(status, answer, redirection)

    def answer(self, handler, path, query, body):
        if self.redirect:
            return 302, b""
        if self.token and handler.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "token is not valid"}
        answer = next((a for a in self.answers if a[0] == handler.command and a[1] in path), None)
        if answer:
            self.answers.remove(answer)
            name = answer[2]
            return (200, ADDED[name]) if name in ADDED else (STATUS.get(name, 200), recorded(name))
        fault = next((f for f in self.faults if f[0] == handler.command and f[1] in path), None)
        if fault:
            self.faults.remove(fault)
            if not fault[3]:
                return fault[2], {"error": "scripted"}
        for method, pattern, function in ROUTES:
            found = re.fullmatch(API + pattern, path)
            if method == handler.command and found:
                status, made = function(self, query=query, ids=found.groups(), body=_parsed(handler, body))
                return (fault[2], {"error": "scripted"}) if fault else (status, made)
        return 404, {"error": f"no route {path}"}


ROUTES = [
    ("GET", "/healthz", MockKubeflow.healthz),
    ("GET", "/pipelines", MockKubeflow.list_pipelines),
    ("POST", "/pipelines", MockKubeflow.create_pipeline),
    ("POST", "/pipelines/upload_version", MockKubeflow.upload_version),
    ("GET", "/pipelines/([^/]+)/versions", MockKubeflow.list_versions),
    ("GET", "/pipelines/([^/]+)/versions/([^/]+)", MockKubeflow.get_version),
    ("GET", "/experiments", MockKubeflow.list_experiments),
    ("POST", "/experiments", MockKubeflow.create_experiment),
    ("GET", "/runs", MockKubeflow.list_runs),
    ("POST", "/runs", MockKubeflow.create_run),
    ("GET", "/runs/([^/:]+)", MockKubeflow.get_run),
    ("POST", "/runs/([^/:]+):terminate", MockKubeflow.terminate),
    ("POST", "/runs/([^/:]+):retry", MockKubeflow.retry),
]


def _spec(version):
    """The pipeline_spec of an uploaded version: both documents of the YAML."""
    if "spec" not in version:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        spec, *platform = yaml.load_all(version["yaml"], loader)
        version["spec"] = {"pipeline_spec": spec, "platform_spec": platform[0] if platform else {}}
    return version["spec"]


def _shown(run):
    return {name: value for name, value in run.items() if name != "looks"}


def _matching(entries, query, **fields):
    predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
    wanted = {
        predicate["key"]: predicate.get("stringValue") or predicate.get("string_value") for predicate in predicates
    }
    wanted = {"display_name" if key == "name" else key: value for key, value in wanted.items()}
    wanted |= {name: value for name, value in fields.items() if value}
    return [entry for entry in entries if all(entry.get(name) == value for name, value in wanted.items())]


def _parsed(handler, body):
    kind = handler.headers.get("Content-Type") or ""
    if kind.startswith("multipart/"):
        message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
        return message.get_payload()[0].get_payload(decode=True).decode()
    return json.loads(body) if body else None
