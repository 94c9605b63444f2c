"""Where a query's positives rank in a gallery of which ever more items are in their new version.

What average precision and CMC need of a ranking is, per positive, how many items are at least as similar. For one query
there are two thresholds per positive p, its similarity in the old version and in the new one. Each item falls between
two of these thresholds in either version (one binary search) and changes its version at one step; so a histogram over
(place between thresholds, step), summed up along both axes, holds the counts of every state of the backfill at once.
That is 22 states for somewhat more than the price of one, and further orders cost a histogram each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sightline.errors import DataError

__all__ = ["POINTS", "Outcomes", "Relevance", "Side", "outcomes", "steps_of"]

POINTS = 22  # equally spaced fractions from 0 to 1 (FastFill's protocol)
BLOCK = 256  # queries whose similarities are in memory at once
Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One system: query vectors [Q, D] and gallery vectors [G, D], float32. The similarity of a pair is its inner
    product; with rows of length 1 an item's distance is 2 − 2 similarity, so both order items alike."""

    queries: Array
    gallery: Array

    def __post_init__(self) -> None:
        if self.queries.ndim != 2 or self.gallery.ndim != 2 or self.queries.shape[1] != self.gallery.shape[1]:
            raise DataError(
                f"a system's vectors: got {self.queries.shape} and {self.gallery.shape}, expected [Q, D] and [G, D]"
            )
        if not (np.isfinite(self.queries).all() and np.isfinite(self.gallery).all()):
            raise DataError("a system's vectors: expected finite numbers")


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """Which items each query should find: by equal labels, or by a matrix."""

    matrix: NDArray[np.bool_] | None = None
    """[Q, G]."""
    query_labels: NDArray[np.int64] | None = None
    gallery_labels: NDArray[np.int64] | None = None
    itself: NDArray[np.int64] | None = None
    """[Q]: the gallery's column that is the query itself and never counts, −1 for none."""

    def __post_init__(self) -> None:
        if (self.matrix is None) == (self.query_labels is None or self.gallery_labels is None):
            raise DataError("relevance: expected a matrix, or labels of the queries and of the gallery")
        if self.itself is not None and (
            self.itself.shape != self.shape[:1] or self.itself.max(initial=-1) >= self.shape[1]
        ):
            raise DataError(f"itself: expected [{self.shape[0]}] columns below {self.shape[1]}")

    @property
    def shape(self) -> tuple[int, int]:
        if self.matrix is not None:
            return self.matrix.shape[0], self.matrix.shape[1]
        assert self.query_labels is not None
        assert self.gallery_labels is not None
        return len(self.query_labels), len(self.gallery_labels)

    def row(self, query: int) -> NDArray[np.bool_]:
        """Relevant items of one query without itself, bool [G]."""
        if self.matrix is not None:
            found = self.matrix[query].copy()
        else:
            assert self.query_labels is not None
            assert self.gallery_labels is not None
            found = self.gallery_labels == self.query_labels[query]
        if self.itself is not None and self.itself[query] >= 0:
            found[self.itself[query]] = False
        return found


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What each query found at each state."""

    precision: Array
    """Average precision, float32 [Q', points]; ties share a place as in scikit-learn's average_precision_score."""
    before: NDArray[np.int32]
    """Negatives that are at least as similar as the best positive, int32 [Q', points]: CMC@k is `before < k`, so ties
    count against the query."""
    queries: NDArray[np.int64]
    """[Q']: those that have a positive."""


def steps_of(order: NDArray[np.int64], points: int = POINTS) -> NDArray[np.int64]:
    """State from which an item is in its new version, 1 to points − 1: state k has the first round(k G / (points − 1))
    items of `order`, a permutation of the gallery's columns."""
    count = len(order)
    if points < 2 or not np.array_equal(np.sort(order), np.arange(count)):
        raise DataError(f"an order: expected a permutation of the gallery's {count} columns, and 2 points or more")
    done = np.round(np.arange(points) * count / (points - 1)).astype(np.int64)
    steps = np.empty(count, np.int64)
    steps[order] = np.searchsorted(done, np.arange(count), side="right")
    return steps


def outcomes(
    old: Side, new: Side, relevance: Relevance, orders: Mapping[str, NDArray[np.int64]], points: int = POINTS
) -> dict[str, Outcomes]:
    """Average precision and CMC of every query at every state, per order (a permutation of the columns).

    An item that is not backfilled has its similarity in `old`, one that is has that in `new`; one sort over both.
    """
    queries, gallery = relevance.shape
    for side in (old, new):
        if (len(side.queries), len(side.gallery)) != (queries, gallery):
            raise DataError(
                f"got {len(side.queries)} queries and {len(side.gallery)} items, expected the relevance's "
                f"{queries} and {gallery}"
            )
    steps = [steps_of(order, points) for order in orders.values()]
    if any(len(step) != gallery for step in steps):
        raise DataError(f"an order: expected a permutation of all {gallery} columns")
    kept, precision, before = [], [], []
    for at in range(0, queries, BLOCK):
        rows = slice(at, min(at + BLOCK, queries))
        olds, news = old.queries[rows] @ old.gallery.T, new.queries[rows] @ new.gallery.T
        for query, one_old, one_new in zip(range(rows.start, rows.stop), olds, news, strict=True):
            relevant = np.flatnonzero(relevance.row(query))
            if len(relevant) == 0:
                continue
            itself = -1 if relevance.itself is None else int(relevance.itself[query])
            found = _one(one_old, one_new, relevant, itself, steps, points)
            kept.append(query)
            precision.append(found[0])
            before.append(found[1])
    if not kept:
        raise DataError("relevance: expected a query with a relevant item besides itself, found none")
    return {
        name: Outcomes(
            precision=np.array([one[i] for one in precision], np.float32),
            before=np.array([one[i] for one in before], np.int32), queries=np.array(kept),
        )
        for i, name in enumerate(orders)
    }  # fmt: skip


def _one(
    old: Array, new: Array, relevant: NDArray[np.int64], itself: int, steps: Sequence[NDArray[np.int64]], points: int
) -> tuple[Array, NDArray[np.int32]]:
    """One query: average precision and negatives before the first positive, both [orders, points]."""
    thresholds = np.concatenate([old[relevant], new[relevant]])
    order = np.argsort(thresholds)
    thresholds = thresholds[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    reached = [_reached(side, thresholds) for side in (old, new)]
    if itself >= 0:
        for one in reached:
            one[itself] = 0
    states = np.arange(points)
    precision, before = np.empty((len(steps), points), np.float32), np.empty((len(steps), points), np.int32)
    for i, step in enumerate(steps):
        own = step[relevant]
        items = _at_least(reached[0], reached[1], step, len(thresholds), points)
        positives = _at_least(reached[0][relevant], reached[1][relevant], own, len(thresholds), points)
        count = len(relevant)
        row = np.where(own[:, None] > states, place[:count, None], place[count:, None])  # its threshold in each state
        items, positives = items[row, states], positives[row, states]
        precision[i] = (positives / items).mean(0)
        before[i] = (items - positives).min(0)
    return precision, before


def _reached(similarities: Array, thresholds: Array) -> NDArray[np.int64]:
    """How many of the ascending thresholds each item reaches, int64 [G]. Sorting the items first is five times as fast
    as looking each of them up among the thresholds."""
    order = np.argsort(similarities)
    first = np.searchsorted(similarities[order], thresholds, side="left")  # the least similar item that reaches it
    found = np.empty(len(order), np.int64)
    found[order] = np.bincount(first, minlength=len(order) + 1)[:-1].cumsum()
    return found


def _at_least(
    old: NDArray[np.int64], new: NDArray[np.int64], step: NDArray[np.int64], thresholds: int, points: int
) -> NDArray[np.int64]:
    """[thresholds, points]: items in state k that reach threshold i, from how many each reaches in either version."""
    size = (thresholds + 1) * points
    change = np.bincount(new * points + step, minlength=size) - np.bincount(old * points + step, minlength=size)
    table = change.reshape(-1, points).cumsum(1)  # an item leaves its old place and comes to its new one at its step
    table += np.bincount(old, minlength=thresholds + 1)[:, None]
    return table[:0:-1].cumsum(0)[::-1]
