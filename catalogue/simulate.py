"""A logged-impression simulator whose best possible AUC is known.

A user u opens sessions of `SLATE` positions; position k shows item i at time t. The click probability is

    p = sigmoid(b + u_u + taste · ⟨θ_u, Σ_slot w_slot v_{slot, value(i)}⟩ + q_i + h_u · day(t) − ρ · ln(1 + k))

with θ_u ~ N(0, I_r) the latent taste, v ~ N(0, I_r) a vector per attribute value, u_u a user's readiness to
click, q_i what is good about an item and cannot be seen, h_u · day(t) a daily rhythm and ρ the position
bias. The label is a Bernoulli draw from p. Everything but the draw is known to the oracle, so the AUC of p
against the labels is Bayes-optimal: no ranker can expect to beat it on this log.

Exposure: half of the slots go to items drawn by a Zipf-like popularity, half to recent arrivals, so that new
items are seen. No item is shown before it was created.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa

from catalogue.attributes import SLOTS, Attributes

SLATE = 10
SLOT_WEIGHTS = {
    "object": 1.0, "colour": 0.9, "pattern": 0.7, "setting": 0.7, "size": 0.4, "count": 0.4, "motion": 0.6,
}  # fmt: skip
SECOND = 1_000_000  # timestamps are in microseconds
DAY = 86_400 * SECOND


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Size and strength of the simulated log; logit units for all effects."""

    users: int
    sessions_per_user: int
    start: datetime
    days: int
    rank: int = 6
    base: float = -1.2
    taste: float = 1.5
    user_bias: float = 0.5
    item_quality: float = 0.25
    rhythm: float = 0.3
    position_bias: float = 0.35
    recent_share: float = 0.5


def simulate_log(
    items: Sequence[Attributes], created_at: np.ndarray, config: LogConfig, seed: int
) -> tuple[pa.Table, np.ndarray]:
    """Impressions of items (item_id = 1 + index) in time order.

    Args:
        items: the attributes of every item.
        created_at: int64 [n_items], microseconds since the epoch, ascending.
        config: see `LogConfig`.
        seed: of the users and of every draw.

    Returns:
        The interactions table and float64 [rows] true click probabilities, row-aligned.
    """
    rng = np.random.default_rng([seed, 2])
    content = _taste_vectors(items, config.rank, rng)
    n_rows = config.users * config.sessions_per_user * SLATE

    users = np.repeat(np.arange(config.users), config.sessions_per_user)
    start = int(config.start.timestamp()) * SECOND
    session_start = start + rng.integers(0, config.days * DAY, len(users))
    order = np.argsort(session_start, kind="stable")
    user = np.repeat(users[order], SLATE)
    position = np.tile(np.arange(SLATE), len(users))
    time = np.repeat(session_start[order], SLATE) + position * SECOND

    item = _exposed(created_at, time, config.recent_share, rng)

    theta = rng.normal(size=(config.users, config.rank))
    affinity = np.einsum("nr,nr->n", theta[user], content[item]) / np.sqrt(config.rank)
    day = 2 * np.pi * (time % DAY) / DAY
    logit = (
        config.base
        + rng.normal(0, config.user_bias, config.users)[user]
        + config.taste * affinity
        + rng.normal(0, config.item_quality, len(items))[item]
        + rng.normal(0, config.rhythm, config.users)[user] * np.sin(day)
        - config.position_bias * np.log1p(position)
    )
    probability = 1 / (1 + np.exp(-logit))
    label = rng.uniform(size=n_rows) < probability

    order = np.argsort(time, kind="stable")
    table = pa.table(
        {
            "user_id": pa.array(user[order] + 1, pa.int64()),
            "item_id": pa.array(item[order] + 1, pa.int64()),
            "timestamp": pa.array(time[order], pa.timestamp("us", tz="UTC")),
            "label": pa.array(label[order].astype(np.float32)),
            "context_hour": pa.array((time[order] % DAY // (DAY // 24)).astype(np.int32)),
            "context_position": pa.array(position[order].astype(np.int32)),
        }
    )
    return table, probability[order]


def _taste_vectors(items: Sequence[Attributes], rank: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [n_items, rank], each column with mean 0 and standard deviation 1 over the catalogue."""
    value = {(slot, name): rng.normal(size=rank) for slot in SLOTS for name in SLOTS[slot]}
    content = np.array([sum(SLOT_WEIGHTS[s] * value[s, v] for s, v in item.slots()) for item in items])
    return np.asarray((content - content.mean(0)) / content.std(0))


def _exposed(
    created_at: np.ndarray, time: np.ndarray, recent_share: float, rng: np.random.Generator
) -> np.ndarray:
    """The item shown in each slot: int64 [rows], by popularity or by recency among the items that exist."""
    n_items = len(created_at)
    alive = np.searchsorted(created_at, time, side="right")  # items [0, alive) exist
    weight = np.cumsum(1 / rng.permutation(np.arange(1, n_items + 1)) ** 0.6)
    popular = np.searchsorted(weight, rng.uniform(size=len(time)) * weight[alive - 1], side="right")
    recent = alive - 1 - (rng.uniform(size=len(time)) ** 2 * np.minimum(alive, n_items // 8)).astype(np.int64)
    return np.where(rng.uniform(size=len(time)) < recent_share, recent, np.minimum(popular, alive - 1))
