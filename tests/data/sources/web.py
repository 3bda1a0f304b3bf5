"""A web server on this machine, and a clock that does not wait."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bessemer.data.sources.io.fetch import Clock
from tests.data.sources.makers import page


class Counted:
    """A clock that never waits and keeps what it was asked to wait."""

    def __init__(self):
        self.waits, self.time = [], 0.0
        self._lock = threading.Lock()

    def sleep(self, seconds):
        with self._lock:
            self.waits.append(seconds)
            self.time += seconds

    def now(self):
        return self.time

    def clock(self):
        return Clock(self.sleep, self.now)


class Site:
    """A web server on this machine whose answers are functions of the request, by path."""

    def __init__(self):
        self.answers, self.asked = {}, []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                answer = site.answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.send_error(404)
                    return
                status, headers, body = answer(self) if callable(answer) else answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def html(self, path, text, **headers):
        self.answers[path] = (200, {"Content-Type": "text/html"} | headers, page(f"<p>{text}</p>"))

    def asked_pages(self):
        return [path for path in self.asked if path not in ("/robots.txt", "/ai.txt")]
