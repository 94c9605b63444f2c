"""The nearline worker: item event → caption at low priority → caption and item record in the store.

An event is done only when its record is durable, and writing a record again changes nothing: a worker may be killed at
any moment, and every item ends with one record. docs/nearline.md tells what happens to events that fail.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sightline.errors import ConfigError, DataError, ServingError, SightlineError, StoreError, TokenSpecError
from sightline.item_records import CaptionedItem, Captioner, Recorder, Reply, Unavailable
from sightline.metrics import Metrics
from sightline.queue import ItemQueue, Taken

__all__ = ["Worker", "WorkerConfig"]

T = TypeVar("T")
R = TypeVar("R")
_WAIT = 1.0  # seconds that an empty queue is waited for, and so what a stop may take beside the batch
_TELL = 5.0  # seconds between two looks at the queue's numbers

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One worker.

    Attributes:
        batch: events per request; one such batch is in flight, one more is fetched meanwhile.
        attempts: failures after which an event is given up.
        takes: after so many takings without an end it is given up, too: perhaps it is what kills its workers.
        backoff_seconds: after the first failure; doubles with each.
        longest_seconds: of one wait.
    """

    batch: int = 8
    attempts: int = 8
    takes: int = 50
    backoff_seconds: float = 1.0
    longest_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name}: expected a number above 0, got {value}")

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row: exponential, with jitter so that workers spread."""
        longest = min(self.backoff_seconds * 2.0 ** min(failures - 1, 60), self.longest_seconds)
        return random.uniform(longest / 2, longest)


class _Stopped(Exception):
    """The worker is asked to stop while it waits for something."""


class Worker:
    """Works on a queue until it is stopped; for one thread.

    Args:
        caption: media → answers; `serving.captioner.ServedCaptioner`, or any other.
        recorder: where captions go, under which version.
        tell: hears how each event ended: captioned, known (the server had the caption), retried, dead.
    """

    def __init__(
        self, queue: ItemQueue, caption: Captioner, recorder: Recorder, config: WorkerConfig | None = None, *,
        metrics: Metrics | None = None, tell: Callable[[str], object] = lambda result: None,
    ) -> None:  # fmt: skip
        self._queue, self._caption, self._recorder = queue, caption, recorder
        self._config = config or WorkerConfig()
        self._metrics, self._tell = metrics or Metrics(model="nearline"), tell
        self._held: dict[Any, Taken] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ended = threading.Event()

    def stop(self) -> None:
        """End after the batch in flight; safe in a signal handler."""
        self._stop.set()

    def run(self, *, until_empty: bool = False) -> None:
        """Until `stop`, or until nothing waits and nobody works; what was fetched and not begun goes back.

        Raises what neither waiting nor leaving out an event can mend, as ReleaseError: the events go back.
        """
        with ThreadPoolExecutor(2, thread_name_prefix="nearline") as pool:
            beating = pool.submit(self._beat)
            try:
                batch = self._take()
                while not self._stop.is_set() and not (until_empty and not batch and self._is_empty()):
                    fetched = pool.submit(self._take)
                    try:
                        self._work(batch)
                    finally:
                        batch = fetched.result()
            except _Stopped:
                pass
            finally:
                self._stop.set()
                self._ended.set()
                with suppress(StoreError):  # then they come back after the lease
                    for taken in list(self._held.values()):
                        self._queue.put_back(taken)
                beating.result()

    # --- a batch ------------------------------------------------------------------------------------------

    def _work(self, batch: list[Taken]) -> None:
        if not batch:
            return
        began = time.monotonic()
        fresh = []
        for taken in batch:
            if taken.note.takes > self._config.takes:
                last = f"; the last failure: {taken.note.reason}" if taken.note.reason else ""
                self._give_up(taken, f"taken {taken.note.takes - 1} times without an end{last}")
            else:
                fresh.append(taken)
        captioned: list[tuple[Taken, Reply]] = []
        for taken, reply in zip(fresh, self._each(self._ask, fresh), strict=True):
            if isinstance(reply, SightlineError):
                self._fail(taken, reply)
            elif reply.error:
                self._give_up(taken, reply.error)
            else:
                captioned.append((taken, reply))
        for (taken, reply), failure in zip(captioned, self._each(self._record, captioned), strict=True):
            if failure is not None:
                self._fail(taken, failure)
            else:
                self._patiently(partial(self._queue.done, taken))
                self._metrics.observe("sightline_nearline_lag_seconds", max(time.time() - taken.put_at, 0.0))
                self._end(taken, "known" if reply.known else "captioned")
        self._metrics.observe("sightline_nearline_batch_seconds", time.monotonic() - began)

    def _ask(self, batch: Sequence[Taken]) -> list[Reply]:
        return self._caption([taken.event.media for taken in batch])

    def _record(self, captioned: Sequence[tuple[Taken, Reply]]) -> list[None]:
        self._recorder.write([
            CaptionedItem(taken.event.item_id, taken.event.media_hash, reply.annotation) for taken, reply in captioned
        ])  # fmt: skip
        return [None] * len(captioned)

    def _each(self, act: Callable[[Sequence[T]], Sequence[R]], rows: Sequence[T]) -> Sequence[R | SightlineError]:
        """One result per row. Where a batch fails, its halves are tried, so that one row fails alone."""
        if not rows:
            return []
        try:
            return self._patiently(lambda: act(rows))
        except (ServingError, DataError, TokenSpecError) as error:
            if len(rows) == 1:
                return [error]
        half = len(rows) // 2
        return [*self._each(act, rows[:half]), *self._each(act, rows[half:])]

    def _patiently(self, act: Callable[[], R]) -> R:
        """Again and again while server, store or queue cannot be reached or have no room. Raises _Stopped."""
        failures = 0
        while True:
            try:
                return act()
            except (Unavailable, StoreError) as error:
                failures += 1
                delay = self._config.delay(failures)
                _log.warning("again in %.1f s: %s", delay, error)
                if self._stop.wait(delay):
                    raise _Stopped from error

    # --- how an event ends --------------------------------------------------------------------------------

    def _fail(self, taken: Taken, error: SightlineError) -> None:
        attempts = taken.note.attempts + 1
        if attempts >= self._config.attempts:
            self._give_up(taken, f"failed {attempts} times, at last: {error}")
            return
        delay = self._config.delay(attempts)
        _log.warning("%s: attempt %d, again in %.1f s: %s", taken.event.key, attempts, delay, error)
        self._patiently(lambda: self._queue.retry(taken, str(error), delay=delay))
        self._end(taken, "retried")

    def _give_up(self, taken: Taken, reason: str) -> None:
        _log.warning("%s: given up: %s", taken.event.key, reason)
        self._patiently(lambda: self._queue.dead(taken, reason))
        self._end(taken, "dead")

    def _end(self, taken: Taken, result: str) -> None:
        with self._lock:
            self._held.pop(taken.handle, None)
        self._metrics.count("sightline_nearline_items_total", result=result)
        self._tell(result)

    # --- beside it ----------------------------------------------------------------------------------------

    def _take(self) -> list[Taken]:
        """The next batch; empty where there is none, or the worker stops."""

        def take() -> list[Taken]:
            found = self._queue.take(self._config.batch, _WAIT)
            with self._lock:
                self._held |= {taken.handle: taken for taken in found}
            return found

        try:
            return [] if self._stop.is_set() else self._patiently(take)
        except _Stopped:
            return []

    def _is_empty(self) -> bool:
        stats = self._patiently(self._queue.stats)
        return stats.waiting == stats.taken == 0

    def _beat(self) -> None:
        """Signs of life for what this worker holds, and the queue's numbers."""
        told = 0.0
        while True:
            with suppress(StoreError):  # whoever waits for the queue says so
                with self._lock:
                    held = list(self._held.values())
                self._queue.renew(held)
                if time.monotonic() - told >= _TELL or not told:
                    stats, told = self._queue.stats(), time.monotonic()
                    self._metrics.set("sightline_nearline_queue_events", stats.waiting)
                    self._metrics.set("sightline_nearline_dead_events", stats.dead)
                    self._metrics.set("sightline_nearline_oldest_seconds", stats.oldest_seconds)
            if self._ended.wait(min(self._queue.bounds.lease_seconds / 4, _TELL)):
                return
