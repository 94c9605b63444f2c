"""One Triton process that serves one release, from verification to a clean end."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import IO, Any, Self

from serving.probe import canary
from serving.runtime import RETRIEVE, Runtime, choose_port, link_models
from serving.supervisor import Supervision, Supervisor
from sightline.errors import ServingError
from sightline.features import seed
from sightline.gallery import open_gallery
from sightline.release import verify
from sightline.store import absolute, open_store, without_secrets

# Waits until the pipe to the process that started the server is closed, on purpose or by its death; then ends
# the server ($1, also its process group) and removes what it leaves: the run folder ($3) and, if it was
# killed, stubs and shared memory ($2…).
GUARD = """
read -r _
kill -s TERM "$1"; tries=0
while kill -s 0 "$1" && [ $tries -lt 200 ]; do sleep 0.1; tries=$((tries+1)); done
kill -s KILL -- "-$1"
rm -rf "/dev/shm/$2"* "$3"
"""
LOADED = re.compile(r"successfully loaded '(\w+)'")
# Triton's complaints on a machine without a GPU; true, and nothing to act on. They stay in the log.
NOISE = re.compile("cuda", re.IGNORECASE)
FAILED = re.compile(r"failed to load '(\w+)' version \d+: (.*)")
# A python stub that dies while its model loads is not noticed by Triton 2.51, which then waits for ever.
CRASHED = re.compile(r"what\(\):\s*(.+)")
# The last of the services that Triton starts after the models.
READY = "Started Metrics Service"


class TritonServer:
    """Context manager: verifies the release, starts Triton, awaits a canary inference, stops it cleanly.

        with TritonServer(release_dir) as server:
            client = tritonclient.grpc.InferenceServerClient(server.url)

    Attributes:
        manifest: the verified release's.
        url, http_url, metrics_url: `host:port` of gRPC and HTTP, URL of the Prometheus metrics.
        token: part of the names of everything that belongs to this server: run folder, shared memory.
        start_seconds: from the start of the process to the canary's answer.
        log_path: the server's whole log.
    """

    def __init__(
        self,
        release_dir: str | Path,
        *,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        store: str | None = None,
        queue: str | None = None,
        gallery: str | None = None,
        supervision: Supervision | None = None,
        log_path: str | Path | None = None,
        timeout: float = 300.0,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Port 0 takes a free one; `timeout` bounds the start in seconds; `progress` gets one line per step.

        Args:
            store: location of the feature store, which gets the release's features unless it has them; None: one that
                ends with the server.
            queue: location of the nearline queue; None: what could not be captioned in time is not queued.
            gallery: location of the vector gallery, made where there is none; None: `retrieve` is not served.
            supervision: how models whose process dies or hangs are brought back; None: they are not.

        Raises:
            ReleaseError: the release is damaged.
            ServingError: a port is busy, or the server's files are missing.
            StoreError: the store cannot be reached.
        """
        self.release_dir = Path(release_dir).resolve()
        self.manifest = verify(self.release_dir)
        self._runtime = Runtime.find()
        self._host = host
        self._grpc = choose_port("--grpc-port", host, grpc_port)
        self._http = choose_port("--http-port", host, http_port)
        self._metrics = choose_port("--metrics-port", host, metrics_port)
        self.url, self.http_url = f"{host}:{self._grpc}", f"{host}:{self._http}"
        self.metrics_url = f"http://{host}:{self._metrics}/metrics"
        self.token = f"sightline_{os.getpid()}_{secrets.token_hex(4)}"
        self.log_path = Path(log_path or f"artifacts/logs/{self.token}.log").resolve()
        self._store, self._queue, self._gallery, self._supervision = store, queue, gallery, supervision
        self._supervisor: Supervisor | None = None
        self._timeout = timeout
        self._progress = progress
        self._events: Queue[tuple[str, str]] = Queue()
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        self._run_dir = Path(tempfile.mkdtemp(prefix=f"{self.token}_"))
        try:
            self._fill_store()
            self._start()
            self._await_models()
            canary(self.url)
            self._supervise()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - self._started
        self._progress(f"canary answered, {self.start_seconds:.1f} s after the start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of tritonserver; its python stubs are in the process group of the same number."""
        return self._process.pid

    def wait(self) -> None:
        """Block until the server ends by itself, which it should not: raises ServingError then."""
        # In steps: a signal that arrives just before a blocking wait would be noticed only after it.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        raise ServingError(f"tritonserver ended with code {code}; its log is {self.log_path}")

    def statistics(self) -> dict[str, Any]:
        """Per model: inferences, executions (batches), mean milliseconds of queue, compute and in total."""
        import tritonclient.grpc as triton

        with triton.InferenceServerClient(self.url) as client:
            models = client.get_inference_statistics(as_json=True)["model_stats"]
        return {model["name"]: _summary(model) for model in models}

    def stop(self) -> None:
        """End the server, its stubs and its shared memory; nothing happens when they are gone."""
        if self._supervisor:
            self._supervisor.stop()
            self._supervisor = None
        if hasattr(self, "_guard"):
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._process.wait()
            self._guard.wait()
            self._reader.join()
            del self._guard
        shutil.rmtree(self._run_dir, ignore_errors=True)

    @property
    def ports(self) -> dict[str, int]:
        """As the arguments of the same names: what another server takes that is to replace this one."""
        return {"grpc_port": self._grpc, "http_port": self._http, "metrics_port": self._metrics}

    @property
    def store(self) -> str:
        """Location of the feature store."""
        return self._store or str(self._run_dir / "features")

    def _fill_store(self) -> None:
        self._progress(f"features: {without_secrets(self.store)}")
        with open_store(self.store) as store:
            seed(self.release_dir, store)
        if self._gallery is not None:
            open_gallery(self._gallery).close()  # a new one is made: models open it for reading

    def _environment(self) -> dict[str, str]:
        own = {"SIGHTLINE_STORE": absolute(self.store)}
        if self._queue is not None:
            own["SIGHTLINE_QUEUE"] = absolute(self._queue)
        if self._gallery is not None:
            own["SIGHTLINE_GALLERY"] = absolute(self._gallery)
        return self._runtime.environment() | own

    def _supervise(self) -> None:
        if self._supervision:
            self._supervisor = Supervisor(
                self.url, self.pid, self._run_dir / "models", self._supervision,
                patience=self._timeout, progress=self._progress,
            )  # fmt: skip
            self._supervisor.start()

    def _start(self) -> None:
        backends, repository = self._run_dir / "backends", self._run_dir / "models"
        self._runtime.make_backends(backends)
        without = () if self._gallery is not None else (RETRIEVE,)
        models = link_models(self.release_dir / "model_repository", repository, without)
        command = [
            str(self._runtime.binary),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self.token}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models),
            f"--model-load-thread-count={len(models)}",
            # The release's configurations are complete; completing them again would start every stub twice.
            "--disable-auto-complete-config",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--grpc-address={self._host}", f"--grpc-port={self._grpc}",
            f"--http-address={self._host}", f"--http-port={self._http}",
            f"--metrics-address={self._host}", f"--metrics-port={self._metrics}",
        ]  # fmt: skip
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._progress(f"starting Triton with release {self.manifest.release}; log: {self.log_path}")
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command, env=self._environment(), start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self._process.pid), self.token, str(self._run_dir)],
            start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        """Copy the server's output to the log; turn the lines that matter into events."""
        with output, self.log_path.open("w") as log:
            for line in output:
                log.write(line)
                log.flush()
                if found := LOADED.search(line):
                    self._events.put(("loaded", found[1]))
                elif found := FAILED.search(line):
                    self._events.put(("failed", f"{found[1]}: {found[2]}"))
                elif READY in line:
                    self._events.put(("ready", ""))
                elif found := CRASHED.search(line):
                    self._events.put(("crashed", found[1]))
                elif line.startswith("E") and not NOISE.search(line):
                    self._progress(line.rstrip())
        self._events.put(("ended", ""))

    def _await_models(self) -> None:
        failure = "the server ended"
        while True:
            left = self._started + self._timeout - time.monotonic()
            try:
                kind, detail = self._events.get(timeout=max(left, 0))
            except Empty:
                raise ServingError(
                    f"the models did not load within {self._timeout:.0f} s; "
                    f"the server's log is {self.log_path}"
                ) from None
            if kind == "loaded":
                self._progress(f"{detail:<16} loaded after {time.monotonic() - self._started:5.1f} s")
            elif kind == "failed":
                failure = detail
            elif kind == "crashed":
                raise ServingError(
                    f"a python model of the server crashed while it loaded ({detail}), as happens on an overloaded "
                    f"machine; start again; the server's log is {self.log_path}"
                )
            elif kind == "ready":
                return
            else:
                raise ServingError(f"Triton did not start: {failure}; the server's log is {self.log_path}")


def _summary(model: dict[str, Any]) -> dict[str, float]:
    times = model.get("inference_stats", {})
    count = int(times.get("success", {}).get("count", 0))

    def milliseconds(part: str) -> float:
        return int(times.get(part, {}).get("ns", 0)) / max(count, 1) / 1e6

    return {
        "inferences": int(model.get("inference_count", 0)),
        "executions": int(model.get("execution_count", 0)),
        "queue_ms": milliseconds("queue"),
        "compute_ms": milliseconds("compute_infer"),
        "total_ms": milliseconds("success"),
    }
