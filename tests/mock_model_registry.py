"""A mock of Kubeflow's Model Registry, over HTTP on loopback, with the requests that a registration makes.

Paths and answers are those of the registry's REST API as its Python client 0.3.18 and its server's source have them: an
entity that is not there answers 404, a name that is taken 409. It keeps everything in memory.
"""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

API = "/api/model_registry/(?:v1|v1alpha3)"  # the second is that of clients before the first
FIND = {"registered_model": "registered_models", "model_version": "model_versions", "model_artifact": "artifacts"}


class Registry:
    """What the mock has, and how it fails."""

    def __init__(self):
        self.entities = {kind: {} for kind in FIND.values()}  # (parent's id, name) -> entity
        self.created = []  # kinds, in order
        self.authorizations = []  # of all requests
        self.failures = {}  # kind -> (status, body) of the next request that would create one
        self.delay = 0.0  # seconds before each answer
        self.beside = None  # called once before an entity is created: what another step does at that moment

    def find(self, kind, parent, name):
        entity = self.entities[kind].get((parent, name))
        return (200, entity) if entity else (404, {"code": "404", "message": f"no {kind} found for name={name}"})

    def create(self, kind, parent, entity):
        beside, self.beside = self.beside, None
        if beside:
            beside()
        if kind in self.failures:
            return self.failures.pop(kind)
        key = (parent, entity["name"])
        if key in self.entities[kind]:
            return 409, {"code": "409", "message": f"{kind} with name {entity['name']} already exists"}
        number = sum(map(len, self.entities.values())) + 1
        self.entities[kind][key] = {**entity, "id": str(number)}
        self.created.append(kind)
        return 201, self.entities[kind][key]

    def only(self, kind):
        (entity,) = self.entities[kind].values()
        return entity


class Handler(BaseHTTPRequestHandler):
    registry: Registry

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match = re.fullmatch(rf"{API}/({'|'.join(FIND)})", url.path)
        if not match:
            return self.answer(404, {"code": "404", "message": "page not found"})
        return self.answer(*self.registry.find(FIND[match[1]], query.get("parentResourceId", ""), query["name"]))

    def do_POST(self):
        entity = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if re.fullmatch(rf"{API}/registered_models", self.path):
            return self.answer(*self.registry.create("registered_models", "", entity))
        if re.fullmatch(rf"{API}/model_versions", self.path):
            return self.answer(*self.registry.create("model_versions", entity["registeredModelId"], entity))
        artifact = re.fullmatch(rf"{API}/model_versions/(\d+)/artifacts", self.path)
        if artifact:
            return self.answer(*self.registry.create("artifacts", artifact[1], entity))
        return self.answer(404, {"code": "404", "message": "page not found"})

    def answer(self, status, body):
        time.sleep(self.registry.delay)
        self.registry.authorizations.append(self.headers.get("Authorization"))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def running():
    """The mock and its address."""
    registry = Registry()
    handler = type("OneRegistry", (Handler,), {"registry": registry})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield registry, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
