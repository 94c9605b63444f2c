"""Metrics of a process outside Triton, for Prometheus to fetch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sightline.errors import ServingError
from sightline.metrics import Metrics

__all__ = ["exposed"]


@contextmanager
def exposed(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve `metrics` at `/metrics`; yields the port, a free one for 0. Raises ServingError where it is busy."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = metrics.text().encode() if found else b"expected /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: a line per scrape says nothing."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ServingError(f"--metrics-port {port}: expected a free port of {host}: {error.strerror}") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, name="exposition", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
