"""Galleries for tests: two versions of generated vectors, and the answers by brute force."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightline.gallery import Found, GalleryVersion

OLD, NEW = GalleryVersion(name="v1", dimension=8), GalleryVersion(name="v2", dimension=12)


def unit(count: int, dimension: int, seed: int = 0) -> NDArray[np.float32]:
    """Clustered vectors [N, D] of length 1."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(20, dimension))
    vectors = centers[rng.integers(0, len(centers), count)] + rng.normal(size=(count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def brute_force(
    queries: list[NDArray[np.float32]], vectors: list[NDArray[np.float32]], ids: NDArray[np.int64],
    place: NDArray[np.int64], k: int,
) -> Found:  # fmt: skip
    """Every item at the distance of the version in which it is seen, float64; place −1 for items that are not."""
    distances = np.full((len(queries[0]), len(ids)), np.inf)
    for version, (query, array) in enumerate(zip(queries, vectors, strict=True)):
        own = ((query[:, None].astype(float) - array[None].astype(float)) ** 2).sum(2)
        distances = np.where(place == version, own, distances)
    if k > len(ids):
        distances = np.pad(distances, ((0, 0), (0, k - len(ids))), constant_values=np.inf)
        ids, place = np.pad(ids, (0, k - len(ids))), np.pad(place, (0, k - len(place)))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(distances, order, 1)
    there = np.isfinite(found)
    return Found(
        np.where(there, ids[order], -1), found.astype(np.float32), np.where(there, place[order], -1).astype(np.int8)
    )


def assert_same(found: Found, expected: Found) -> None:
    """Ids and versions exactly, distances to float32's precision; no item twice."""
    assert (found.ids.dtype, found.distances.dtype, found.version.dtype) == (np.int64, np.float32, np.int8)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.version, expected.version)
    np.testing.assert_allclose(found.distances, expected.distances, atol=2e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in found.ids)
