"""The terminal's view of a server: start, table of endpoints, end on Ctrl-C or SIGTERM."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from serving.supervisor import HEALTHY_AFTER, Supervision, pause
from serving.triton import TritonServer
from sightline.errors import SightlineError
from sightline.store import without_secrets

RECORD = Path("artifacts/logs/supervisor.prom")
"""What the supervisor has done, for a Prometheus textfile collector."""


def serve_until_stopped(
    release_dir: Path, *, host: str, grpc_port: int, http_port: int, metrics_port: int, store: str, queue: str,
    gallery: str | None = None, supervise: bool = True,
) -> None:  # fmt: skip
    """Serve in the foreground until Ctrl-C or SIGTERM; the latter ends the process, with code 0.

    With `supervise`, models and the server itself are brought back when their processes die, the server with the same
    release on the same ports: at once the first time, later after pauses that grow to a minute.

    Raises:
        ReleaseError, ServingError, StoreError: see TritonServer; when the server ends by itself ServingError, unless it
            is supervised.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    signal.signal(signal.SIGTERM, terminate)
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so; but the server has to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console(stderr=True, highlight=False)
    supervision = Supervision(record=RECORD) if supervise else None
    release_dir = release_dir.resolve()  # a new release is served when somebody starts it, not after an accident
    ports = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    failures, died = 0, math.nan
    try:
        while True:
            started = math.inf
            try:
                with TritonServer(
                    release_dir, host=host, **ports, store=store, queue=queue, gallery=gallery,
                    supervision=supervision, progress=say,
                ) as server:
                    started, ports = time.monotonic(), server.ports
                    if supervision and failures:
                        supervision.note("tritonserver", "restored", started - died)
                    console.print(endpoints(server))
                    console.print("Ctrl-C stops it.")
                    server.wait()
            except SightlineError as error:
                now = time.monotonic()
                if supervision is None or (math.isinf(started) and not failures):
                    raise
                if math.isinf(started):
                    supervision.note("tritonserver", "failed")
                else:
                    died, failures = now, 0 if now - started > HEALTHY_AFTER else failures
                say(f"{error}; starting again in {pause(failures):.0f} s")
                time.sleep(pause(failures))
                failures += 1
    except KeyboardInterrupt:
        console.print("stopped")


def endpoints(server: TritonServer) -> Table:
    """What is served where, and with what."""
    manifest = server.manifest
    table = Table(show_header=False)
    for name, value in (
        ("release", manifest.release),
        ("captioner", manifest.components.captioner),
        ("token spec", manifest.components.token_spec),
        ("ranker", manifest.components.ranker),
        ("features", without_secrets(server.store)),
        ("stand-ins", ", ".join(manifest.stand_ins)),
        ("gRPC", server.url),
        ("HTTP", f"http://{server.http_url}"),
        ("metrics", server.metrics_url),
    ):
        table.add_row(name, value)
    return table
