"""Watches the models of a running server, and brings back those whose process has died or hangs.

A python model of Triton 2.51 (a python-based backend's, too) runs in processes of its own, one per instance. One that
dies is never started again: the server says it is ready, and every request that reaches the dead instance fails, a
second or two late. Two things are watched:

    processes   the kernel tells at once that one has ended (pidfd_open(2)). It was no accident if the model is still
                there and has fewer processes than instances.
    canaries    every few seconds each model gets the smallest request that its configuration allows. Any answer of its
                own is a sign of life, a refusal, too. A model that owes several answers in a row, and has answered
                nobody else meanwhile, hangs: its processes are killed, which is the first case.

A model is brought back by loading it again *over* the dead one (its version folder gets a new time, or Triton would do
nothing). Unloading it first, the usual advice, takes down all that depends on it: the ensembles, and its instances that
are alive. So they go on until the new ones take over. It counts as restored when it answers a canary.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sightline.errors import ConfigError, ServingError
from sightline.metrics import Metrics

STUB = "triton_python_backend_stub"
DEAD = re.compile(r"Stub process .* is not healthy")
LONGEST_PAUSE, HEALTHY_AFTER = 60.0, 60.0  # seconds
NO_ANSWER = ("StatusCode.DEADLINE_EXCEEDED", "StatusCode.NOT_FOUND")  # too late; no such model
STRIKES = 3  # canaries without an answer
DRAIN = 5.0  # seconds that a replaced instance has for what it is doing
_LOOK = 0.5  # seconds after which the end of the watch itself is noticed


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """How a server is watched. Times in seconds; `record`: a file for a Prometheus textfile collector."""

    interval: float = 5.0
    """Between two canaries of a model."""
    patience: float = 2.0
    """For one canary."""
    record: Path | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics(model="supervisor"))

    def __post_init__(self) -> None:
        for name in ("interval", "patience"):
            if not 0.05 <= getattr(self, name) <= 3600:
                raise ConfigError(f"{name}: expected 0.05 to 3600 seconds, got {getattr(self, name)}")

    def note(self, target: str, result: str, seconds: float | None = None) -> None:
        """Count an attempt to bring back a model or a server; `seconds` is how long it was away."""
        self.metrics.count("sightline_supervisor_restarts_total", target=target, result=result)
        if seconds is not None:
            self.metrics.observe("sightline_supervisor_recovery_seconds", seconds, target=target)
        if self.record:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.record.with_suffix(".new")
            fresh.write_text(self.metrics.text())
            fresh.rename(self.record)


def pause(failures: int) -> float:
    """Seconds before the next attempt, after so many in a row that did not last.

    >>> [pause(failures) for failures in (0, 1, 2, 3, 20)]
    [0.0, 1.0, 2.0, 4.0, 60.0]
    """
    return min(2.0 ** (failures - 1), LONGEST_PAUSE) if failures else 0.0


class Supervisor:
    """Watches from `start` to `stop`.

    Args:
        url: `host:port` of the server's gRPC endpoint.
        pid: tritonserver's.
        repository: its model repository, in which this may change the times of version folders.
        how: see `Supervision`.
        patience: seconds that a model may take to load.
        progress: gets one line per event.
    """

    def __init__(
        self, url: str, pid: int, repository: Path, how: Supervision, *, patience: float = 300.0,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self._url, self._repository, self._how = url, repository, how
        self._load_patience, self._progress = patience, progress
        self._client = _client(url)
        configs = (self._client.get_model_config(path.name).config for path in sorted(repository.iterdir()))
        self._models = {config.name: _Model(config) for config in configs if config.platform != "ensemble"}
        self._processes = _Processes(pid)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._loaders = ThreadPoolExecutor(len(self._models), thread_name_prefix="restore")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the watch; a load that is under way ends with the server."""
        self._stopping.set()
        self._thread.join()
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        due = time.monotonic() + self._how.interval
        while not self._stopping.is_set() and self._processes.server_lives():
            for name in self._processes.ended(max(0.0, min(due - time.monotonic(), _LOOK))):
                self._restore(name)
            if time.monotonic() >= due:
                for name in self._models:
                    self._examine(name)
                due = time.monotonic() + self._how.interval
        self._processes.close()

    def _restore(self, name: str) -> None:
        """Bring the model back unless that is being done, or nothing is wrong."""
        model = self._models[name]
        if model.restoring or not self._is_short_of_processes(name):
            return
        model.restoring = True
        self._loaders.submit(self._bring_back, name, time.monotonic())

    def _is_short_of_processes(self, name: str) -> bool:
        if len(self._processes.of(name)) >= self._models[name].instances:
            return False
        try:
            return bool(self._client.is_model_ready(name, client_timeout=self._how.patience))  # else: unloaded
        except self._models[name].errors:
            return False

    def _bring_back(self, name: str, since: float) -> None:
        model, old = self._models[name], self._processes.of(name)
        if since - model.restored > HEALTHY_AFTER:
            model.failures = 0
        while not self._stopping.wait(pause(model.failures)):
            self._progress(f"{name}: a process of it has ended; loading it again")
            model.failures += 1  # forgotten when the restored model lasts
            try:
                with _client(self._url) as client:
                    self._load(client, name)
                    self._canary(client, name, self._load_patience)
            except (ServingError, *model.errors) as error:
                self._how.note(name, "failed")
                self._progress(f"{name}: not restored, next attempt in {pause(model.failures):.0f} s: {error}")
                continue
            model.restored = time.monotonic()
            self._how.note(name, "restored", model.restored - since)
            self._progress(f"{name}: restored after {model.restored - since:.1f} s")
            # Instances that were alive end now by themselves, unless a request has failed in the dead one: for good.
            self._stopping.wait(DRAIN)
            for process in old:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            break
        model.restoring = False

    def _load(self, client: Any, name: str) -> None:
        folders = [path for path in (self._repository / name).iterdir() if path.name.isdigit()]
        os.utime(max(folders, key=lambda path: int(path.name)))
        client.load_model(name, client_timeout=self._load_patience)

    def _canary(self, client: Any, name: str, timeout: float) -> None:
        """Raises ServingError when the model's process is dead, InferenceServerException when there is no answer."""
        model = self._models[name]
        try:
            client.infer(name, model.request, client_timeout=timeout)
        except model.errors as error:
            if DEAD.search(str(error)):
                raise ServingError(str(error)) from error
            if str(error.status()) in NO_ANSWER:
                raise

    def _examine(self, name: str) -> None:
        """One canary; see the head of the module for what follows from its answer."""
        model = self._models[name]
        self._restore(name)  # also what escaped notice while it was being restored
        if model.restoring:
            return
        try:
            before = self._finished(name)
            self._canary(self._client, name, self._how.patience)
            model.strikes = 0
        except ServingError:
            self._restore(name)
        except model.errors as error:
            if str(error.status()) != NO_ANSWER[0]:
                return  # unloaded, or the server has ended
            with suppress(*model.errors):
                model.strikes = 0 if self._finished(name) > before else model.strikes + 1
            if model.strikes == STRIKES:
                model.strikes = 0
                self._progress(f"{name}: {STRIKES} canaries without an answer; killing its processes")
                for process in self._processes.of(name):
                    process.kill()

    def _finished(self, name: str) -> int:
        """Requests that the model has answered."""
        (found,) = self._client.get_inference_statistics(name, client_timeout=self._how.patience).model_stats
        return int(found.inference_stats.success.count + found.inference_stats.fail.count)


class _Model:
    """What is known of a model: from its configuration, and from what happened to it."""

    def __init__(self, config: Any) -> None:
        from tritonclient.utils import InferenceServerException

        self.errors: tuple[type[Exception], ...] = (InferenceServerException,)
        self.instances = sum(group.count for group in config.instance_group)
        self.request = example(config)
        self.restoring = False
        self.failures = self.strikes = 0
        self.restored = -HEALTHY_AFTER


def _client(url: str) -> Any:
    import tritonclient.grpc as triton

    return triton.InferenceServerClient(url)


def example(config: Any) -> list[Any]:
    """The smallest request that a model's configuration (its protobuf) allows: zeros, empty strings, one row."""
    import tritonclient.grpc as triton
    from tritonclient.grpc.model_config_pb2 import DataType
    from tritonclient.utils import triton_to_np_dtype

    tensors = []
    for tensor in config.input:
        if tensor.optional:
            continue
        shape = [1] * bool(config.max_batch_size) + [max(size, 1) for size in tensor.dims]
        kind = DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        value = np.full(shape, b"", object) if kind == "BYTES" else np.zeros(shape, triton_to_np_dtype(kind))
        tensors.append(triton.InferInput(tensor.name, shape, kind))
        tensors[-1].set_data_from_numpy(value)
    return tensors


class _Processes:
    """The python processes of a server, by model."""

    def __init__(self, pid: int) -> None:
        self._server = psutil.Process(pid)
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[str, psutil.Process]] = {}  # by pidfd
        self.discover()

    def server_lives(self) -> bool:
        return _lives(self._server)

    def discover(self) -> None:
        """Find processes that were started since."""
        with self._lock, suppress(psutil.NoSuchProcess):
            known = {process.pid for _, process in self._watched.values()}
            for model, process in model_processes(self._server.pid):
                if process.pid not in known:
                    with suppress(ProcessLookupError):
                        self._watched[os.pidfd_open(process.pid)] = (model, process)

    def ended(self, seconds: float) -> set[str]:
        """Models of which a process has ended, waiting so long for one."""
        poll = select.poll()
        with self._lock:
            for descriptor in self._watched:
                poll.register(descriptor, select.POLLIN)
        found = set()
        for descriptor, _ in poll.poll(seconds * 1000):
            with self._lock:
                found.add(self._watched.pop(descriptor)[0])
            os.close(descriptor)
        return found

    def of(self, name: str) -> list[psutil.Process]:
        """Those of a model that live."""
        self.discover()
        with self._lock:
            return [process for model, process in self._watched.values() if model == name and _lives(process)]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._watched:
                os.close(descriptor)
            self._watched.clear()


def model_processes(pid: int) -> list[tuple[str, psutil.Process]]:
    """The python processes of the tritonserver `pid` that live, each with its model. Raises psutil.NoSuchProcess."""
    found = []
    for process in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            # Program, <repository>/<model>/<version>/<file>, …; nothing, or the server's, just before it is started.
            arguments = process.cmdline()
            if len(arguments) > 1 and Path(arguments[0]).name == STUB and process.status() != psutil.STATUS_ZOMBIE:
                found.append((Path(arguments[1]).parts[-3], process))
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
