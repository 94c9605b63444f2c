"""A set-associative cache of rows by id, all of a batch at once.

An id may lie in any of the `WAYS` places of one set, which a hash of the id chooses; eight keys of 8 bytes are a cache
line. To find, insert and drop are a few array operations whatever the number of rows; nothing is ever moved, and the
memory is bounded. Only a set that is full gives up its places, in turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ItemCache"]

WAYS = 8
_FREE = np.iinfo(np.int64).min
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing (Knuth, TAOCP 3, section 6.4)


class ItemCache:
    """Rows FP32 [width] with a status each, for at least `rows` ids.

    Rows are dealt out in the order of their first use, so those in use lie together: few pages, which the processor's
    address cache can hold, and memory that no row was written to is not touched.
    """

    def __init__(self, rows: int, width: int) -> None:
        bits = max(1, int(np.ceil(np.log2(max(rows, WAYS) / WAYS))))
        self._shift = np.uint64(64 - bits)
        self._keys = np.full((1 << bits, WAYS), _FREE)
        self._row = np.full(WAYS << bits, -1, np.int32)  # of a place, once it has been used
        self._used = 0
        self._next = np.zeros(1 << bits, np.uint8)
        self.values = np.zeros((WAYS << bits, width), np.float32)
        self.status = np.zeros(WAYS << bits, np.uint8)
        self.evicted = 0

    def __len__(self) -> int:
        return int((self._keys != _FREE).sum())

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Rows of the ids int64 [N] in `values` and `status`, int32 [N]; −1 where an id is not here."""
        place, here = self._places(ids)
        row = self._row.take(place)
        row[~here] = -1
        return row

    def insert(self, ids: NDArray[np.int64], values: NDArray[np.float32], status: NDArray[np.uint8]) -> None:
        """Add rows of ids that are not here, each once: into free places of their sets, then in turn. Where more ids
        fall into a set than it has places, the last ones stay.
        """
        sets = self._sets(ids)
        order = np.argsort(sets, kind="stable")
        ids, sets = ids[order], sets[order]
        turn = np.arange(len(sets)) - np.searchsorted(sets, sets)  # number within its set
        waited = (np.arange(WAYS) - self._next[sets, None]) % WAYS
        ranked = np.argsort(waited + WAYS * (self._keys[sets] != _FREE), axis=1)
        way = ranked[np.arange(len(sets)), turn % WAYS]
        self.evicted += int((self._keys[sets, way] != _FREE).sum())
        self._keys[sets, way] = ids
        np.add.at(self._next, sets, 1)
        place = sets * WAYS + way
        new = np.unique(place[self._row[place] < 0])
        self._row[new] = np.arange(self._used, self._used + len(new))
        self._used += len(new)
        row = self._row[place]
        self.values[row], self.status[row] = values[order], status[order]

    def drop(self, ids: NDArray[np.int64]) -> None:
        """Forget these ids; those that are not here do not matter."""
        place, here = self._places(ids)
        self._keys.reshape(-1)[place[here]] = _FREE

    def clear(self) -> None:
        """Forget all."""
        self._keys.fill(_FREE)

    def _places(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each id would lie, int64 [N], and whether it does."""
        sets = self._sets(ids)
        place = sets * WAYS + (self._keys.take(sets, 0) == ids[:, None]).argmax(1)
        return place, self._keys.reshape(-1).take(place) == ids

    def _sets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((ids.view(np.uint64) * _MIX) >> self._shift).astype(np.int64)
