"""A version's vectors as a search reads them: an index that stays as it is, and rows that come and go beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightline.gallery.base import GalleryVersion
from sightline.gallery.frozen import FrozenIndex, Places, faiss

__all__ = ["FlatRows", "VersionRows"]

class FlatRows:
    """Vectors in one dense array, searched one by one: exact. A removed row is replaced by the last one."""

    def __init__(self, ids: NDArray[np.int64], vectors: NDArray[np.float32], *, changed: int = 0) -> None:
        """ids int64 [N], ascending; vectors float32 [N, D]; both are written to (map them copy-on-write)."""
        self._ids, self._vectors, self.count = ids, vectors, len(ids)
        self.changed = changed
        """Rows that came or went since the last snapshot."""
        self._places = Places(ids.copy(), np.arange(len(ids)))

    def has(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[N], which of them are here."""
        return self._places.get(ids) >= 0

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append new ids [N] with their vectors [N, D]."""
        end = self.count + len(ids)
        if end > len(self._ids):
            room = max(end, self.count + self.count // 4, 256)
            identities = np.empty(room, np.int64)
            identities[: self.count] = self._ids[: self.count]
            self._ids = identities
            grown = np.empty((room, vectors.shape[1]), np.float32)
            grown[: self.count] = self._vectors[: self.count]
            self._vectors = grown
        self._ids[self.count : end], self._vectors[self.count : end] = ids, vectors
        self._places.set(ids, np.arange(self.count, end))
        self.count, self.changed = end, self.changed + len(ids)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Remove those of the ids [N] that are here."""
        rows = self._places.get(ids)
        gone, rows = ids[rows >= 0], rows[rows >= 0]
        self._places.set(gone, np.full(len(gone), -1))
        end = self.count - len(rows)
        holes = rows[rows < end]
        last = np.setdiff1d(np.arange(end, self.count), rows)  # of the rows behind the new end, those that stay
        self._ids[holes], self._vectors[holes] = self._ids[last], self._vectors[last]
        self._places.set(self._ids[holes], holes)
        self.count, self.changed = end, self.changed + len(rows)
        if end < len(self._ids) // 2:
            self._ids, self._vectors = self._ids[:end].copy(), self._vectors[:end].copy()

    def contents(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids [N] and vectors [N, D], in the order of rows; views."""
        return self._ids[: self.count], self._vectors[: self.count]

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Nearest ids and distances, at most k: [B, min(k, N)]."""
        k = min(k, self.count)
        if not k:
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
        distances, rows = faiss.knn(queries, self._vectors[: self.count], k)
        return self._ids[rows], distances


class VersionRows:
    """All items that queries see in one version: those of its frozen index, and fresh ones beside it."""

    def __init__(self, version: GalleryVersion, frozen: FrozenIndex | None, fresh: FlatRows) -> None:
        self.version, self.frozen, self.fresh = version, frozen, fresh

    @property
    def count(self) -> int:
        """Items that a search can find."""
        return self.fresh.count + (self.frozen.count if self.frozen else 0)

    def hide(self, ids: NDArray[np.int64]) -> None:
        """A search no longer finds these ids [N], here or not."""
        if self.frozen:
            self.frozen.show(ids, False)
        self.fresh.remove(ids)

    def forget(self, ids: NDArray[np.int64]) -> None:
        """Hide them for good."""
        if self.frozen:
            self.frozen.forget(ids)
        self.fresh.remove(ids)

    def show(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """A search finds these ids [N] again; returns those to be added with their vectors."""
        if self.frozen:
            ids = ids[~self.frozen.show(ids, True)]
        return ids[~self.fresh.has(ids)]

    def describe(self) -> dict[str, int]:
        """Rows: found by searches, in the index, of these hidden or forgotten, and beside it."""
        frozen = (len(self.frozen.ids), self.frozen.dead) if self.frozen else (0, 0)
        return {"found": self.count, "indexed": frozen[0], "dead": frozen[1], "fresh": self.fresh.count}
