"""What the mocks of Kubeflow Pipelines and Kubernetes share: a server on loopback, which answers in JSON."""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MockServer:
    """A subclass answers: `respond` takes the handler, the path, its query and the body of a request."""

    def __init__(self):
        handler = type("Handler", (_Handler,), {"world": self})
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    world = None
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.world.respond(self, address.path, dict(urllib.parse.parse_qsl(address.query)), body)

    do_POST = do_PATCH = do_DELETE = do_GET

    def send(self, status, body, headers=(), missing=0):
        """An answer; `missing` bytes of it are announced and not sent."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) + missing))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = self.close_connection or bool(missing)

    def log_message(self, *_):
        pass
