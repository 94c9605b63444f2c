"""In which order a gallery is backfilled: permutations of its columns, int64 [G], the first is backfilled first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["descending", "random_orders", "spread"]


def random_orders(items: int, seeds: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """`random 0`, …: a permutation per seed."""
    return {f"random {seed}": np.random.default_rng([seed, 21]).permutation(items) for seed in seeds}


def descending(scores: NDArray[Any]) -> NDArray[np.int64]:
    """The highest score [G] first; of equal ones the earlier."""
    return np.argsort(-scores, kind="stable").astype(np.int64)


def spread(scores: NDArray[Any], clusters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each cluster's items by descending score, all clusters [G] at the same pace (ours).

    A query is helped most by its first few backfilled positives. An order that takes whole classes one after the other
    keeps the last ones' queries waiting, however well it knows which items are worst.
    """
    share = np.empty(len(scores))
    for one in np.unique(clusters):
        rows = np.flatnonzero(clusters == one)
        share[rows[descending(scores[rows])]] = (np.arange(len(rows)) + 0.5) / len(rows)
    return descending(-share)
