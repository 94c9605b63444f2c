"""Distance rank merge against plain sorting."""

from __future__ import annotations

import numpy as np
import pytest

from sightline.errors import GalleryError
from sightline.gallery.merge import own_distances, rank_merge


@pytest.mark.parametrize(("lengths", "k"), [((10, 10), 10), ((3, 8), 10), ((4,), 4), ((5, 0, 7), 6), ((2, 1), 9)])
def test_merge_is_one_sort(lengths: tuple[int, ...], k: int) -> None:
    rng = np.random.default_rng(sum(lengths) + k)
    lists = []
    for version, length in enumerate(lengths):
        ids = np.stack([rng.permutation(100)[:length] for _ in range(6)]) + 100 * version
        lists.append((ids, np.sort(rng.random((6, length)).astype(np.float32), 1)))
    found = rank_merge(lists, k)
    assert found.ids.shape == found.distances.shape == found.version.shape == (6, k)
    for row in range(6):
        pairs = sorted((distance, identity) for ids, distances in lists
                       for distance, identity in zip(distances[row], ids[row], strict=True))[:k]  # fmt: skip
        there = len(pairs)
        assert found.ids[row, :there].tolist() == [identity for _, identity in pairs]
        assert found.distances[row, :there].tolist() == [distance for distance, _ in pairs]
        assert found.version[row, :there].tolist() == [identity // 100 for _, identity in pairs]
        assert (found.ids[row, there:] == -1).all()
        assert (found.version[row, there:] == -1).all()
        assert np.isinf(found.distances[row, there:]).all()


def test_ties_and_short_lists() -> None:
    old = np.array([[7, 8, -1]]), np.array([[0.5, 0.5, np.inf]], np.float32)
    new = np.array([[3, -1, -1]]), np.array([[0.5, np.inf, np.inf]], np.float32)
    found = rank_merge([old, new], 4)
    assert found.ids.tolist() == [[7, 8, 3, -1]]
    assert found.version.tolist() == [[0, 0, 1, -1]]


def test_whole_rankings_are_those_of_the_merge() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.random((2, 5, 40)).astype(np.float32)
    place = rng.integers(0, 2, 40)
    merged = own_distances([old, new], place)
    assert merged.dtype == np.float32
    assert (merged == np.where(place == 1, new, old)).all()
    lists = []
    for version, distances in enumerate((old, new)):
        ids = np.flatnonzero(place == version)
        order = np.argsort(distances[:, ids], axis=1)
        lists.append((ids[order], np.take_along_axis(distances[:, ids], order, 1)))
    assert (rank_merge(lists, 40).ids == np.argsort(merged, axis=1)).all()
    with pytest.raises(GalleryError, match="place: expected 0 to 1, got 0 to 2"):
        own_distances([old, new], place * 2)
