"""A server of chat completions in this process."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers each request by `respond(body, number)`: (status, headers, bytes)."""

    def __init__(self, respond):
        self.requests, lock = [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    number = len(outer.requests)
                status, headers, content = respond(body, number)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_): ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(monkeypatch):
    """While entered, a function that starts a server; they are asked without a proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def started(respond):
        servers.append(Server(respond))
        return servers[-1]

    try:
        yield started
    finally:
        for server in servers:
            server.close()


def completion(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()
