"""Interaction events → histories and profiles of users, as they happen.

A user's record (`UserRecord`) has its last events, its profile, and the state that the profile is continued from.
`apply` goes on from that state with the code that made profiles for training (`Affinities`), so a profile that grew
online is the one that the trainer would build from the same events in the same order, in every bit (docs/events.md).

An event is told apart by user, item and time, so that whoever is not sure whether it arrived can send it again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

import numpy as np

from sightline.errors import ConfigError, DataError, ReleaseError
from sightline.features import Versions
from sightline.profile import Affinities, UserState
from sightline.store import FeatureStore, ItemSchema, UserRecord, UserSchema
from sightline.tokens import TokenSpec

__all__ = ["Event", "EventRules", "Outcome", "apply"]

_log = logging.getLogger(__name__)


class Outcome(IntEnum):
    """What became of an event; the codes of the server's model `events`."""

    applied = 0
    duplicate = 1
    """Nothing, because it is among the user's last events already."""
    late = 2
    """Applied, but after later events: the trainer, which sorts by time, would get another profile."""
    damaged = 3
    """Nothing, because the user's state is none that can be continued."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A user met an item. `strength` is how they took it, −1 … 1 (FP32); `time` is in µs since 1970, UTC.

    Raises DataError for what is no event.
    """

    user_id: int
    item_id: int
    strength: float
    time: int

    def __post_init__(self) -> None:
        for name in ("user_id", "item_id"):
            if not 0 < getattr(self, name) < 2**63:
                raise DataError(f"{name}: expected an id above 0, got {getattr(self, name)}")
        if not -1 <= self.strength <= 1:
            raise DataError(f"strength: expected a number from -1 to 1, got {self.strength}")
        if not 0 <= self.time < 2**63:
            raise DataError(f"time: expected microseconds since 1970, got {self.time}")


@dataclass(frozen=True, kw_only=True, eq=False)
class EventRules:
    """How a release takes events."""

    versions: Versions
    affinities: Affinities

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From `ranker.json` and `token_spec.json`. Raises ReleaseError or TokenSpecError if they are not a pair."""
        versions, spec = Versions.read(folder), TokenSpec.load(folder / "token_spec.json")
        if spec.version != versions.users.token_spec:
            raise ReleaseError(
                f"{folder}: ranker.json was made with token spec {versions.users.token_spec}, "
                f"token_spec.json is {spec.version}"
            )
        counted = spec.amounts_of(spec.families[0].kind)
        return cls(versions=versions, affinities=Affinities(versions.profile, *counted))


def apply(
    store: FeatureStore, events: Sequence[Event], *, items: Sequence[str], users: str, affinities: Affinities
) -> list[Outcome]:
    """Add events to their users' records, each user atomically, on return durably.

    The events of a user are applied by time, those of one instant in the order given; beside what other calls have
    applied before, in the order of the calls. Items that the store does not know count as events without tokens.

    Args:
        items: versions of items to accept, the newest first, all of the users' token spec.
        users: the version of users.

    Returns:
        The outcome of each event.

    Raises:
        ConfigError: versions that do not fit together, or users without a history.
        StoreError: the store failed. Events of some users may have been applied: send all of them again.
    """
    schema = store.schema(UserSchema, users)
    _check(schema, [store.schema(ItemSchema, version) for version in items])
    if not events:
        return []
    tokens = store.read_items([event.item_id for event in events], items).tokens
    rows: dict[int, list[int]] = {}
    for row in sorted(range(len(events)), key=lambda row: events[row].time):
        rows.setdefault(events[row].user_id, []).append(row)
    outcomes = [Outcome.damaged] * len(events)

    def update(user: int, record: UserRecord | None) -> UserRecord | None:
        try:
            state = UserState() if record is None else UserState.from_bytes(record.state)
        except DataError as error:
            _log.warning("%s: user %d: %s; load it anew, or delete it", schema.space, user, error)
            return None
        met: deque[tuple[int, int]] = deque(maxlen=schema.history)  # item and time
        strengths: deque[float] = deque(maxlen=schema.history)
        if record is not None:
            met.extend(zip(record.items.tolist(), record.times.tolist(), strict=True))
            strengths.extend(record.strengths.tolist())
        newest = max((time for _, time in met), default=0)
        before = state.events
        for row in rows[user]:
            event = events[row]
            if (event.item_id, event.time) in met:
                outcomes[row] = Outcome.duplicate
                continue
            outcomes[row] = Outcome.late if event.time < newest else Outcome.applied
            newest = max(newest, event.time)
            strength = float(np.float32(event.strength))  # as histories and logs have it
            affinities.observe(state, tokens[row], strength=strength)
            met.append((event.item_id, event.time))
            strengths.append(strength)
        if state.events == before:
            return None
        kept, times = zip(*met, strict=True)
        return UserRecord(
            id=user, profile=affinities.read(state), state=state.to_bytes(), items=np.array(kept, np.int64),
            times=np.array(times, np.int64), strengths=np.array(strengths, np.float32),
        )  # fmt: skip

    store.update_users(users, list(rows), update)
    return outcomes


def _check(users: UserSchema, items: Sequence[ItemSchema]) -> None:
    if users.history < 1:
        raise ConfigError(f"{users.space}: expected a history of at least 1 event, by which repeated ones are known")
    for schema in items:
        if schema.token_spec != users.token_spec:
            raise ConfigError(
                f"{schema.space}: expected tokens of the spec {users.token_spec}, which the profiles of {users.space} "
                f"count; got {schema.token_spec}"
            )
