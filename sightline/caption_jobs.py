"""What captioning is about: media on the way to their captions (`Job`), who asks for them, how much at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, NamedTuple

import numpy as np

from sightline.errors import ConfigError

__all__ = ["Answer", "Asker", "Cancelled", "DownstreamError", "Job", "Limits", "Overloaded", "Pace", "Stage"]


class Answer(NamedTuple):
    """What one row gets."""

    annotation: str
    """Annotated caption (sightline/annotation.py)."""
    source: str
    """`store`, `model`, `previous` (none in time, but one of another captioner), `deadline` (none) or `rejected`."""
    error: str = ""
    """Why the medium was rejected."""
    degraded: str = ""
    """Why there is no caption of this captioner in time: `deadline`, `queue_full` or `captioner`."""


class DownstreamError(Exception):
    """A model behind the caption model failed: neither the caller's fault nor that of one row's media."""

    def __init__(self, message: str, *, unavailable: bool = False) -> None:
        super().__init__(message)
        self.unavailable = unavailable


class Overloaded(Exception):
    """More rows wait for the model than may wait."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is captioned at a time, and how much may wait for that."""

    batch: int
    """Media that are captioned together."""
    batches: int = 2
    """Batches at a time: one is decoded from its files while another is with the language model."""
    waiting: int = 256
    """Media that may wait for the model; nearline ones fill half of it at most."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Asker:
    """One request: how long it can wait, and how it can be told that nobody waits for it any more."""

    deadline: float | None = None
    """Time of the event loop's clock (`time.monotonic`); None: it waits as long as it takes."""
    nearline: bool = False
    fresh: bool = False
    """Not content with a stored caption."""
    cancelled: Callable[[], bool] = lambda: False


class Stage(Enum):
    looking = auto()
    """Nobody knows yet whether the store has it."""
    missing = auto()
    """The store has nothing; whether it is worth captioning depends on who asks."""
    waiting = auto()
    running = auto()
    """Here, or at a server that has the lease."""


class Job:
    """One medium on the way to its caption. A captioning function calls `caption`, `reject` or `fail` once."""

    def __init__(self, digest: str, data: bytes, *, nearline: bool, fresh: bool = False) -> None:
        self.digest, self.data, self.nearline, self.fresh = digest, data, nearline, fresh
        self.stage = Stage.missing if fresh else Stage.looking
        self.previous: str | None = None  # what another captioner said of it
        self.put_off = False  # it is in the nearline queue
        self.goes_on = False  # somebody was answered without it: its caption is for the next one
        self.askers: set[Asker] = set()
        loop = asyncio.get_running_loop()
        self.looked_up: asyncio.Future[None] = loop.create_future()
        if fresh:
            self.looked_up.set_result(None)
        self.answer: asyncio.Future[Answer] = loop.create_future()

    @property
    def wanted(self) -> bool:
        """Somebody waits for it, or will. A captioning function asks before every step that costs."""
        return self.goes_on or any(not asker.cancelled() for asker in self.askers)

    def caption(self, annotation: str) -> None:
        """It has its annotated caption."""
        self._settle(Answer(annotation, "model"))

    def late(self, why: str) -> Answer:
        """What there is where its caption is not there in time."""
        if self.previous is not None:
            return Answer(self.previous, "previous", degraded=why)
        return Answer("", "deadline", degraded=why)

    def reject(self, reason: str) -> None:
        """It cannot be used."""
        self._settle(Answer("", "rejected", reason))

    def fail(self, error: Exception) -> None:
        """It has no caption, through no fault of its own."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # perhaps nobody waits: asyncio would complain

    def found(self, annotation: str) -> None:
        """Somebody else captioned it."""
        self._settle(Answer(annotation, "store"))

    def _settle(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class Pace:
    """How long the model takes for a batch, from the batches that ended lately.

    What is older than `MEMORY` is forgotten: after a slow time somebody has to try again.
    """

    QUANTILE: ClassVar[float] = 0.9
    MEMORY: ClassVar[float] = 30.0
    """Seconds."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int, float]] = deque(maxlen=64)

    def add(self, now: float, rows: int, seconds: float) -> None:
        """A batch of that many rows ended."""
        self._ended.append((now, rows, seconds))

    def seconds(self, now: float, rows: int) -> float:
        """For a batch of that many rows; 0 where nothing is known, so that it is tried."""
        like = [took for at, size, took in self._ended if at > now - self.MEMORY and size <= 2 * rows]
        return float(np.quantile(like, self.QUANTILE)) if like else 0.0
