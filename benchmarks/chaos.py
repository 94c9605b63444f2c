"""Kill −9 of every part in turn, under load: what clients see, and how long until all is well again.

Question: does the item path keep answering while the captioner is dead; what do clients see of each other death; how
    long does each last?
Regime: `sightline serve` with everything that it brings back by itself, and a nearline worker, on one machine; the
    catalogue and the ranker of `make bench-hot`; `rank_items` with 500 items at a fixed rate, `rank_media` with images
    that nobody has captioned yet at a trickle, both in an open loop through gRPC with a time-out, without retries. The
    worker and Redis, which Sightline does not start, are started again here, as an init system would.
Method: per fault some seconds of load, the kill, load until the part does its job again, and some seconds more. A
    request belongs to the time before, during or after by when it was due; one that was on the way when the kill came
    belongs to the time during. Latencies are those of answers.
Claims that are held: no request of `rank_items` fails because a part of the captioner is dead, and a dead model
    answers again within 5 seconds.

    python -m benchmarks.chaos [--faults lookup triton]      the last line of stdout is JSON; exit code 1: a claim fell
"""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks.environment import describe
from benchmarks.hot import data
from benchmarks.hot.grpc_load import GrpcLoad
from benchmarks.hot.load import percentiles
from benchmarks.program import add_options, run, say
from benchmarks.redis_server import free_port, run_redis
from serving.probe import canary
from serving.supervisor import DEAD, example, model_processes
from sightline.errors import ConfigError, ServingError
from sightline.features import Versions
from sightline.media import content_hash
from sightline.queue import ItemEvent, open_queue
from sightline.store import open_store

MODELS = {"captioner": "caption", "decoder": "tensorrt_llm", "lookup": "lookup", "rank_items": "rank_items"}
"""Faults that are the death of a model's process."""
FAULTS = (*MODELS, "nearline", "triton", "redis")
CAPTIONING = ("captioner", "decoder")
REDIS_AWAY = 3.0  # seconds
_LONGEST = 120.0  # seconds in which everything should have recovered, on the slowest machine
_START_SECONDS = 300
_ROOT = Path(__file__).parents[1]
_SQUARE = 64  # pixels


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    faults: tuple[str, ...] = FAULTS
    rate: float = 100.0
    """Requests of `rank_items` per second."""
    trickle: float = 2.0
    """Requests of `rank_media` per second."""
    timeout: float = 10.0
    """Seconds that clients wait."""
    before: float = 8.0
    after: float = 8.0
    within: float = 5.0
    """Seconds in which a dead model has to be back."""
    items: int = 10_000
    users: int = 2000
    candidates: int = 500
    out: Path = Path("artifacts/bench/chaos")

    def __post_init__(self) -> None:
        if unknown := set(self.faults) - set(FAULTS):
            raise ConfigError(f"--faults: got {', '.join(sorted(unknown))}, expected some of {', '.join(FAULTS)}")
        for name in ("rate", "trickle", "timeout", "before", "after", "within"):
            if not 0.1 <= getattr(self, name) <= 10_000:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected 0.1 to 10000")


class Seen(NamedTuple):
    """What came of a request: when it was due (`time.perf_counter`), seconds since, and what was wrong."""

    due: float
    took: float
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Requests of one stretch of time. Milliseconds of those that were answered; NaN where none was."""

    requests: int
    failed: int
    p50: float
    p99: float

    @classmethod
    def of(cls, seen: Sequence[Seen]) -> Part:
        took = np.array([one.took for one in seen if one.error is None])
        p50, _, p99 = percentiles(took) if len(took) else (math.nan,) * 3
        return cls(requests=len(seen), failed=len(seen) - len(took), p50=round(p50, 2), p99=round(p99, 2))


@dataclass(frozen=True, kw_only=True)
class Impact:
    """What the clients of one model saw of a fault."""

    before: Part
    during: Part
    after: Part
    errors: dict[str, int]
    """By kind, over all three."""
    last_error_s: float
    """From the kill to the end of the last request that failed, 0 where none did."""

    @classmethod
    def of(cls, seen: Sequence[Seen], killed: float, recovered: float) -> Impact:
        """Sort requests by the times of the kill and the recovery."""
        parts: dict[str, list[Seen]] = {"before": [], "during": [], "after": []}
        for one in seen:
            name = "before" if one.due + one.took < killed else "during" if one.due < recovered else "after"
            parts[name].append(one)
        failed = [one for one in seen if one.error is not None]
        return cls(
            **{name: Part.of(part) for name, part in parts.items()},
            errors=dict(Counter(str(one.error) for one in failed).most_common()),
            last_error_s=round(max((one.due + one.took - killed for one in failed), default=0.0), 2),
        )

    @property
    def failed(self) -> int:
        return self.before.failed + self.during.failed + self.after.failed


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One fault."""

    fault: str
    recovery_s: float
    rank_items: Impact
    rank_media: Impact


def judge(outcomes: Sequence[Outcome], within: float) -> list[str]:
    """The claims that fell, one line each."""
    broken = []
    for one in outcomes:
        if one.fault in CAPTIONING and one.rank_items.failed:
            broken.append(
                f"{one.fault}: {one.rank_items.failed} requests of rank_items failed: {one.rank_items.errors}"
            )
        if one.fault in MODELS and one.recovery_s > within:
            broken.append(f"{one.fault}: back after {one.recovery_s:.1f} s, expected {within:g} s at most")
        if math.isinf(one.recovery_s):
            broken.append(f"{one.fault}: not back within {_LONGEST:.0f} s")
        for name, impact in (("rank_items", one.rank_items), ("rank_media", one.rank_media)):
            if impact.after.failed and one.fault != "triton":  # clients have yet to notice that it is back
                broken.append(f"{one.fault}: {impact.after.failed} requests of {name} failed after the recovery")
    return broken


def kind(error: Any) -> str:
    """A gRPC error without what differs from request to request.

    >>> from types import SimpleNamespace as Error
    >>> kind(Error(code=lambda: Error(name="INTERNAL"), details=lambda: "[request id: 7] Stub process 'a_0_1' died"))
    "INTERNAL: Stub process 'a' died"
    """
    text = re.sub(r"\[request id: [^]]*\] |in ensemble '\w+', ", "", error.details() or "")
    text = re.sub(r"(?:ipv[46]|unix):\S+", "the server", re.sub(r"_\d+_\d+\b", "", text))
    return f"{error.code().name}: {text.partition('; last error')[0][:90]}".rstrip(": ")


class Stack:
    """`sightline serve`, its worker and what clients need to know of them."""

    def __init__(self, release: Path, store: str, queue: str, log: Path) -> None:
        self.release, self.store, self.queue, self._log = release, store, queue, log
        self.url = f"127.0.0.1:{free_port()}"
        self._known = Versions.read(release / "model_repository" / "lookup" / "1")
        self._serve = self._run(
            "serve", "--releases", release.parent, "--release", release.name, "--store", store, "--queue", queue,
            "--grpc-port", self.url.rpartition(":")[2], "--http-port", 0, "--metrics-port", 0,
        )  # fmt: skip
        self._worker: subprocess.Popen[bytes] | None = None

    def await_start(self) -> None:
        """Raises ServingError when the server does not start."""
        until = time.monotonic() + _START_SECONDS
        while "Ctrl-C stops it" not in self._log.read_text(errors="replace"):
            if self._serve.poll() is not None or time.monotonic() > until:
                raise ServingError(f"sightline serve did not start; its log is {self._log}")
            time.sleep(0.2)

    def start_worker(self) -> None:
        self._worker = self._run(
            "nearline", "run", "--releases", self.release.parent, "--release", self.release.name, "--store", self.store,
            "--queue", self.queue, "--url", self.url,
        )  # fmt: skip

    def stop(self) -> None:
        for process in (self._worker, self._serve):
            if process:
                process.terminate()
        for process in (self._worker, self._serve):
            if process:
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    # --- deaths -------------------------------------------------------------------------------------------

    def kill_model(self, model: str) -> Callable[[], bool]:
        """One of its processes; returns whether the supervisor says that it is restored, and it answers."""
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        with triton.InferenceServerClient(self.url) as client:
            config = client.get_model_config(model).config
        said = re.compile(rf"^{model}: restored", re.MULTILINE)
        before = len(said.findall(self._log.read_text(errors="replace")))
        victim = next(process for name, process in model_processes(self._server().pid) if name == model)
        victim.kill()

        def is_back() -> bool:
            if len(said.findall(self._log.read_text(errors="replace"))) == before:
                return False
            with triton.InferenceServerClient(self.url) as client:
                try:
                    client.infer(model, example(config), client_timeout=5)
                except InferenceServerException as error:
                    return error.status() == "StatusCode.INVALID_ARGUMENT" and not DEAD.search(str(error))
            return True

        return is_back

    def kill_server(self) -> Callable[[], bool]:
        """Triton's process; returns whether another one ranks an image."""
        old = self._server().pid
        os.kill(old, signal.SIGKILL)

        def is_back() -> bool:
            try:
                return self._server().pid != old and canary(self.url, timeout=2) >= 0
            except ServingError:
                return False

        return is_back

    def kill_worker(self) -> Callable[[], bool]:
        """And start another; returns whether an event of this moment has its record in the store."""
        assert self._worker is not None
        self._worker.kill()
        self._worker.wait()
        media, item = picture(np.random.default_rng()), 1
        digest = content_hash(media)
        with open_queue(self.queue) as queue:
            queue.put(ItemEvent(item_id=item, media=media, media_hash=digest))
        self.start_worker()

        def is_back() -> bool:
            with open_store(self.store) as store:
                return store.read_captions(self._known.items.captioner, [digest]) != [None]

        return is_back

    def profile(self) -> Any:
        """What `lookup` knows of a user: nothing while the store is away."""
        import tritonclient.grpc as triton

        with triton.InferenceServerClient(self.url) as client:
            tensors = example(client.get_model_config("lookup").config)
            tensors[0].set_data_from_numpy(np.ones((1, 1), np.int64))
            return client.infer("lookup", tensors, client_timeout=5).as_numpy("PROFILE_TOKENS").tolist()

    def _server(self) -> psutil.Process:
        for process in psutil.Process(self._serve.pid).children():
            if process.status() != psutil.STATUS_ZOMBIE and "tritonserver" in process.name():
                return process
        raise ServingError("tritonserver is not there")

    def _run(self, *arguments: object) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sightline.cli", *map(str, arguments)]
        with self._log.open("ab") as log:
            return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


class Chaos:
    """One run."""

    def __init__(self, options: ChaosOptions) -> None:
        self.options = options

    def run(self) -> dict[str, Any]:
        o, record = self.options, describe()
        folder = o.out / "data" / f"{o.items}-{o.users}"
        data.prepare(folder, o.items, o.users, say)
        self._requests, self._release = data.requests(o.items, o.users, o.candidates), data.release(folder)
        for name in ("store", "queue", "redis"):
            shutil.rmtree(o.out / name, ignore_errors=True)
        outcomes = []
        if embedded := [fault for fault in o.faults if fault != "redis"]:
            with self._stack(str((o.out / "store").resolve()), "embedded.log") as stack:
                stack.start_worker()
                outcomes += [self._strike(fault, stack, self._killer(fault, stack)) for fault in embedded]
        if "redis" in o.faults:
            outcomes.append(self._redis())
        broken = judge(outcomes, o.within)
        say("\n" + table(outcomes))
        return {
            "benchmark": "chaos", "at": datetime.now().astimezone().isoformat(timespec="seconds"), **record,
            **asdict(o) | {"out": str(o.out)}, "outcomes": [asdict(one) for one in outcomes], "broken": broken,
        }  # fmt: skip

    def _killer(self, fault: str, stack: Stack) -> Callable[[], Callable[[], bool]]:
        if fault in MODELS:
            return lambda: stack.kill_model(MODELS[fault])
        return {"triton": stack.kill_server, "nearline": stack.kill_worker}[fault]

    def _redis(self) -> Outcome:
        with ExitStack() as redis:
            port, pid = redis.enter_context(run_redis(self.options.out / "redis"))
            with self._stack(f"redis://127.0.0.1:{port}/0", "redis.log") as stack:
                known = stack.profile()

                def kill() -> Callable[[], bool]:
                    os.kill(pid, signal.SIGKILL)
                    time.sleep(REDIS_AWAY)
                    redis.close()
                    redis.enter_context(run_redis(self.options.out / "redis", port=port))
                    return lambda: bool(stack.profile() == known)

                return self._strike("redis", stack, kill)

    @contextmanager
    def _stack(self, store: str, log: str) -> Iterator[Stack]:
        path = self.options.out / log
        path.unlink(missing_ok=True)
        stack = Stack(self._release, store, str((self.options.out / "queue").resolve()), path)
        try:
            say(f"starting the server with {store}; log: {path}")
            stack.await_start()
            yield stack
        finally:
            stack.stop()

    def _strike(self, fault: str, stack: Stack, kill: Callable[[], Callable[[], bool]]) -> Outcome:
        o = self.options
        with self._traffic(stack) as (items, media):
            time.sleep(o.before)
            killed = time.perf_counter()
            is_back = kill()
            while not (back := is_back()) and time.perf_counter() - killed < _LONGEST:
                time.sleep(0.05)
            recovered = time.perf_counter() if back else math.inf
            time.sleep(o.after)
        outcome = Outcome(
            fault=fault, recovery_s=round(recovered - killed, 2), rank_items=Impact.of(items, killed, recovered),
            rank_media=Impact.of(media, killed, recovered),
        )  # fmt: skip
        say(f"{fault}: back after {outcome.recovery_s:.1f} s; errors of rank_items {outcome.rank_items.errors}, "
            f"of rank_media {outcome.rank_media.errors}")  # fmt: skip
        return outcome

    @contextmanager
    def _traffic(self, stack: Stack) -> Iterator[tuple[list[Seen], list[Seen]]]:
        """Load until it is left, and what came of it, complete by then."""
        o, stop = self.options, threading.Event()
        seen: tuple[list[Seen], list[Seen]] = ([], [])
        loads = GrpcLoad(stack.url, self._requests), GrpcLoad(stack.url, [])
        rng = np.random.default_rng()
        loads[1].requests = [rank_media(picture(rng)) for _ in range(int(2 * o.trickle * _LONGEST))]

        def send(load: GrpcLoad, rate: float, into: list[Seen]) -> None:
            load.run(
                rate, _LONGEST + o.before + o.after, warm=0, seed=int(time.time()), most=10**6, timeout=o.timeout,
                each=lambda due, took, error: into.append(Seen(due, took, error and kind(error))), ended=stop.is_set,
            )  # fmt: skip

        threads = [
            threading.Thread(target=send, args=(load, rate, into), daemon=True)
            for load, rate, into in zip(loads, (o.rate, o.trickle), seen, strict=True)
        ]
        try:
            for thread in threads:
                thread.start()
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            for load in loads:
                load.close()


def picture(rng: np.random.Generator) -> bytes:
    """A PNG that nobody has seen."""
    buffer = io.BytesIO()
    blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((_SQUARE, _SQUARE), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def rank_media(media: bytes) -> bytes:
    """A serialised request of one image for a user."""
    message = service_pb2.ModelInferRequest(model_name="rank_media")
    numbers = {"USER_ID": [1], "ITEM_ID": [0], "CONTEXT": [0] * len(data.CONTEXT)}
    message.inputs.add(name="MEDIA", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(len(media).to_bytes(4, "little") + media)
    for name, value in numbers.items():
        message.inputs.add(name=name, datatype="INT64", shape=[1, len(value)])
        message.raw_input_contents.append(np.array(value, "<i8").tobytes())
    content: bytes = message.SerializeToString()
    return content


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: two rows per fault."""
    lines = [
        "| killed | back after | clients of | failed | last error | p50/p99 before, ms | during | after | errors |",
        "|---|--:|---|--:|--:|--:|--:|--:|---|",
    ]
    for one in outcomes:
        for name, impact in (("rank_items", one.rank_items), ("rank_media", one.rank_media)):
            parts = (impact.before, impact.during, impact.after)
            requests = sum(part.requests for part in parts)
            times = " | ".join(f"{part.p50:.1f} / {part.p99:.1f}".replace("nan / nan", "–") for part in parts)
            last = f"{impact.last_error_s:.1f} s" if impact.failed else ""
            errors = "; ".join(f"{count} × {error}" for error, count in impact.errors.items())
            lines.append(f"| {one.fault} | {one.recovery_s:.1f} s | {name} | {impact.failed} of {requests} | "
                         f"{last} | {times} | {errors} |")  # fmt: skip
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> ChaosOptions:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").partition("\n")[0])
    defaults = ChaosOptions()
    parser.add_argument("--faults", nargs="+", default=FAULTS, metavar="FAULT", help=", ".join(FAULTS))
    add_options(parser, defaults, {
        "rate": "requests of rank_items per second",
        "trickle": "requests of rank_media per second",
        "timeout": "seconds that clients wait",
        "before": "seconds of load before the kill",
        "after": "seconds of load after the recovery",
        "within": "seconds in which a dead model has to be back",
        "items": "in the catalogue",
        "users": "in the catalogue",
        "candidates": "items per request",
        "out": "folder for data, stores and logs",
    })  # fmt: skip
    given = vars(parser.parse_args(argv))
    return replace(defaults, **given | {"faults": tuple(given["faults"])})


def main(argv: Sequence[str] | None = None) -> int:
    return run("chaos", __doc__, Chaos(parse(argv)).run)


if __name__ == "__main__":
    sys.exit(main())
