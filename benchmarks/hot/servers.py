"""The contenders: how each is started, asked, and known to be ready."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np

from benchmarks.hot import data, wire
from benchmarks.hot.install import PYTHON
from benchmarks.hot.load import Line, Load
from benchmarks.hot.processes import Tree
from benchmarks.hot.work import STORE, Design
from serving.triton import TritonServer
from sightline.errors import ServingError

__all__ = ["CONTENDERS", "OURS", "Contender", "Running", "Setting", "serve", "trivial"]

TOLERANCE = 1e-4  # absolute, on probabilities: FP32 sums in another order
START_SECONDS = 120
_ROOT = Path(__file__).parents[2]
_HOST = "127.0.0.1"
_APPS = {
    "FastAPI": ("-m", "uvicorn", "benchmarks.hot.peers.fastapi_app:app", "--host", _HOST, "--port", "{port}",
                "--workers", "{workers}", "--no-access-log", "--log-level", "warning"),
    "LitServe": ("-m", "benchmarks.hot.peers.litserve_app"),
    "BentoML": ("-m", "bentoml", "serve", "benchmarks.hot.peers.bentoml_service:Rank", "--host", _HOST, "--port",
                "{port}"),
    "Ray Serve": ("-m", "benchmarks.hot.peers.ray_app"),
}  # fmt: skip
_PATHS: dict[Design, str] = {"plain": "/json", "tricked": "/binary"}
Known = tuple[Sequence[wire.Request], Sequence[wire.Answer]]
_ONE_PROXY = ("Ray Serve",)  # the others accept connections in every worker


@dataclass(frozen=True, order=True)
class Setting:
    """Processes that rank, and onnxruntime's threads in each."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers} × {self.threads}"


SETTINGS = tuple(Setting(workers, threads) for workers in (2, 1) for threads in (1, 2))


@dataclass(frozen=True)
class Contender:
    """A server and what it does; `peer` is None for Triton."""

    peer: str | None
    design: Design

    @property
    def name(self) -> str:
        return f"{self.peer} {self.design}" if self.peer else OURS

    @property
    def form(self) -> wire.Form:
        return "kserve" if self.peer is None else "json" if self.design == "plain" else "binary"

    @property
    def settings(self) -> tuple[Setting | None, ...]:
        """What the sweep tries; the tricked work has one thread by itself, and Triton is taken as it is released."""
        if self.peer is None:
            return (None,)
        return SETTINGS if self.design == "plain" else tuple(one for one in SETTINGS if one.threads == 1)


OURS = "Triton rank_items"
DESIGNS: tuple[Design, ...] = ("plain", "tricked")
CONTENDERS = (*(Contender(peer, design) for design in DESIGNS for peer in _APPS), Contender(None, "tricked"))


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is ready."""

    load: Load
    tree: Tree
    start_seconds: float
    difference: float
    """Largest one of its scores to those of the plain work."""
    triton: TritonServer | None = None


@contextmanager
def serve(
    contender: Contender, setting: Setting | None, folder: Path, requests: Sequence[wire.Request], known: Known,
    tree: Tree, log: Path,
) -> Iterator[Running]:  # fmt: skip
    """Start it, wait until every process of it answers, hold its answers against the expected ones; end it.

    Args:
        folder: of `benchmarks.hot.data`.
        known: requests and the plain work's answers, to compare with.

    Raises:
        ServingError: it does not start, or answers something else.
        OSError: it does not take connections.
    """
    began = time.monotonic()
    if contender.peer is None:
        with _triton(folder, tree, log) as server:
            address = (_HOST, int(server.http_url.rpartition(":")[2]))
            yield _ready(contender, address, wire.KSERVE_PATH, requests, known, tree, began, 1,
                         triton=server)  # fmt: skip
        return
    assert setting is not None
    with _peer(contender, setting, folder, tree, log) as (port, process):
        path = _PATHS[contender.design]
        while not _answers(port, wire.http(contender.form, path, requests[0])):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                ended = "did not start" if process.poll() is None else f"ended with code {process.returncode}"
                raise ServingError(f"{contender.name}: {ended}; {log}: {log.read_text(errors='replace')[-400:]!r}")
            time.sleep(0.1)
        acceptors = 1 if contender.peer in _ONE_PROXY else setting.workers
        yield _ready(contender, (_HOST, port), path, requests, known, tree, began, acceptors)


def _ready(
    contender: Contender, address: tuple[str, int], path: str, requests: Sequence[wire.Request], known: Known,
    tree: Tree, began: float, acceptors: int, triton: TritonServer | None = None,
) -> Running:  # fmt: skip
    contents = [wire.http(contender.form, path, request) for request in requests]
    load = Load(address, contents, owners=lambda ports: tree.owners(address[1], ports), acceptors=acceptors)
    while True:
        try:
            load.warm_up()
            break
        except (OSError, ServingError):  # a worker is not there yet, or a proxy still gets its routes
            if time.monotonic() - began > START_SECONDS:
                raise
            time.sleep(0.2)
    differences = []
    with closing(Line(address)) as line:
        for request, right in zip(*known, strict=True):
            found = wire.answer(contender.form, line.ask(wire.http(contender.form, path, request)))
            if found.scores.shape != right.scores.shape or not np.array_equal(found.status, right.status):
                raise ServingError(f"{contender.name}: expected the plain work's {len(right.scores)} statuses")
            differences.append(float(np.abs(found.scores - right.scores).max()))
    if not max(differences) <= TOLERANCE:
        raise ServingError(f"{contender.name}: scores differ by {max(differences):.1e}, expected at most {TOLERANCE:g}")
    return Running(load=load, tree=tree, start_seconds=round(time.monotonic() - began, 1),
                   difference=max(differences), triton=triton)  # fmt: skip


@contextmanager
def _peer(
    contender: Contender, setting: Setting, folder: Path, tree: Tree, log: Path
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    assert contender.peer is not None
    port = _free_port()
    scratch = Path(tempfile.mkdtemp(prefix="hot-"))
    environment = os.environ | tree.environment | {
        "PYTHONPATH": str(_ROOT), "OMP_WAIT_POLICY": "passive",
        "HOT_DATA": str(folder.resolve()), "HOT_DESIGN": contender.design, "HOT_PORT": str(port),
        "HOT_WORKERS": str(setting.workers), "HOT_THREADS": str(setting.threads), "HOT_SCRATCH": str(scratch),
        "BENTOML_HOME": str(scratch), "BENTOML_DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0",
        # What Ray's documentation calls its high-throughput mode; HAProxy is in its wheel.
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
    }  # fmt: skip
    command = [part.format(port=port, workers=setting.workers) for part in _APPS[contender.peer]]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen([PYTHON, *command], env=environment, cwd=_ROOT, stdout=output, stderr=output,
                                   stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            yield port, process
        finally:
            tree.end()
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _triton(folder: Path, tree: Tree, log: Path) -> Iterator[TritonServer]:
    """The release's server, with the item path alone: the peers have no captioner to keep either."""
    os.environ |= tree.environment
    try:
        server = TritonServer(data.release(folder), store=str(folder / STORE), log_path=log)
        with server:
            repository = f"http://{server.http_url}/v2/repository"
            for model in _post(f"{repository}/index"):
                if model["name"] != "rank_items":
                    _post(f"{repository}/models/{model['name']}/unload")
            _settle(tree)
            yield server
    finally:
        for name in tree.environment:
            del os.environ[name]


@contextmanager
def trivial(tree: Tree) -> Iterator[Load]:
    """A server that does nothing: what is measured with it is the generator itself."""
    port = _free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.hot.trivial", str(port)], cwd=_ROOT,
                               env=os.environ | tree.environment)  # fmt: skip
    content = wire.http("binary", "/", wire.Request(1, np.arange(500), np.zeros(2, np.int64)))
    try:
        while not _answers(port, content):
            time.sleep(0.05)
        yield Load((_HOST, port), [content])
    finally:
        tree.end()
        process.wait()


def _answers(port: int, content: bytes) -> bool:
    try:
        line = Line((_HOST, port))
    except OSError:
        return False
    try:
        line.ask(content)
        return True
    except (OSError, ServingError):
        return False
    finally:
        line.close()


def _post(url: str) -> Any:
    with urlopen(HttpRequest(url, method="POST", data=b"{}"), timeout=30) as response:
        return json.loads(response.read() or b"null")


def _settle(tree: Tree) -> None:
    """Wait until no process has ended for a second: those that are still unloading would share the cores."""
    known, since, began = tree.pids(), time.monotonic(), time.monotonic()
    while time.monotonic() < min(since + 1, began + START_SECONDS):
        time.sleep(0.1)
        if (now := tree.pids()) != known:
            known, since = now, time.monotonic()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


