"""User history → token profile: what the items that a user liked lately look like, as weighted token ids.

Streaming and point in time: a profile that is read before an event has seen only earlier events. Trainer and
server call the same two methods in the same order, so both get the same numbers.
"""

from __future__ import annotations

import heapq
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
    """`length` tokens; a positive item's weight halves with every `half_life` later positives."""

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
    """tokens int64 [length] padded with 0; weights FP32 [length], sum 1 or all 0; dense FP32 [len(DENSE)]."""

    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]
    dense: NDArray[np.float32]


@dataclass
class _User:
    events: int = 0
    positives: int = 0
    # Weights grow by 2^(1/half_life) per positive instead of decaying all older ones: same ratios, less work.
    unit: float = 1.0
    weight: dict[int, float] = field(default_factory=dict)
    top: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None


class UserProfiles:
    """Profiles of all users, fed with events in time order.

    `rows` are the token ids that profiles are made of (`TokenSpec.ids_of("word")`); others are passed over.

    >>> profiles = UserProfiles(ProfileConfig(length=4), range(1, 10))
    >>> profiles.observe(7, np.array([3, 5, 0]), positive=True)
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

    def observe(self, user: int, tokens: NDArray[np.int64], *, positive: bool) -> None:
        """Add one event.

        Args:
            user: its id.
            tokens: int64 [L], the shown item's token ids, padded with 0.
            positive: did the user like it? Only such items enter the profile's tokens.
        """
        state = self._users.setdefault(user, _User())
        state.events += 1
        if not positive:
            return
        state.positives += 1
        state.unit *= self._growth
        state.top = None
        for token in tokens.tolist():
            if token in self._rows:
                state.weight[token] = state.weight.get(token, 0.0) + state.unit
        if state.unit > _RESCALE:
            state.weight = {t: w / state.unit for t, w in state.weight.items()}
            state.unit = 1.0

    def read(self, user: int) -> Profile:
        """The profile after the events so far; the same arrays come back until the next positive event.

        An unknown user has no tokens and the prior rate.
        """
        state = self._users.get(user, _User())
        if state.top is None:
            state.top = self._top(state.weight)
        rate = (state.positives + _PRIOR_EVENTS * self.config.prior_rate) / (state.events + _PRIOR_EVENTS)
        dense = np.array([math.log1p(state.events), math.log1p(state.positives), rate], dtype=np.float32)
        return Profile(tokens=state.top[0], weights=state.top[1], dense=dense)

    def _top(self, weight: dict[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        tokens = np.zeros(self.config.length, dtype=np.int64)
        weights = np.zeros(self.config.length, dtype=np.float32)
        # Ties go to the smaller id, so that the result never depends on the order of insertion.
        best = heapq.nsmallest(self.config.length, ((-w, t) for t, w in weight.items()))
        if best:
            tokens[: len(best)] = [t for _, t in best]
            found = np.array([-w for w, _ in best])
            weights[: len(best)] = (found / found.sum()).astype(np.float32)
        return tokens, weights
