"""The terminal's view of a server: start, table of endpoints, end on Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from serving.triton import TritonServer


def serve_until_stopped(
    release_dir: Path, *, host: str, grpc_port: int, http_port: int, metrics_port: int
) -> None:
    """Serve in the foreground until Ctrl-C or SIGTERM; the latter ends the process, with code 0.

    Raises:
        ReleaseError, ServingError: see TritonServer; ServingError too when the server ends by itself.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, terminate)
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so; but the server has to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console = Console(stderr=True, highlight=False)
    try:
        with TritonServer(
            release_dir, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
            progress=lambda line: console.print(line, markup=False, soft_wrap=True),
        ) as server:  # fmt: skip
            console.print(endpoints(server))
            console.print("Ctrl-C stops it.")
            server.wait()
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
        ("stand-ins", ", ".join(manifest.stand_ins)),
        ("gRPC", server.url),
        ("HTTP", f"http://{server.http_url}"),
        ("metrics", server.metrics_url),
    ):
        table.add_row(name, value)
    return table
