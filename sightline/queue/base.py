"""What both queues are: equal events collapse, a bound on what waits, leases, dead letters. See docs/nearline.md."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sightline.errors import ConfigError, DataError, StoreError

__all__ = ["Bounds", "DeadLetter", "ItemEvent", "ItemQueue", "Note", "Offer", "Stats", "Taken"]

_HASH = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"([0-9a-f]{64})-(\d{1,19})-(\d{1,19})")


@dataclass(frozen=True, kw_only=True)
class ItemEvent:
    """An item's media is there, or is new. Raises DataError for what cannot be an event."""

    item_id: int
    """0: not known; then only the caption is kept, by media hash."""
    media: bytes = field(repr=False)
    media_hash: str
    """SHA-256 in hexadecimal (`sightline.media.content_hash`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.item_id < 2**63 or not _HASH.fullmatch(self.media_hash):
            raise DataError(
                "event: expected an item id of at least 0 (0: not known) and the media's SHA-256 in lower-case "
                f"hexadecimal; got {self.item_id} and {self.media_hash!r}"
            )

    @property
    def key(self) -> str:
        """Equal for equal events: media hash, item, bytes."""
        return f"{self.media_hash}-{self.item_id}-{len(self.media)}"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a queue holds at most, taken events included, and how long a taker may be silent."""

    events: int = 10_000
    media_bytes: int = 1 << 30
    lease_seconds: float = 60.0
    """After so long without a sign of life, what a taker holds is given to others."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name}: expected a number above 0, got {value}")


class Offer(Enum):
    """What became of an event."""

    queued = "queued"
    known = "known"
    """An equal one waits, or is being worked on."""
    full = "full"


class Note(BaseModel):
    """What happened to an event so far; kept beside it as JSON."""

    model_config = ConfigDict(frozen=True)

    takes: int = 0
    """How often it was taken, also by takers that died."""
    attempts: int = 0
    """How often it failed."""
    reason: str = ""
    """Of the last failure."""
    at: float = 0.0
    """Of the last failure, seconds since 1970."""

    @classmethod
    def parse(cls, text: bytes, origin: str) -> Note:
        """Raises StoreError, which names `origin`."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(f"{origin}: expected the JSON of an event's history: {error}") from error

    def and_(self, **changes: Any) -> Note:
        return self.model_copy(update=changes)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """An event that this taker works on; it ends with `done`, `retry`, `put_back` or `dead`."""

    event: ItemEvent
    note: Note
    """This taking included."""
    put_at: float
    """Seconds since 1970."""
    handle: Any = field(repr=False, compare=False)
    """Of the queue, for itself."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """An event that was given up; the queue keeps its media."""

    key: str
    item_id: int
    media_hash: str
    media_bytes: int
    note: Note

    @classmethod
    def of(cls, key: str, note: Note) -> DeadLetter:
        digest, item, size = parse_key(key)
        return cls(key=key, item_id=item, media_hash=digest, media_bytes=size, note=note)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Events by state, and the age in seconds of the oldest that is neither done nor dead (0 where there is none)."""

    waiting: int
    taken: int
    dead: int
    media_bytes: int
    """Of waiting and taken events."""
    oldest_seconds: float


class ItemQueue(ABC):
    """Events that wait for a worker; any number of processes put and take.

    An event that `put` accepted is there until `done` or `dead`: what a taker holds that gives no sign of life for
    `Bounds.lease_seconds` is given to others, so that an event may be worked on twice and never not at all.

    Raises StoreError where the queue cannot be reached.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, event: ItemEvent) -> bool:
        """Queue it; False where an equal event waits or is being worked on, or the queue is full."""
        return self.offer(event) is Offer.queued

    @abstractmethod
    def offer(self, event: ItemEvent) -> Offer:
        """`put` that tells why not."""

    @abstractmethod
    def take(self, count: int, wait_seconds: float = 0.0) -> list[Taken]:
        """At most `count` events, the oldest first; waits until there is one, at most so long."""

    @abstractmethod
    def renew(self, taken: Sequence[Taken]) -> None:
        """A sign of life: this taker is still at work on these."""

    @abstractmethod
    def done(self, taken: Taken) -> None:
        """Its effect is durable: forget it. Nothing where another taker has it by now and finishes it again."""

    @abstractmethod
    def retry(self, taken: Taken, reason: str, *, delay: float = 0.0) -> None:
        """It failed: let it wait again, for at least `delay` seconds."""

    @abstractmethod
    def put_back(self, taken: Taken) -> None:
        """As if it had not been taken: for a worker that stops."""

    @abstractmethod
    def dead(self, taken: Taken, reason: str) -> None:
        """Give it up, and keep media and reason; replaces an older dead letter of an equal event."""

    @abstractmethod
    def stats(self) -> Stats:
        """How many there are."""

    @abstractmethod
    def dead_letters(self) -> list[DeadLetter]:
        """The oldest first."""

    @abstractmethod
    def revive(self, letter: DeadLetter) -> None:
        """Let a dead letter wait again, as if it were new, also in a full queue."""

    @abstractmethod
    def drop(self, letter: DeadLetter) -> None:
        """Remove a dead letter with its media."""

    @abstractmethod
    def mark(self, name: str) -> int:
        """What `set_mark` kept under a name, else 0."""

    @abstractmethod
    def set_mark(self, name: str, rows: int | None) -> None:
        """Keep how far something came; None forgets it."""

    @abstractmethod
    def close(self) -> None:
        """Release connections. Events that are still taken come back after the lease."""


def parse_key(key: str) -> tuple[str, int, int]:
    """Media hash, item and bytes of `ItemEvent.key`. Raises StoreError."""
    found = _KEY.fullmatch(key)
    if not found:
        raise StoreError(f"{key}: expected the name of an event, <media hash>-<item>-<bytes>; remove it")
    return found[1], int(found[2]), int(found[3])
