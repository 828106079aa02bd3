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
STATUS = {3: 400, 5: 404, 10: 409, 13: 500}  # of HTTP, by the code of a recorded refusal
CUT, HANG = object(), object()
ADDED = {  # not recorded: what proxies and broken connections make of an answer of 200
    "login page": b"<!DOCTYPE html><html><body>Log in</body></html>",
    "empty object": b"{}",
    "bad JSON": b'{"run_id": "run-0", "state": ',
    "cut answer": CUT,
    "hang": HANG,
}


def recorded(name):
    return json.loads((DATA / f"{name}.json").read_text())


class MockKubeflow(MockServer):
    def __init__(self):
        self.token = None  # that a request must have
        self.pipelines, self.versions, self.experiments, self.runs = [], [], [], []
        self.script = ["SUCCEEDED"]  # the state that each look at a run finds
        self.played = []  # recorded answers for each look at a run, instead of the script
        self.version = None  # the recorded version of a played run
        # (method, part of the path, status, whether the request takes effect), each used once
        self.faults = []
        # (method, part of the path, name of a recorded or an added answer), each used once
        self.answers = []
        self.requests, self.bodies = [], []
        super().__init__()

    def play(self, *names, version="version-of-run-succeeded-6-tasks"):
        """Recorded answers to one look at a run after another, the last one for ever; returns the run's id."""
        run_id = recorded(names[-1])["run_id"]
        self.played = [recorded(name) | {"run_id": run_id} for name in names]
        self.version = version and recorded(version)
        return run_id

    def calls(self, method, part):
        return [entry for entry in self.requests if entry[0] == method and part in entry[1]]

    # Each returns (status, body).

    def list_all(self, query, ids, **_):
        own = (
            {"namespace": query["namespace"]} if query.get("namespace") and ids[0] != "runs" else {}
        )
        return 200, {
            ids[0]: [_shown(entry) for entry in _matching(getattr(self, ids[0]), query, **own)]
        }

    def create(self, body, ids, **_):
        entries, kind = getattr(self, ids[0]), ids[0].removesuffix("s")
        entries.append({**body, f"{kind}_id": f"{kind}-{len(entries)}"})
        return 200, entries[-1]

    def upload_version(self, query, body, **_):
        made = {"pipeline_id": query["pipelineid"], "display_name": query["name"]}
        if any(entry.items() >= made.items() for entry in self.versions):
            return 409, {"error": "version exists"}
        made["pipeline_version_id"] = f"version-{len(self.versions)}"
        made["description"] = query.get("description")
        self.versions.append({**made, "yaml": body})
        return 200, made

    def list_versions(self, query, ids, **_):
        own = _matching(self.versions, query, pipeline_id=ids[0])
        return 200, {"pipeline_versions": [{**entry, "yaml": None} for entry in own]}

    def create_run(self, body, **_):
        made = {
            **body,
            "run_id": f"run-{len(self.runs)}",
            "created_at": "2026-01-01T00:00:00Z",
            "looks": 0,
        }
        made |= {
            "state": "PENDING",
            "state_history": [{"state": "PENDING", "update_time": made["created_at"]}],
        }
        self.runs.append(made)
        return 200, _shown(made)

    def get_version(self, ids, **_):
        if self.version is not None:
            return 200, self.version
        made = next(
            (entry for entry in self.versions if entry["pipeline_version_id"] == ids[1]), None
        )
        return (
            (200, {**made, "yaml": None, "pipeline_spec": _spec(made)})
            if made
            else (404, {"error": "no version"})
        )

    def get_run(self, ids, **_):
        if self.played:
            return 200, self.played.pop(0) if len(self.played) > 1 else self.played[0]
        run = self._run(ids[0])
        state = self.script[min(run["looks"], len(self.script) - 1)]
        run["looks"] += 1
        self.enter(run, state)
        return 200, _shown(run)

    def enter(self, run, state):
        """A state that a run is in from now on."""
        now = f"2026-01-01T00:00:{len(run['state_history']):02d}Z"
        if run["state"] != state:
            run["state_history"].append({"state": state, "update_time": now})
        run["state"] = state
        if state in ("SUCCEEDED", "FAILED"):
            run["finished_at"] = now

    def terminate(self, ids, **_):
        run = self._run(ids[0])
        self.enter(run, "CANCELING")
        self.script = ["CANCELING", "FAILED"]
        run["looks"] = 0
        return 200, recorded("post-terminate")

    def retry(self, ids, **_):
        if self.played:
            return 200, {}
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
            handler.send(status, answer)

    def answer(self, handler, path, query, body):
        if self.token and handler.headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"error": "token is not valid"}
        answer = next((a for a in self.answers if a[0] == handler.command and a[1] in path), None)
        if answer:
            self.answers.remove(answer)
            return (
                (200, ADDED[answer[2]]) if answer[2] in ADDED else _with_status(recorded(answer[2]))
            )
        fault = next((f for f in self.faults if f[0] == handler.command and f[1] in path), None)
        if fault:
            self.faults.remove(fault)
            if not fault[3]:
                return fault[2], {"error": "scripted"}
        for method, pattern, function in ROUTES:
            found = re.fullmatch(API + pattern, path)
            if method == handler.command and found:
                status, made = function(
                    self, query=query, ids=found.groups(), body=_parsed(handler, body)
                )
                return (fault[2], {"error": "scripted"}) if fault else (status, made)
        return 404, {"error": f"no route {path}"}


ROUTES = [
    ("GET", "/healthz", lambda *_, **__: (200, recorded("healthz"))),
    ("GET", "/(pipelines|experiments|runs)", MockKubeflow.list_all),
    ("POST", "/(pipelines|experiments)", MockKubeflow.create),
    ("POST", "/pipelines/upload_version", MockKubeflow.upload_version),
    ("GET", "/pipelines/([^/]+)/versions", MockKubeflow.list_versions),
    ("GET", "/pipelines/([^/]+)/versions/([^/]+)", MockKubeflow.get_version),
    ("POST", "/runs", MockKubeflow.create_run),
    ("GET", "/runs/([^/:]+)", MockKubeflow.get_run),
    ("POST", "/runs/([^/:]+):terminate", MockKubeflow.terminate),
    ("POST", "/runs/([^/:]+):retry", MockKubeflow.retry),
]


def _with_status(answer):
    return STATUS.get(answer.get("code"), 200), answer


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
    for each in predicates:
        key = "display_name" if each["key"] == "name" else each["key"]
        fields[key] = each.get("stringValue") or each.get("string_value")
    return [
        entry
        for entry in entries
        if all(entry.get(name) == value for name, value in fields.items())
    ]


def _parsed(handler, body):
    kind = handler.headers.get("Content-Type") or ""
    if kind.startswith("multipart/"):
        message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
        return message.get_payload()[0].get_payload(decode=True).decode()
    return json.loads(body) if body else None
