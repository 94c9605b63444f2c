"""Captions on the way: what every caption model does between a request and its captioning function.

A medium (its content hash) is one `Job`, and all who ask for it wait for the same one, from the look into the store
until its caption is kept there. So however many ask for a new medium at once, it is captioned once; between servers
that share a store, a lease per medium does the same. What is missing waits in two lines, interactive and nearline, and
leaves them in batches. Nobody waits longer than his deadline, and work that cannot be done by then is not begun.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from sightline.caption_jobs import Answer, Asker, Cancelled, DownstreamError, Job, Limits, Overloaded, Pace, Stage
from sightline.caption_store import CaptionStore
from sightline.metrics import Metrics

__all__ = ["CaptionFlight", "Captioning"]

Captioning = Callable[[Sequence[Job]], Awaitable[None]]
_log = logging.getLogger(__name__)


class CaptionFlight:
    """All captions that are on their way in one server. Lives in one event loop, in no thread beside it.

    Args:
        caption: captions jobs together, or raises DownstreamError; leaves out those that are not `wanted`.
        store: where captions are kept.
        limits: see there.
        metrics: gets the number of media that wait.
        queue: takes media for later, to be captioned when there is time; None: there is nothing that does.
    """

    GATHER: ClassVar[float] = 0.002
    """Seconds for which the first waits for others that arrive together with it."""
    LOOK: ClassVar[float] = 0.02
    """Seconds that the store has for its answer, also where there is no time for the model."""
    POLL: ClassVar[float] = 0.05
    """Seconds between two looks for a caption that another server makes."""

    def __init__(
        self, caption: Captioning, store: CaptionStore, limits: Limits, metrics: Metrics,
        queue: Callable[[str, bytes], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self._caption, self._store, self._limits, self._metrics, self._queue = caption, store, limits, metrics, queue
        self._jobs: dict[str, Job] = {}
        self._lines: dict[bool, deque[Job]] = {False: deque(), True: deque()}  # by job.nearline
        self._running: dict[Job, float] = {}  # first of a batch → when it began
        self._pace = Pace()
        self._dispatching: asyncio.TimerHandle | None = None
        self._swept = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Media that wait for the model."""
        return sum(map(len, self._lines.values()))

    async def answers(self, media: Mapping[str, bytes], asker: Asker) -> dict[str, Answer]:
        """One answer per content hash.

        Raises:
            Overloaded: the request can wait, but there is no room to wait in.
            DownstreamError: the request could have waited, but the model failed.
            Cancelled: work that had not begun was dropped because nobody waits for it.
        """
        # Finished, and about to be stored: as good as in the store.
        kept = {digest for digest in media if (job := self._jobs.get(digest)) and job.answer.done()}
        new = [Job(digest, data, nearline=asker.nearline, fresh=asker.fresh)
               for digest, data in media.items() if digest not in self._jobs]  # fmt: skip
        self._jobs |= {job.digest: job for job in new}
        jobs = [self._join(digest, asker) for digest in media]
        try:
            self._look([job for job in new if not job.fresh])
            patience = None if asker.deadline is None else max(asker.deadline, time.monotonic() + self.LOOK)
            await _until((job.looked_up for job in jobs), patience)
            refused = self._begin([job for job in jobs if job.stage is Stage.missing], asker)
            await _until((job.answer for job in jobs if job not in refused), asker.deadline)
            answers = {job.digest: self._answer(job, asker, refused.get(job, "deadline")) for job in jobs}
        finally:
            self._leave(jobs, asker)
        for digest in kept:
            if answers[digest].source == "model":
                answers[digest] = answers[digest]._replace(source="store")
        return answers

    async def close(self) -> None:
        """Drop what waits; let what is under way end, for some seconds."""
        for line in self._lines.values():
            while line:
                self._drop(line.popleft())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- one request --------------------------------------------------------------------------------------

    def _join(self, digest: str, asker: Asker) -> Job:
        job = self._jobs[digest]
        if job.nearline and not asker.nearline:
            if job.stage is Stage.waiting:
                self._lines[True].remove(job)
                self._lines[False].append(job)
            job.nearline = False
        job.askers.add(asker)
        return job

    def _look(self, jobs: list[Job]) -> None:
        """Into the store, for all new jobs of a request at once."""

        async def look() -> None:
            found, previous = await self._store.look([job.digest for job in jobs])
            for job in jobs:
                if job.digest in found:
                    job.found(found[job.digest])
                    self._forget(job)
                else:
                    job.stage, job.previous = Stage.missing, previous.get(job.digest)
                    if job.goes_on and not job.askers:
                        self._go_on(job)
                    self._forget_unless_begun(job)
                job.looked_up.set_result(None)

        if jobs:
            self._spawn(look())

    def _begin(self, jobs: list[Job], asker: Asker) -> dict[Job, str]:
        """Let jobs wait for the model, if that can end in time; otherwise all of them with the reason why not."""
        if not jobs:
            return {}
        estimate = self._estimate(len(jobs), asker.nearline)
        if asker.deadline is not None and time.monotonic() + estimate >= asker.deadline:
            return dict.fromkeys(jobs, "deadline")
        if self._room(asker.nearline) >= len(jobs):
            for job in jobs:
                self._wait(job)
            return {}
        if asker.deadline is None:
            raise Overloaded
        return dict.fromkeys(jobs, "queue_full")

    @staticmethod
    def _answer(job: Job, asker: Asker, late: str) -> Answer:
        """What the asker gets now; `late` says why, if that is nothing."""
        if not job.answer.done():
            return job.late(late)
        error = job.answer.exception()
        if error is None:
            return job.answer.result()
        if asker.deadline is not None and isinstance(error, DownstreamError):
            return job.late("captioner")
        raise error

    def _leave(self, jobs: list[Job], asker: Asker) -> None:
        without = [job for job in jobs if not job.answer.done() or job.answer.exception()]
        for job in jobs:
            job.askers.discard(asker)
        if without and asker.deadline is not None and not asker.cancelled():
            for job in without:
                self._later(job)
        for job in without:
            self._forget_unless_begun(job)

    def _later(self, job: Job) -> None:
        """Somebody was answered without its caption: see that the next one is not."""
        if self._queue is not None and not job.put_off and (job.stage is not Stage.running or job.answer.done()):
            job.put_off = True
            self._spawn(self._queue(job.digest, job.data))
        if not job.answer.done():
            job.goes_on = True
            if not job.askers:
                self._go_on(job)

    def _go_on(self, job: Job) -> None:
        """Nobody waits for it now: a nearline one, if there is room, unless it comes back through the queue."""
        if job.stage is Stage.waiting and not job.nearline:
            self._lines[False].remove(job)
            job.stage = Stage.missing
        elif job.stage is not Stage.missing or self._queue is not None:
            return
        if self._room(nearline=True) > 0:
            job.nearline = True
            self._wait(job)
        else:
            job.fail(Cancelled())

    # --- waiting for the model ----------------------------------------------------------------------------

    def _estimate(self, rows: int, nearline: bool) -> float:
        """Seconds until so many more rows had their captions."""
        now, limits = time.monotonic(), self._limits
        ahead = self.waiting if nearline else len(self._lines[False])
        own = self._pace.seconds(now, min(ahead + rows, limits.batch))
        turns = max(len(self._running) + (ahead + rows - 1) // limits.batch - limits.batches + 1, 0) / limits.batches
        if not turns:
            return own
        stuck = now - min(self._running.values(), default=now)
        return own + turns * max(self._pace.seconds(now, limits.batch), stuck)

    def _room(self, nearline: bool) -> int:
        """Rows that may still begin to wait."""
        room = self._limits.waiting - self.waiting
        if room < self._limits.batch and time.monotonic() > self._swept + 0.1:
            self._swept = time.monotonic()  # to ask whether a request was cancelled costs a message each
            for line in self._lines.values():
                for job in [job for job in line if not job.wanted]:
                    line.remove(job)
                    self._drop(job)
            room = self._limits.waiting - self.waiting
        return min(room, self._limits.waiting // 2 - len(self._lines[True])) if nearline else room

    def _wait(self, job: Job) -> None:
        job.stage = Stage.waiting
        self._lines[job.nearline].append(job)
        self._metrics.set("sightline_caption_queue_items", self.waiting)
        if self._dispatching is None:
            self._dispatching = asyncio.get_running_loop().call_later(self.GATHER, self._dispatch)

    def _dispatch(self) -> None:
        if self._dispatching is not None:
            self._dispatching.cancel()
            self._dispatching = None
        while batch := self._take():
            self._spawn(self._run(batch))
        self._metrics.set("sightline_caption_queue_items", self.waiting)

    def _take(self) -> list[Job]:
        """The next batch, if there is a place for it: of one line, and the last place is for interactive ones."""
        places = self._limits.batches - len(self._running)
        for nearline, line in self._lines.items():
            if places < 1 or (nearline and places == 1 and self._limits.batches > 1):
                continue
            batch: list[Job] = []
            while line and len(batch) < self._limits.batch:
                job = line.popleft()
                if job.wanted:
                    job.stage = Stage.running
                    batch.append(job)
                else:
                    self._drop(job)
            if batch:
                self._running[batch[0]] = time.monotonic()
                return batch
        return []

    # --- with the model -----------------------------------------------------------------------------------

    async def _run(self, batch: list[Job]) -> None:
        """Caption jobs together; those that another server has the lease of wait for that one."""
        ours: list[Job] = []
        renewing = asyncio.create_task(self._renew(ours))
        try:
            ours += await self._claim(batch)
            if ours:
                await self._caption(ours)
            for job in ours:
                if not job.answer.done():
                    self._drop(job)
        except DownstreamError as error:
            for job in ours:
                job.fail(error)
        except Exception as error:
            _log.exception("this is a bug: captioning failed")
            for job in ours or batch:
                job.fail(DownstreamError(f"caption: {type(error).__name__}: {error}"))
        finally:
            renewing.cancel()
            now, began = time.monotonic(), self._running.pop(batch[0])
            if any(job.answer.done() and not job.answer.exception() for job in ours):
                self._pace.add(now, len(ours), now - began)
            self._dispatch()
        await self._keep(ours)

    async def _claim(self, batch: list[Job]) -> list[Job]:
        """Jobs that are ours to caption."""
        claimed = await self._store.claim([job.digest for job in batch])
        # Again, because another server may have ended between the first look and the lease.
        found = await self._store.read([job.digest for job in batch if job.digest in claimed and not job.fresh])
        for job in batch:
            if job.digest in found:
                self._find(job, found[job.digest])
        if others := [job for job in batch if job.digest not in claimed]:
            self._spawn(self._follow(others))
        if found:
            self._spawn(self._store.unclaim(list(found)))
        return [job for job in batch if job.digest in claimed and job.digest not in found]

    async def _follow(self, jobs: list[Job]) -> None:
        """Wait for captions that another server makes; when it takes long, ask for the leases again."""
        for _ in range(round(1 / self.POLL)):
            await asyncio.sleep(self.POLL)
            found = await self._store.read([job.digest for job in jobs])
            for job in jobs:
                if job.digest in found:
                    self._find(job, found[job.digest])
            jobs = [job for job in jobs if job.digest not in found]
            if not jobs or not self._store.there:
                break
        for job in jobs:
            self._wait(job)

    async def _renew(self, jobs: list[Job]) -> None:
        while self._store.there:
            await asyncio.sleep(self._store.RENEW)
            await self._store.claim([job.digest for job in jobs if not job.answer.done()])

    async def _keep(self, jobs: list[Job]) -> None:
        """Store captions; until they are there, whoever asks gets them from here."""
        done = {job.digest: job.answer.result() for job in jobs if not job.answer.exception()}
        captions = {digest: answer.annotation for digest, answer in done.items() if answer.source == "model"}
        await self._store.write(captions)
        for job in jobs:
            self._forget(job)
        await self._store.unclaim([job.digest for job in jobs if job.digest not in captions])

    # --- ends ---------------------------------------------------------------------------------------------

    def _find(self, job: Job, annotation: str) -> None:
        job.found(annotation)
        self._forget(job)

    def _drop(self, job: Job) -> None:
        job.fail(Cancelled())
        self._forget(job)

    def _forget_unless_begun(self, job: Job) -> None:
        if job.stage is Stage.missing and not job.askers:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.digest) is job:
            del self._jobs[job.digest]

    def _spawn(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _until(futures: Iterable[asyncio.Future[Any]], deadline: float | None) -> None:
    """Wait for all, at most until the deadline."""
    waiting = [future for future in futures if not future.done()]
    if waiting:
        await asyncio.wait(waiting, timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
