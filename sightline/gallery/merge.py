"""Distance rank merge: every item at its own system's distance, one sort (arXiv 2301.03767, "distance rank merge")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sightline.errors import GalleryError
from sightline.gallery.base import Found

__all__ = ["own_distances", "rank_merge"]


def rank_merge(lists: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], k: int) -> Found:
    """Merge what each version's search found for a batch of queries.

    Args:
        lists: per version ids int64 [B, K_v] and distances float32 [B, K_v], ascending, −1 and inf where there are
            fewer; no item in two of them.
        k: length of the merged lists.

    Returns:
        The k nearest of all; of equal distances, the earlier version's and the earlier item of a list come first.
    """
    ids = np.concatenate([each for each, _ in lists], axis=1)
    distances = np.concatenate([each for _, each in lists], axis=1)
    places = np.repeat(np.arange(len(lists), dtype=np.int8), [each.shape[1] for each, _ in lists])
    if ids.shape[1] < k:
        fill = k - ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, fill)), constant_values=-1)
        distances = np.pad(distances, ((0, 0), (0, fill)), constant_values=np.inf)
        places = np.pad(places, (0, fill))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(ids, order, 1)
    return Found(found, np.take_along_axis(distances, order, 1), np.where(found < 0, np.int8(-1), places[order]))


def own_distances(distances: Sequence[NDArray[Any]], place: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Every item at its own system's distance: what `rank_merge` sorts, where whole rankings are evaluated.

    Args:
        distances: per version [B, N], of all queries to all items.
        place: [N], the version of each item, an index into `distances`.

    Returns:
        [B, N], of the distances' dtype.
    """
    if len(place) and (place.min() < 0 or place.max() >= len(distances)):
        raise GalleryError(f"place: expected 0 to {len(distances) - 1}, got {place.min()} to {place.max()}")
    merged = np.array(distances[0])
    for version, each in enumerate(distances[1:], 1):
        np.copyto(merged, each, where=place == version)
    return merged
