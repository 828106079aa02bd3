"""What mocks of servers share: a server on loopback, which answers in JSON; and a proxy before a real server."""

import http.client
import itertools
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

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

    def send(self, status, body, headers=(), missing=0):
        """An answer; `missing` bytes of it are announced and not sent."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        own = {"content-type": "application/json", "content-length": str(len(data) + missing)}
        self.send_response(status)
        for name, value in (own | {name.lower(): value for name, value in headers}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection = self.close_connection or bool(missing)

    def log_message(self, *_):
        pass


class Proxy(MockServer):
    """Before a real server: `fault(request, number)` gives a status to answer, or what edits an answer's body, or None.

    Where the edit gives None, the answer is lost: the connection is closed instead.
    """

    def __init__(self, target, fault):
        self.target, self.fault, self.numbers = target, fault, itertools.count(1)
        super().__init__()

    def respond(self, handler, path, query, body):
        fault = self.fault(handler, next(self.numbers))
        if isinstance(fault, int):
            code = {404: "NoSuchUpload"}.get(fault, "InternalError")
            handler.send(fault, f"<Error><Code>{code}</Code></Error>".encode())
            return
        upstream = http.client.HTTPConnection(self.target)
        # A client of S3 signed the proxy's address as Host, and it is forwarded as it came.
        upstream.request(handler.command, handler.path, body, dict(handler.headers))
        reply = upstream.getresponse()
        data = reply.read()
        upstream.close()
        data = fault(data) if fault else data
        handler.close_connection = data is None
        if data is not None:
            left_out = ["transfer-encoding", "connection"] + ["content-length"] * (
                handler.command != "HEAD"
            )
            headers = [
                (name, value) for name, value in reply.getheaders() if name.lower() not in left_out
            ]
            handler.send(reply.status, data, headers)
