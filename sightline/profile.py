"""User history → token profiles: what the looks have that a user took better than usual, and worse than usual.

The profile is a user's *affinity* for every token of the items that they met. Event e, on an item that has token t in
the amount w_et, was taken with strength s_e, where m_e was to be expected: the user's mean strength so far and the mood
of the last events. With recency d_e = 2^(−age / half-life), age in the user's later events,

    affinity_t = Σ_e d_e · w_et · (s_e − m_e) / (Σ_e d_e · w_et + prior),

the mean surprise at token t, shrunk towards 0 where there is little evidence. A count of likes would tell what is
frequent; this tells what makes a difference. The mood is left out of it, and is a feature of its own, because users
take a whole session well or badly: without that, profiles of meaningless tokens predict, too (docs/log.md). Tokens of
positive affinity are one list, those of negative affinity another.

Streaming and point in time: a profile that is read before an event has seen only earlier events. `Affinities` goes on
from a user's state and reads it. The trainer calls it for all users of a log (`UserProfiles`), the server for users
whose states it keeps as bytes (sightline/events.py): the same events in the same order give the same bits.

A state as bytes, little-endian:

    header   "SLup" · layout u32 · crc u32 · tokens u32, their number n · events i64 · positives i64 ·
             sum of strengths f64 · mood f64 · unit f64
    tokens   i32 [n], in the order in which the user met them
    sums     f64 [2, n], surprise and amount, in units

`crc` is the CRC-32 of everything behind it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sightline.errors import ConfigError, DataError

__all__ = ["DENSE", "Affinities", "Profile", "ProfileConfig", "UserProfiles", "UserState"]

DENSE = ("log1p_events", "log1p_positives", "mean_strength", "mood")
_PRIOR_EVENTS = 10.0  # a user's mean strength leans on the prior as on this many events
_MOOD = 0.9  # what an event leaves of the mood before it
_RESCALE = 1e12
_SPARE = 16  # columns for tokens to come
_MAGIC, _LAYOUT = b"SLup", 1
_HEADER = struct.Struct("<4sIIIqqddd")
_PROTECTED = 12  # first byte that the CRC covers
_TOKEN_BYTES = 4 + 2 * 8


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """`length` tokens per list; an event's weight halves with every `half_life` later events of its user.

    `prior` is how much of a token (weight × recency, summed) it takes to believe half of its mean surprise;
    `prior_strength` the mean strength that a stranger is expected to have.
    """

    length: int = 24
    half_life: float = 400.0
    prior: float = 5.0
    prior_strength: float = -0.6

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"profile length is {self.length}; expected at least 1")
        if not self.half_life > 0:
            raise ConfigError(f"profile half-life is {self.half_life}; expected a positive number of events")
        if not self.prior > 0:
            raise ConfigError(f"profile prior is {self.prior}; expected an amount above 0")
        if not -1 <= self.prior_strength <= 1:
            raise ConfigError(f"profile prior strength is {self.prior_strength}; expected a number from -1 to 1")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Token lists int64 [length], strongest first, padded with 0; their weights FP32 [length], |affinity|, 0 for
    padding; dense FP32 [len(DENSE)].
    """

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]
    negative_tokens: NDArray[np.int64]
    negative_weights: NDArray[np.float32]
    dense: NDArray[np.float32]


@dataclass
class UserState:
    """What one user's profile is continued from; `UserState()` is a user who did nothing yet."""

    events: int = 0
    positives: int = 0
    strength: float = 0.0  # sum
    mood: float = 0.0  # how the last events were taken beside the mean
    # Weights grow by 2^(1/half_life) per event instead of decaying all older ones: same ratios, less work.
    unit: float = 1.0
    place: dict[int, int] = field(default_factory=dict)  # token → column
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_SPARE, np.int64))
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, _SPARE)))  # surprise and amount, in units
    read: Profile | None = None

    def to_bytes(self) -> bytes:
        """The layout is in the module's description."""
        known = len(self.place)
        header = _HEADER.pack(
            _MAGIC, _LAYOUT, 0, known, self.events, self.positives, self.strength, self.mood, self.unit
        )
        body = header + self.tokens[:known].astype("<i4").tobytes() + self.sums[:, :known].astype("<f8").tobytes()
        crc = zlib.crc32(memoryview(body)[_PROTECTED:])
        return body[: _PROTECTED - 4] + crc.to_bytes(4, "little") + body[_PROTECTED:]

    @classmethod
    def from_bytes(cls, state: bytes) -> Self:
        """Inverse of `to_bytes`, exact in every bit. Raises DataError for other bytes."""
        if len(state) < _HEADER.size:
            raise DataError(f"user state: expected a header of {_HEADER.size} bytes, got {len(state)} bytes")
        magic, layout, crc, known, events, positives, strength, mood, unit = _HEADER.unpack_from(state)
        for what, expected, got in (
            ("first bytes", _MAGIC, magic),
            ("layout", _LAYOUT, layout),
            ("size", _HEADER.size + known * _TOKEN_BYTES, len(state)),
            ("checksum", zlib.crc32(memoryview(state)[_PROTECTED:]), crc),
        ):
            if expected != got:
                raise DataError(f"user state: {what}: expected {expected!r}, got {got!r}")
        tokens, sums = np.zeros(known + _SPARE, np.int64), np.zeros((2, known + _SPARE))
        tokens[:known] = np.frombuffer(state, "<i4", known, _HEADER.size)
        sums[:, :known] = np.frombuffer(state, "<f8", 2 * known, _HEADER.size + 4 * known).reshape(2, known)
        place = {token: column for column, token in enumerate(tokens[:known].tolist())}
        return cls(events, positives, strength, mood, unit, place, tokens, sums)


class Affinities:
    """How a state goes on with an event, and what its profile is.

    Args:
        base: int64 [rows], the token that each row of the table counts as in profiles; 0: not part of any.
        amount: FP32 [rows], how much of it a row is (`TokenSpec.amounts_of` has both).
    """

    def __init__(self, config: ProfileConfig, base: NDArray[np.int64], amount: NDArray[np.float32]) -> None:
        self.config = config
        self._base, self._amount = base, amount.astype(np.float64)
        self._growth = 2 ** (1 / config.half_life)

    def observe(self, state: UserState, tokens: NDArray[np.int64], *, strength: float) -> None:
        """Add one event.

        Args:
            tokens: int64 [L], the shown item's token ids, padded with 0.
            strength: how the user took it, from −1 to 1. A binary label gives −1 and 1.
        """
        from_mean = strength - self._mean(state)
        surprise = from_mean - state.mood
        state.events += 1
        state.positives += strength > 0
        state.strength += strength
        state.mood = _MOOD * state.mood + (1 - _MOOD) * from_mean
        state.unit *= self._growth
        state.read = None
        base = self._base[tokens]
        rows = tokens[base > 0]
        if len(rows):
            at = self._columns(state, self._base[rows].tolist())
            amount = np.bincount(at, state.unit * self._amount[rows], len(state.tokens))
            state.sums += np.stack([amount * surprise, amount])
        if state.unit > _RESCALE:
            state.sums /= state.unit
            state.unit = 1.0

    @staticmethod
    def _columns(state: UserState, tokens: list[int]) -> NDArray[np.int64]:
        """Column of each token; new ones get the next."""
        place = state.place
        at = np.array([place.setdefault(token, len(place)) for token in tokens], np.int64)
        if len(place) > len(state.tokens):
            more = max(len(place), 2 * len(state.tokens)) - len(state.tokens)
            state.tokens, state.sums = np.pad(state.tokens, (0, more)), np.pad(state.sums, ((0, 0), (0, more)))
        state.tokens[at] = tokens
        return at

    def _mean(self, state: UserState) -> float:
        return (state.strength + _PRIOR_EVENTS * self.config.prior_strength) / (state.events + _PRIOR_EVENTS)

    def read(self, state: UserState) -> Profile:
        """The profile after the events so far; the same object until the next event.

        That of a user who did nothing yet has no tokens and the prior strength.
        """
        if state.read is None:
            known = len(state.place)
            surprise, amount = state.sums[:, :known]
            affinity = surprise / (amount + self.config.prior * state.unit)
            (tokens, weights), (negative_tokens, negative_weights) = (
                self._strongest(state.tokens[:known], sign * affinity) for sign in (1, -1)
            )
            state.read = Profile(
                tokens=tokens, weights=weights, negative_tokens=negative_tokens, negative_weights=negative_weights,
                dense=np.array(
                    [math.log1p(state.events), math.log1p(state.positives), self._mean(state), state.mood],
                    dtype=np.float32,
                ),
            )  # fmt: skip
        return state.read

    def _strongest(
        self, tokens: NDArray[np.int64], affinity: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `length` tokens of largest affinity above 0. Ties go to the smaller id, whatever the order of events."""
        length = self.config.length
        found, weights = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32)
        least = np.partition(affinity, -length)[-length] if len(affinity) > length else 0.0
        near = np.flatnonzero((affinity >= least) & (affinity > 0))
        best = near[np.lexsort((tokens[near], -affinity[near]))[:length]]
        found[: len(best)], weights[: len(best)] = tokens[best], affinity[best]
        return found, weights


class UserProfiles:
    """Profiles of all users, fed with events in time order.

    Args:
        config, base, amount: of `Affinities`.

    >>> profiles = UserProfiles(ProfileConfig(length=4, prior_strength=0.0), np.arange(10), np.ones(10))
    >>> profiles.observe(7, np.array([3, 5, 0]), strength=1.0)
    >>> profiles.observe(7, np.array([5, 8, 0]), strength=-1.0)
    >>> profiles.read(7).tokens, profiles.read(7).negative_tokens
    (array([3, 0, 0, 0]), array([8, 5, 0, 0]))
    """

    def __init__(self, config: ProfileConfig, base: NDArray[np.int64], amount: NDArray[np.float32]) -> None:
        self.config = config
        self._affinities = Affinities(config, base, amount)
        self._users: dict[int, UserState] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._users)

    def observe(self, user: int, tokens: NDArray[np.int64], *, strength: float) -> None:
        """Add one event of a user; see `Affinities.observe`."""
        state = self._users.get(user)
        if state is None:
            state = self._users[user] = UserState()
        self._affinities.observe(state, tokens, strength=strength)

    def read(self, user: int) -> Profile:
        """The profile after the events so far; an unknown user's is that of `UserState()`."""
        return self._affinities.read(self._users.get(user) or UserState())

    def dump(self, user: int) -> bytes:
        """The user's state, from which `restore` goes on; an unknown user's is that of `UserState()`."""
        return (self._users.get(user) or UserState()).to_bytes()

    def restore(self, user: int, state: bytes) -> None:
        """Go on from what `dump` gave. Raises DataError for other bytes."""
        self._users[user] = UserState.from_bytes(state)
