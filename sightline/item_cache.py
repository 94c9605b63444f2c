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

    Memory that no row was written to is not touched, so a large cache costs what it holds.
    """

    def __init__(self, rows: int, width: int) -> None:
        bits = max(1, int(np.ceil(np.log2(max(rows, WAYS) / WAYS))))
        self._shift = np.uint64(64 - bits)
        self._keys = np.full((1 << bits, WAYS), _FREE)
        self._next = np.zeros(1 << bits, np.uint8)
        self.values = np.zeros((WAYS << bits, width), np.float32)
        self.status = np.zeros(WAYS << bits, np.uint8)
        self.evicted = 0

    def __len__(self) -> int:
        return int((self._keys != _FREE).sum())

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of the ids int64 [N] in `values` and `status`, −1 where an id is not here."""
        sets = self._sets(ids)
        here = self._keys[sets] == ids[:, None]
        way = here.argmax(1)
        return np.where(here[np.arange(len(ids)), way], sets * WAYS + way, -1)

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
        self.values[place], self.status[place] = values[order], status[order]

    def drop(self, ids: NDArray[np.int64]) -> None:
        """Forget these ids; those that are not here do not matter."""
        place = self.find(ids)
        self._keys.reshape(-1)[place[place >= 0]] = _FREE

    def clear(self) -> None:
        """Forget all."""
        self._keys.fill(_FREE)

    def _sets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((ids.view(np.uint64) * _MIX) >> self._shift).astype(np.int64)
