"""Who may see what. Splits are by time, by item and by caption combination; all are seeded or dated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TRAIN_SHARE, VALID_SHARE = 0.8, 0.1
TRAIN, VALID, TEST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """What some rows of a log are for: `part` int8 [rows] (TRAIN, VALID, TEST, or −1: nothing); `history`, `fitted`,
    `hidden` bool [rows]: may later rows' profiles hold them, may anything be fitted on their labels, are their labels
    kept back."""

    part: np.ndarray
    history: np.ndarray
    fitted: np.ndarray
    hidden: np.ndarray


class Rows(Protocol):
    """A split, row by row."""

    def assign(self, start: int, time: np.ndarray) -> Assigned:
        """Of the rows from number `start` on, whose times are int64 [rows] microseconds."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two instants, in microseconds since the epoch: training < `valid_from` ≤ validation < `test_from` ≤ test.

    An item is *cold* when no interaction before `test_from` touches it and, where the data set has a cut of
    its own, when it was created after it.
    """

    valid_from: int
    test_from: int

    @classmethod
    def of(cls, record: Mapping[str, Any], timestamps: np.ndarray) -> Split:
        """The split of a data set: its own `train_until` if it names one, else by quantiles of time.

        Args:
            record: `dataset.json`.
            timestamps: int64 [rows], microseconds since the epoch, any order.
        """
        if "train_until" in record:
            test_from = int(datetime.fromisoformat(record["train_until"]).timestamp() * 1e6)
        else:
            test_from = int(np.quantile(timestamps, TRAIN_SHARE + VALID_SHARE))
        before = timestamps[timestamps < test_from]
        valid_from = int(np.quantile(before, TRAIN_SHARE / (TRAIN_SHARE + VALID_SHARE)))
        return cls(valid_from=valid_from, test_from=test_from)

    def assign(self, start: int, time: np.ndarray) -> Assigned:
        """By time; every row enters later profiles, and no label is hidden: whoever trains looks at its parts."""
        part = np.where(time < self.valid_from, TRAIN, np.where(time < self.test_from, VALID, TEST)).astype(np.int8)
        everything = np.ones(len(time), bool)
        return Assigned(part=part, history=everything, fitted=part != TEST, hidden=~everything)


def micros(column: pa.ChunkedArray) -> np.ndarray:
    """timestamp[us] column → int64 [rows]."""
    return np.asarray(column.cast(pa.int64()).to_numpy())


def training_items(
    items: pa.Table, interactions: pa.Table, record: Mapping[str, Any], split: Split | None, seed: int
) -> np.ndarray:
    """bool [items]: may the captioner be fitted on it?

    With a log (and its split): items that were shown before the test period, or created before the data
    set's own cut. Without one: a seeded 80 % of the items.
    """
    ids = items["item_id"].to_numpy()
    if split is None:
        return np.random.default_rng([seed, 7]).uniform(size=len(ids)) < TRAIN_SHARE
    shown = pc.unique(
        interactions.filter(pc.less(interactions["timestamp"].cast(pa.int64()), split.test_from))["item_id"]
    )
    seen = np.isin(ids, shown.to_numpy())
    if "train_until" in record:
        return seen | (micros(items["created_at"]) < split.test_from)
    return seen
