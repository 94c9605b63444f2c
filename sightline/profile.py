"""User history → token profiles: what the items look like that a user lately liked, and those that they passed over.

Two weighted lists of token ids, positive and negative. An event's weight is its strength (how much the user liked or
disliked the item) times its recency. Streaming and point in time: a profile that is read before an event has seen only
earlier events. Trainer and server call the same two methods in the same order, so both get the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sightline.errors import ConfigError

__all__ = ["DENSE", "Profile", "ProfileConfig", "UserProfiles"]

DENSE = ("log1p_events", "log1p_positives", "positive_rate")
_PRIOR_EVENTS = 10.0  # the positive rate leans on the prior rate as on this many events
_RESCALE = 1e12


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """`length` tokens per side; a liked item's weight halves with every `half_life` later likes, a disliked one's
    with every `half_life` later dislikes.
    """

    length: int = 24
    half_life: float = 40.0
    prior_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"profile length is {self.length}; expected at least 1")
        if not self.half_life > 0:
            raise ConfigError(f"profile half-life is {self.half_life}; expected a positive number of events")
        if not 0 <= self.prior_rate <= 1:
            raise ConfigError(f"profile prior rate is {self.prior_rate}; expected a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Token lists int64 [length], heaviest first, padded with 0; their weights FP32 [length], sum 1 or all 0; dense
    FP32 [len(DENSE)].
    """

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]
    negative_tokens: NDArray[np.int64]
    negative_weights: NDArray[np.float32]
    dense: NDArray[np.float32]


@dataclass
class _Side:
    """One user's likes, or dislikes."""

    events: int = 0
    # Weights grow by 2^(1/half_life) per event instead of decaying all older ones: same ratios, less work.
    unit: float = 1.0
    weight: dict[int, float] = field(default_factory=dict)
    # The heaviest tokens, and those seen since they were found. All others stay lighter: weights only grow.
    leaders: set[int] = field(default_factory=set)
    top: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None

    def observe(self, tokens: NDArray[np.int64], rows: range, amount: float, growth: float) -> None:
        self.events += 1
        self.unit *= growth
        self.top = None
        for token in tokens.tolist():
            if token in rows:
                self.weight[token] = self.weight.get(token, 0.0) + self.unit * amount
                self.leaders.add(token)
        if self.unit > _RESCALE:
            self.weight = {t: w / self.unit for t, w in self.weight.items()}
            self.unit = 1.0

    def read(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self.top is None:
            tokens, weights = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32)
            # Ties go to the smaller id, so that the result never depends on the order of insertion.
            best = sorted((-self.weight[t], t) for t in self.leaders)[:length]
            self.leaders = {t for _, t in best}
            if best:
                tokens[: len(best)] = [t for _, t in best]
                found = np.array([-w for w, _ in best])
                weights[: len(best)] = (found / found.sum()).astype(np.float32)
            self.top = tokens, weights
        return self.top


@dataclass
class _User:
    events: int = 0
    positive: _Side = field(default_factory=_Side)
    negative: _Side = field(default_factory=_Side)


class UserProfiles:
    """Profiles of all users, fed with events in time order.

    `rows` are the token ids that profiles are made of (`TokenSpec.ids_of("word")`); others are passed over.

    >>> profiles = UserProfiles(ProfileConfig(length=4), range(1, 10))
    >>> profiles.observe(7, np.array([3, 5, 0]), strength=1.0)
    >>> profiles.read(7).tokens
    array([3, 5, 0, 0])
    """

    def __init__(self, config: ProfileConfig, rows: range) -> None:
        self.config = config
        self._rows = rows
        self._growth = 2 ** (1 / config.half_life)
        self._users: dict[int, _User] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._users)

    def observe(self, user: int, tokens: NDArray[np.int64], *, strength: float) -> None:
        """Add one event.

        Args:
            user: its id.
            tokens: int64 [L], the shown item's token ids, padded with 0.
            strength: how the user took it, any finite number: above 0 liked, below 0 disliked, 0 neither; its size
                is the item's weight beside others of the same age. A binary label gives +1 and −1.
        """
        state = self._users.setdefault(user, _User())
        state.events += 1
        if strength:
            side = state.positive if strength > 0 else state.negative
            side.observe(tokens, self._rows, abs(strength), self._growth)

    def read(self, user: int) -> Profile:
        """The profile after the events so far; a side's arrays are the same objects until its next event.

        An unknown user has no tokens and the prior rate.
        """
        state = self._users.get(user, _User())
        (tokens, weights), (negative_tokens, negative_weights) = (
            side.read(self.config.length) for side in (state.positive, state.negative)
        )
        positives = state.positive.events
        rate = (positives + _PRIOR_EVENTS * self.config.prior_rate) / (state.events + _PRIOR_EVENTS)
        return Profile(
            tokens=tokens, weights=weights, negative_tokens=negative_tokens, negative_weights=negative_weights,
            dense=np.array([math.log1p(state.events), math.log1p(positives), rate], dtype=np.float32),
        )  # fmt: skip
