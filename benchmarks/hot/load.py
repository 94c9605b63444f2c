"""An open-loop load generator for any HTTP/1.1 server.

Requests are due at times that are fixed beforehand, as a Poisson process: users do not wait for each other's answers. A
latency runs from the time that the request was due, whether or not it could be sent then, so a server that falls
behind is charged for the queue that it causes (Schroeder, Wierman and Harchol-Balter 2006, "Open versus closed: a
cautionary tale"; leaving that queue out is known as coordinated omission).

One thread, prepared bytes, blocking sockets behind select(2), which waits to the microsecond, where epoll's time-outs
are whole milliseconds. Requests take the connections in turn. Connections are dealt evenly to the processes that accept
them: which of two workers gets more of them is chance, and would be measured instead of the server.
"""

from __future__ import annotations

import gc
import math
import re
import select
import socket
import struct
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from sightline.errors import ServingError

CONNECTIONS = 32
WARM = 0.3  # seconds before those that count
GRACE = 1.0  # seconds in which answers still count after the last request was due
LATE_SHARE = 0.01  # of the requests may be later than a limit on the 99th percentile
_CHECK = 0.02  # seconds between looks at how late the whole is
_DEALS = 16
_FEWEST = 10  # requests of a latency alone
_PATIENCE = 20  # seconds for a single answer
_RECOVERY = 2  # seconds in which a server that was overloaded may still refuse
_RECEIVE, _SEND_BUFFER = 1 << 18, 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Address = tuple[str, int]
Owners = Callable[[Sequence[int]], Sequence[int | None]]
"""Client ports of connections → process that accepted each, None where nobody did yet."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one stretch of load came to. Latencies in milliseconds, infinite where too few answers came."""

    rate: float
    """Requests per second that were due; 0: one after the other."""
    requests: int
    """Those that count; the warm-up does not."""
    failed: int
    """Answered with another status than 200, or cut off."""
    per_s: float
    """Answers per second, warm-up included."""
    p50: float
    p95: float
    p99: float
    client_cpu_us: float
    """The generator's own processor time per request."""
    lag_us: float
    """How much later than due requests left that did not have to wait for a connection, 99th percentile."""


def arrivals(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Times of a Poisson process in seconds, ascending, below `seconds`; at least one."""
    expected = rate * seconds
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(expected + 6 * math.sqrt(expected) + 10))
    due: NDArray[np.float64] = np.cumsum(gaps)
    return due[: max(1, int(np.searchsorted(due, seconds)))]


def percentiles(latency: NDArray[np.float64]) -> tuple[float, float, float]:
    """Seconds → p50, p95, p99 in milliseconds: of n, the ⌈q · n⌉-th smallest."""
    p50, p95, p99 = np.sort(latency)[[math.ceil(q * len(latency)) - 1 for q in (0.5, 0.95, 0.99)]] * 1e3
    return float(p50), float(p95), float(p99)


class Line:
    """A keep-alive connection with at most one request on the way. Raises OSError when it breaks."""

    __slots__ = ("_body", "_end", "_got", "request", "socket", "status")

    def __init__(self, address: Address) -> None:
        self.socket = socket.create_connection(address, timeout=_PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # Python's own time-outs make two system calls of every one.
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _PATIENCE, 0))
        self.request = -1

    def close(self) -> None:
        self.socket.close()

    def send(self, request: bytes) -> None:
        self._got, self._body, self._end, self.status = b"", 0, 0, 0
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Read what has come; True when the answer is complete."""
        part = self.socket.recv(_RECEIVE)
        if not part:
            raise ConnectionResetError("closed by the server")
        self._got += part
        if not self._body:
            head = self._got.find(b"\r\n\r\n")
            if head < 0:
                return False
            self.status, self._body = int(self._got[9:12]), head + 4
            if found := _LENGTH.search(self._got, 0, head + 2):
                self._end = self._body + int(found[1])
        return len(self._got) >= self._end if self._end else self._got.endswith(b"\r\n0\r\n\r\n")  # else: chunked

    def wait(self) -> None:
        """Read until the answer is complete."""
        while not self.receive():
            pass

    def ask(self, request: bytes) -> bytes:
        """Send, and wait for the answer's body. Raises ServingError unless its status is 200."""
        self.send(request)
        self.wait()
        body = self._got[self._body :]
        if self.status != 200:
            raise ServingError(f"expected an answer with status 200, got {self.status}: {body[-500:]!r}")
        return body if self._end else _unchunk(body)


class Load:
    """Sends prepared requests to a server, in turn.

    Args:
        address: host and port.
        requests: whole HTTP/1.1 requests.
        owners, acceptors: who accepted a connection, and how many processes do; by default nobody asks.
    """

    def __init__(
        self, address: Address, requests: Sequence[bytes], *, connections: int = CONNECTIONS,
        owners: Owners | None = None, acceptors: int = 1,
    ) -> None:  # fmt: skip
        self.address, self.requests, self.connections = address, requests, connections
        self._owners, self._acceptors = owners, acceptors
        self.sent = 0

    def run(
        self, rate: float, seconds: float, *, warm: float = WARM, seed: int = 0, limit: float = math.inf,
        grace: float = GRACE,
    ) -> Window:  # fmt: skip
        """Open loop: `rate` requests per second for `warm` seconds that do not count and `seconds` that do.

        With a limit in milliseconds it ends as soon as the 99th percentile can no longer be below it.

        Raises:
            ServingError: a request before the start was not answered with 200.
            OSError: the server does not take connections.
        """
        due = arrivals(rate, warm + seconds, seed)
        first = min(int(np.searchsorted(due, warm)), len(due) - 1)  # the first that counts
        allowed = int(LATE_SHARE * (len(due) - first)) if limit < math.inf else len(due)
        latency, failed, lags = np.full(len(due), math.inf), 0, list[float]()
        free, busy = deque(self._connect()), dict[int, Line]()
        sent = done = counted = late = 0
        blocked, check, clock = False, 0.0, time.perf_counter
        try:
            with _undisturbed():
                cpu, start = time.process_time(), clock() + 0.002
                times = (due + start).tolist()
                while done < len(times):
                    now = clock()
                    while sent < len(times) and times[sent] <= now and free:
                        line = self._send(free.popleft())
                        line.request = sent
                        busy[line.socket.fileno()] = line
                        now = clock()
                        if not blocked:
                            lags.append(now - times[sent])
                        sent += 1
                    waiting = sent < len(times) and times[sent] <= now
                    blocked = waiting or not free
                    sleep = times[sent] - now if sent < len(times) and free else _CHECK
                    for number in select.select(busy, (), (), max(0.0, min(sleep, _CHECK)))[0]:
                        line = busy[number]
                        request = line.request
                        try:
                            if not line.receive():
                                continue
                            free.append(line)
                        except OSError:
                            line.close()
                            line.status = 0
                            free.append(Line(self.address))
                        del busy[number]
                        took = clock() - times[request]
                        if line.status == 200:
                            latency[request] = took
                        done += 1
                        counted += request >= first
                        failed += request >= first and line.status != 200
                        late += request >= first and (took > limit / 1e3 or line.status != 200)
                    if (now := clock()) > check:
                        check = now + _CHECK
                        overdue = bisect_left(times, now - limit / 1e3) - first - counted
                        if now > times[-1] + grace or late + max(0, overdue) > allowed:
                            break
                cpu, took = time.process_time() - cpu, clock() - start
        finally:
            _close(chain(free, busy.values()))
        p50, p95, p99 = percentiles(latency[first:])
        return Window(
            rate=rate, requests=len(due) - first, failed=failed, per_s=float(np.isfinite(latency).sum() / took),
            p50=p50, p95=p95, p99=p99, client_cpu_us=cpu / sent * 1e6,
            lag_us=float(np.percentile(lags, 99)) * 1e6 if lags else math.inf,
        )  # fmt: skip

    def alone(self, seconds: float, *, warm: int = 20) -> Window:
        """One request after the other, on one connection; the first ones do not count."""
        latency, failed, clock = list[float](), 0, time.perf_counter
        with closing(Line(self.address)) as line, _undisturbed():
            cpu, end = time.process_time(), clock() + seconds
            while len(latency) < warm + _FEWEST or clock() < end:
                request, start = self._next(), clock()
                line.send(request)
                line.wait()
                latency.append(clock() - start)
                failed += line.status != 200
            cpu = time.process_time() - cpu
        p50, p95, p99 = percentiles(np.array(latency[warm:]))
        return Window(
            rate=0, requests=len(latency) - warm, failed=failed, per_s=len(latency) / sum(latency), p50=p50, p95=p95,
            p99=p99, client_cpu_us=cpu / len(latency) * 1e6, lag_us=0,
        )  # fmt: skip

    def saturate(self, seconds: float) -> float:
        """Answers per second while all connections are always busy."""
        return self.run(1e5, seconds, warm=0, grace=0).per_s

    def warm_up(self) -> None:
        """Every request twice, so that every process has seen most of them. Raises as `run` does."""
        lines = self._connect()
        try:
            for _ in range(0, 2 * len(self.requests), len(lines)):
                for line in lines:
                    line.send(self._next())
                for line in lines:
                    line.wait()
        finally:
            _close(lines)

    def _send(self, line: Line) -> Line:
        """Send the next request; on a new connection if the server has closed this one meanwhile."""
        content = self._next()
        try:
            line.send(content)
        except OSError:
            line.close()
            line = Line(self.address)
            line.send(content)
        return line

    def _next(self) -> bytes:
        self.sent += 1
        return self.requests[self.sent % len(self.requests)]

    def _connect(self) -> list[Line]:
        """New connections, each of which has answered a request; as many to one accepting process as to another."""
        if self._owners is None or self._acceptors == 1:
            return self._open()
        groups, share = defaultdict[int | None, list[Line]](list), max(1, self.connections // self._acceptors)
        dealt: list[Line] = []
        try:
            for _ in range(_DEALS):
                opened = self._open()
                ports = [line.socket.getsockname()[1] for line in opened]
                for owner, line in zip(self._owners(ports), opened, strict=True):
                    groups[owner].append(line)
                full = [group[:share] for group in groups.values() if len(group) >= share]
                if len(full) >= self._acceptors:
                    dealt = [line for turn in zip(*full, strict=True) for line in turn]
                    return dealt
        finally:
            _close(line for line in chain.from_iterable(groups.values()) if line not in dealt)
        found = ", ".join(f"{len(group)} by {owner}" for owner, group in groups.items())
        raise ServingError(f"{self.address}: expected {self._acceptors} processes to accept connections, got {found}")

    def _open(self) -> list[Line]:
        opened: list[Line] = []
        try:
            for _ in range(self.connections):
                opened.append(Line(self.address))
                opened[-1].send(self._next())
            until = time.monotonic() + _RECOVERY
            for line in opened:
                line.wait()
                while line.status != 200:
                    if time.monotonic() > until:
                        raise ServingError(f"{self.address}: expected answers with status 200, got {line.status}")
                    time.sleep(0.02)
                    line.send(self._next())
                    line.wait()
        except BaseException:
            _close(opened)
            raise
        return opened


def _close(lines: Iterable[Line]) -> None:
    for line in lines:
        line.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _unchunk(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)
