"""A FAISS index of approximate search that stays as it is, while its items are hidden, shown and forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from sightline.gallery.base import GalleryVersion

__all__ = ["FrozenIndex", "Places", "build", "default_lists", "faiss", "nearest_lists"]

faiss: Any = _faiss  # whose type stubs lack much of it
_LOOSE = 1024  # ids beside the sorted ones before they are sorted in
_CONSTRUCTION = 80  # candidates while a graph is built (efConstruction)
_TRAINING = 64  # vectors per list that k-means is fitted on
_SHARE, _DEAD = 0.4, -0.5  # exponents of a graph's effort: of the share of all items, of its rows that are shown
_SPARE = 1.25  # rows that a graph with hidden ones is asked for, over what is needed on average

List = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Ids [B, K] and distances, ascending; −1 and inf where there are fewer."""


def build(version: GalleryVersion, vectors: NDArray[np.float32]) -> Any:
    """A FAISS index of approximate search over vectors [N, D], N ≥ 1."""
    if version.index == "hnsw":
        index = faiss.IndexHNSWFlat(version.dimension, version.links)
        index.hnsw.efConstruction = _CONSTRUCTION
    else:
        lists = default_lists(version, len(vectors))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(version.dimension), version.dimension, lists)
        index.cp.max_points_per_centroid = _TRAINING
        index.cp.min_points_per_centroid = 1
        index.train(vectors)
    index.add(vectors)
    return index


def default_lists(version: GalleryVersion, count: int) -> int:
    """Lists of an index of that many vectors."""
    return max(1, min(version.lists or round(4 * math.sqrt(count)), count // 40))


class Places:
    """id → row, vectorised: sorted arrays, 16 bytes per id, and a dictionary for the last ones."""

    def __init__(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """ids int64 [N], ascending; rows int64 [N], which are written to."""
        self._ids, self._rows = ids, rows
        self._loose: dict[int, int] = {}

    def get(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [N], −1 for unknown ids."""
        if not len(self._ids):
            rows = np.full(len(ids), -1, np.int64)
        else:
            at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            rows = np.where(self._ids[at] == ids, self._rows[at], -1)
        if self._loose:
            for place in np.flatnonzero(rows < 0):
                rows[place] = self._loose.get(int(ids[place]), -1)
        return rows

    def set(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Rows of ids; −1 forgets them."""
        known = np.zeros(len(ids), bool)
        if len(self._ids):
            at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            known = self._ids[at] == ids
            self._rows[at[known]] = rows[known]
        for identity, row in zip(ids[~known].tolist(), rows[~known].tolist(), strict=True):
            if row < 0:
                self._loose.pop(identity, None)
            else:
                self._loose[identity] = row
        if len(self._loose) > _LOOSE + len(self._ids) // 8:
            kept = self._rows >= 0
            every = np.concatenate([self._ids[kept], np.fromiter(self._loose.keys(), np.int64, len(self._loose))])
            places = np.concatenate([self._rows[kept], np.fromiter(self._loose.values(), np.int64, len(self._loose))])
            order = np.argsort(every)
            self._ids, self._rows, self._loose = every[order], places[order], {}


class FrozenIndex:
    """A FAISS index of approximate search, mapped from its file; its items can be hidden, shown and forgotten."""

    def __init__(
        self, index: Any, ids: NDArray[np.int64], order: NDArray[np.int64], shown: NDArray[np.bool_]
    ) -> None:
        """The index of N rows; ids int64 [N] of its rows, −1 for forgotten ones, and their order; bool [N]."""
        self.index, self.ids, self.shown = index, ids, shown
        self._places = Places(ids[order], order)
        self._mask()

    @staticmethod
    def map(path: Path, kind: str) -> Any:
        """The index in a file, read where a search needs it; all processes share these pages."""
        if kind == "hnsw":
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0  # which are slower than the page cache
        return index

    @property
    def dead(self) -> int:
        """Rows that are not shown."""
        return len(self.ids) - self.count

    def _mask(self) -> None:
        self._bits = np.packbits(self.shown, bitorder="little")
        self.count = int(self.shown.sum())

    def show(self, ids: NDArray[np.int64], shown: bool) -> NDArray[np.bool_]:
        """Show or hide items; bool [N], which of them are here."""
        rows = self._places.get(ids)
        self.shown[rows[rows >= 0]] = shown
        self._mask()
        return rows >= 0

    def forget(self, ids: NDArray[np.int64]) -> None:
        """Hide for good: these vectors are no longer theirs."""
        rows = self._places.get(ids)
        known, rows = ids[rows >= 0], rows[rows >= 0]
        self.shown[rows], self.ids[rows] = False, -1
        self._places.set(known, np.full(len(known), -1))
        self._mask()

    def search(self, queries: NDArray[np.float32], k: int, effort: int, share: float) -> List:
        """Nearest in a graph among those that are shown; `share` of all items that are searched are among them.

        A graph with fewer items needs less effort for its part of the nearest, one with hidden rows needs more.
        """
        alive = self.count / len(self.ids)
        effort = max(round(effort * share**_SHARE * alive**_DEAD), k)
        if not self.dead:
            return self._named(*self.index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=effort)))
        # Asking for some more and leaving out hidden rows is faster than having every row that is met looked up, which
        # is left for queries among many hidden ones.
        more = max(k, min(math.ceil(_SPARE * k / alive) + 2, len(self.ids)))
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, more))
        found, rows = self.index.search(queries, more, params=parameters)
        hidden = (rows < 0) | ~self.shown[rows]
        order = np.argsort(hidden, axis=1, kind="stable")[:, :k]
        distances, rows = np.take_along_axis(found, order, 1), np.take_along_axis(rows, order, 1)
        short = np.flatnonzero((~hidden).sum(1) < k)
        if len(short):
            masked = faiss.SearchParametersHNSW(sel=self._selector(), efSearch=effort)
            distances[short], rows[short] = self.index.search(queries[short], k, params=masked)
        return self._named(distances, rows)

    @cached_property
    def centroids(self) -> NDArray[np.float32]:
        """Of an inverted file's lists, [L, D]."""
        return np.asarray(self.index.quantizer.reconstruct_n(0, self.index.nlist), np.float32)

    def scan(self, queries: NDArray[np.float32], k: int, lists: NDArray[np.int64]) -> List:
        """Nearest among those that are shown in some lists [B, P] of an inverted file, −1 for none."""
        lists, coarse = np.ascontiguousarray(lists), np.zeros(lists.shape, np.float32)  # which flat codes do not use
        distances, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        parameters = faiss.SearchParametersIVF(sel=self._selector(), nprobe=lists.shape[1])
        pointer = faiss.swig_ptr
        self.index.search_preassigned_c(
            len(queries), pointer(queries), k, pointer(lists), pointer(coarse), pointer(distances), pointer(rows),
            False, parameters,
        )  # fmt: skip
        return self._named(distances, rows)

    def _selector(self) -> Any:
        return faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits)) if self.dead else None

    def _named(self, distances: NDArray[np.float32], rows: NDArray[np.int64]) -> List:
        missing = rows < 0
        if not missing.any():
            return self.ids[rows], distances
        return np.where(missing, -1, self.ids[rows]), np.where(missing, np.float32(np.inf), distances)


def nearest_lists(
    indices: Sequence[tuple[FrozenIndex, NDArray[np.float32]]], budget: int
) -> list[NDArray[np.int64]]:
    """The lists nearest to each query, of several inverted files together: rank merge of the centroids.

    Args:
        indices: indices with the same queries [B, D] in their spaces.
        budget: lists per query, over all indices.

    Returns:
        Per index its lists [B, P], in no particular order, then −1.
    """
    coarse = [faiss.pairwise_distances(queries, index.centroids) for index, queries in indices]
    every = np.concatenate(coarse, axis=1)
    budget = min(budget, every.shape[1])
    nearest = np.argpartition(every, budget - 1, axis=1)[:, :budget]
    found, first = [], 0
    for each in coarse:
        lists = nearest - first
        own = (lists >= 0) & (lists < each.shape[1])
        most = max(1, int(own.sum(1).max(initial=0)))  # FAISS takes no more columns than there are lists
        found.append(-np.sort(-np.where(own, lists, -1), axis=1)[:, :most])
        first += each.shape[1]
    return found
