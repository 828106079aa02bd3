"""A stand-in for Kubeflow Pipelines' API server: paths, methods and fields of its published v2beta1 OpenAPI.

It is not Kubeflow: it keeps pipelines, versions, experiments and runs in memory, and a test scripts the states that a
run goes through and the errors that a request meets.
"""

import json
import re
import threading
import urllib.parse
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

API = "/apis/v2beta1"


class StandIn:
    def __init__(self, token=None):
        self.token = token
        self.pipelines, self.versions, self.experiments, self.runs = [], [], [], []
        self.script = [("SUCCEEDED", {})]  # what each look at a run finds: its state, and the states of its steps
        self.faults = []  # (method, part of the path, status, whether the request takes effect), each used once
        self.requests = []
        handler = type("Handler", (_Handler,), {"world": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def calls(self, method, part):
        return [entry for entry in self.requests if entry[0] == method and part in entry[1]]

    # Each returns (status, body).

    def healthz(self, **_):
        return 200, {"multi_user": False}

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
        self.runs.append(made)
        return 200, _shown(made)

    def list_runs(self, query, **_):
        return 200, {"runs": [_shown(run) for run in _matching(self.runs, query)]}

    def get_run(self, ids, **_):
        run = self._run(ids[0])
        if run is None:
            return 404, {"error": "no such run"}
        state, steps = self.script[min(run["looks"], len(self.script) - 1)]
        run["looks"] += 1
        run["state"] = state
        if state in ("SUCCEEDED", "FAILED", "CANCELED"):
            run["finished_at"] = f"2026-01-01T00:00:{run['looks']:02d}Z"
        details = [{"display_name": name, "task_id": name, **_step(step)} for name, step in steps.items()]
        return 200, {**_shown(run), "run_details": {"task_details": [*details, {"display_name": "root"}]}}

    def terminate(self, ids, **_):
        self._run(ids[0])["state"] = "CANCELING"
        self.script = [("CANCELING", {}), ("CANCELED", {})]
        return 200, {}

    def retry(self, ids, **_):
        return (200, {}) if self._run(ids[0])["state"] in ("FAILED", "CANCELED") else (400, {"error": "not failed"})

    def _run(self, run_id):
        return next((run for run in self.runs if run["run_id"] == run_id), None)


ROUTES = [
    ("GET", "/healthz", StandIn.healthz),
    ("GET", "/pipelines", StandIn.list_pipelines),
    ("POST", "/pipelines", StandIn.create_pipeline),
    ("POST", "/pipelines/upload_version", StandIn.upload_version),
    ("GET", "/pipelines/([^/]+)/versions", StandIn.list_versions),
    ("GET", "/experiments", StandIn.list_experiments),
    ("POST", "/experiments", StandIn.create_experiment),
    ("GET", "/runs", StandIn.list_runs),
    ("POST", "/runs", StandIn.create_run),
    ("GET", "/runs/([^/:]+)", StandIn.get_run),
    ("POST", "/runs/([^/:]+):terminate", StandIn.terminate),
    ("POST", "/runs/([^/:]+):retry", StandIn.retry),
]


def _step(step):
    state, _, message = step.partition(": ")
    return {"state": state, "error": {"code": 1, "message": message}} if message else {"state": state}


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


class _Handler(BaseHTTPRequestHandler):
    world = None
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.world.requests.append((self.command, address.path, dict(self.headers), query))
        status, body = self.respond(address.path, query, raw)
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def respond(self, path, query, raw):
        world = self.world
        if world.token and self.headers.get("authorization") != f"Bearer {world.token}":
            return 401, {"error": "token is not valid"}
        fault = next((f for f in world.faults if f[0] == self.command and f[1] in path), None)
        if fault:
            world.faults.remove(fault)
            if not fault[3]:
                return fault[2], {"error": "scripted"}
        for method, pattern, function in ROUTES:
            found = re.fullmatch(API + pattern, path)
            if method == self.command and found:
                status, body = function(world, query=query, ids=found.groups(), body=self.parsed(raw))
                return (fault[2], {"error": "scripted"}) if fault else (status, body)
        return 404, {"error": f"no route {path}"}

    def parsed(self, raw):
        kind = self.headers.get("Content-Type") or ""
        if kind.startswith("multipart/"):
            message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + raw)
            return message.get_payload()[0].get_payload(decode=True).decode()
        return json.loads(raw) if raw else None

    def log_message(self, *_):
        pass
