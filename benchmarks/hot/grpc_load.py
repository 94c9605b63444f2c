"""The load of `benchmarks.hot.load` through gRPC. For information: Python's client is much of what it sees."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from benchmarks.hot.load import GRACE, WARM, Window, arrivals, percentiles
from benchmarks.hot.wire import Request, tensors

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_MOST = 256  # requests on the way
# A server that was away is found within a second; by default a channel pauses up to two minutes between attempts.
_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]


class GrpcLoad:
    """Sends requests to `rank_items` at host:port, serialised beforehand."""

    def __init__(self, target: str, requests: Sequence[Request]) -> None:
        self._channel = grpc.insecure_channel(target, options=_RECONNECT)
        self._call = self._channel.unary_unary(_METHOD)  # bytes to bytes
        self.requests = [_message(request) for request in requests]
        self._turn = 0

    def close(self) -> None:
        self._channel.close()

    def alone(self, seconds: float, *, warm: int = 20) -> Window:
        """One request after the other."""
        latency, clock, cpu = list[float](), time.perf_counter, time.process_time()
        end = clock() + seconds
        while len(latency) < 2 * warm or clock() < end:
            start = clock()
            self._call(self._next())
            latency.append(clock() - start)
        cpu = time.process_time() - cpu
        p50, p95, p99 = percentiles(np.array(latency[warm:]))
        return Window(rate=0, requests=len(latency) - warm, failed=0, per_s=len(latency) / sum(latency), p50=p50,
                      p95=p95, p99=p99, client_cpu_us=cpu / len(latency) * 1e6, lag_us=0)  # fmt: skip

    def run(
        self, rate: float, seconds: float, *, warm: float = WARM, seed: int = 0, most: int = _MOST,
        timeout: float | None = None, each: Callable[[float, float, Any], None] = lambda due, took, error: None,
        ended: Callable[[], bool] = lambda: False,
    ) -> Window:  # fmt: skip
        """Open loop, as `Load.run`; ends early where more than `most` requests are on the way, or when `ended` says so.

        Args:
            timeout: seconds after which a request is given up.
            each: called by other threads with what came of a request: when it was due (`time.perf_counter`), the
                seconds since, and the error, None where there is none.
        """
        due = arrivals(rate, warm + seconds, seed)
        first = min(int(np.searchsorted(due, warm)), len(due) - 1)
        latency, lags, failed = np.full(len(due), math.inf), list[float](), [0]
        finished, clock, sent = threading.Semaphore(0), time.perf_counter, 0
        cpu, start = time.process_time(), clock() + 0.01
        done = 0
        for row, at in enumerate((due + start).tolist()):
            if (pause := at - clock()) > 0:
                time.sleep(pause)
            lags.append(clock() - at)

            def answered(call: Any, row: int = row, at: float = at) -> None:
                error = call.exception()
                if error is None:
                    latency[row] = clock() - at
                else:
                    failed[0] += row >= first
                each(at, clock() - at, error)
                finished.release()

            self._call.future(self._next(), timeout=timeout).add_done_callback(answered)
            sent += 1
            while finished.acquire(blocking=False):
                done += 1
            if sent - done > most or ended():
                break
        end = clock() + GRACE
        while done < sent and finished.acquire(timeout=max(0.0, end - clock())):
            done += 1
        cpu, took = time.process_time() - cpu, clock() - start
        p50, p95, p99 = percentiles(latency[first:])
        return Window(
            rate=rate, requests=len(due) - first, failed=failed[0], per_s=float(np.isfinite(latency).sum() / took),
            p50=p50, p95=p95, p99=p99, client_cpu_us=cpu / sent * 1e6, lag_us=float(np.percentile(lags, 99)) * 1e6,
        )  # fmt: skip

    def _next(self) -> bytes:
        self._turn += 1
        return self.requests[self._turn % len(self.requests)]


def _message(request: Request) -> bytes:
    message = service_pb2.ModelInferRequest(model_name="rank_items")
    for name, value in tensors(request).items():
        message.inputs.add(name=name, datatype="INT64", shape=value.shape)
        message.raw_input_contents.append(value.astype("<i8").tobytes())
    content: bytes = message.SerializeToString()
    return content
