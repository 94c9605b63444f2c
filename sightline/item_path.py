"""One user and many item ids → scores, in one process: lookup → embed → score without a hop between them.

What an item looks like to the ranker does not depend on the user, so it is computed once, by `items.onnx`, and kept
until the store says that the item has changed. What is left for a request is the user's record, a gather of N rows,
and `rank.onnx` (trainer/item_graphs.py).

    item ids ─► cache ──hit──────────────────────────────► ITEM_FEATURES ┐
                  └─miss─► store: tokens ─► items.onnx ─► cache ──┘      ├─ rank.onnx ─► SCORES
    user id ──► store: profile, index ───────────────────────────────────┘

Every request begins with the store's log of changes, so an answer is never older than the store was then (Redis: than
`FeatureStore.poll_seconds` ago).
"""

from __future__ import annotations

import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sightline.errors import StoreError
from sightline.item_cache import ItemCache
from sightline.lookup import Complaint, Lookup, tensors
from sightline.store import FeatureStore, Status

__all__ = ["MAX_ITEMS", "STAGES", "ItemPath", "RankedItems"]

MAX_ITEMS = 4096  # of one request
STAGES = ("sync", "user", "items", "score")
_RETRY = 1.0  # seconds after which a store that failed is asked again for changes

_log = logging.getLogger(__name__)


class RankedItems(NamedTuple):
    """One request's answer."""

    scores: NDArray[np.float32]  # [N], probabilities
    status: NDArray[np.uint8]  # [N], `Status` of the items' features
    user: Status | None  # None: the store could not be read
    read: NDArray[np.uint8]  # [M], `Status` of the items that were not in the cache
    complete: bool  # whether the store answered all that it was asked
    seconds: tuple[float, ...]  # of each of `STAGES`


class ItemPath:
    """Ranks items of a feature store for its users; for one thread.

    Args:
        folder: `items.onnx`, `rank.onnx`, `ranker.json`, `users.parquet`, `items.parquet`.
        cache_rows: items whose features are kept; 4 · W bytes each.
    """

    def __init__(self, folder: Path, store: FeatureStore, *, cache_rows: int = 1 << 20) -> None:
        self.lookup, self._store, self._complain = Lookup(folder, store), store, Complaint(_log)
        self._items, self._rank = _session(folder / "items.onnx"), _session(folder / "rank.onnx")
        self.cache = ItemCache(cache_rows, self._items.get_outputs()[0].shape[1])
        self._accept: list[str] = [self.lookup.versions.items.version]
        self._position, self._due, self._in_touch = -1, 0.0, True

    def __call__(self, user: int, items: NDArray[np.int64], context: NDArray[np.int64]) -> RankedItems:
        """Unknown ids count as strangers, of which the ranker knows how they do on average.

        Args:
            user: its id.
            items: ids int64 [N], in any order, repeated or not.
            context: int64 [C], in the order of the ranker's columns.
        """
        clock = [time.perf_counter()]
        complete = self._sync()
        clock.append(time.perf_counter())
        profile, known = self.lookup.profile(user)
        row = self.lookup.users(np.array([user]))
        clock.append(time.perf_counter())
        features, status, read, all_read = self._features(np.maximum(items, 0))  # 0 and below: nobody's id
        clock.append(time.perf_counter())
        (scores,) = self._rank.run(
            ["SCORES"],
            {"USER_INDEX": row[:, None], "CONTEXT": context[None], "ITEM_FEATURES": features, **tensors(profile)},
        )
        clock.append(time.perf_counter())
        complete = complete and all_read and known is not None
        return RankedItems(scores, status, known, read, complete, tuple(b - a for a, b in pairwise(clock)))

    def _sync(self) -> bool:
        """Forget the items that have changed; False while the store does not answer."""
        now = time.monotonic()
        if now < self._due:
            return self._in_touch
        try:
            position, changed = self._store.changes(self._position)
            if changed is None or len(changed):
                self._accept = self.lookup.versions.accept(self._store)
        except StoreError as error:
            _log.error("items may be out of date: %s", error)
            self._due, self._in_touch = now + _RETRY, False
            return False
        if changed is None:
            self.cache.clear()
        elif len(changed):
            self.cache.drop(changed)
        self._position, self._due, self._in_touch = position, now + self._store.poll_seconds, True
        return True

    def _features(
        self, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8], bool]:
        """Features FP32 [N, W], status uint8 [N], status of those that were not in the cache, and whether all could be
        read.
        """
        row = self.cache.find(ids)
        features, status = self.cache.values.take(row, 0), self.cache.status.take(row)
        absent = np.flatnonzero(row < 0)
        if not len(absent):
            return features, status, status[:0], True
        new, at = np.unique(ids[absent], return_inverse=True)
        values, found, all_read = self._load(new)
        features[absent], status[absent] = values[at], found[at]
        if all_read:
            self.cache.insert(new, values, found)
        return features, status, found, all_read

    def _load(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.uint8], bool]:
        """Features and status of items from the store, and whether the store could be read."""
        length = self.lookup.versions.items.tokens
        try:
            batch = self._store.read_items(ids, self._accept)
            tokens, status, there = batch.tokens[:, :length], batch.status, True
        except StoreError as error:
            self._complain("%d items are ranked without their features: %s", len(ids), error)
            tokens, status, there = np.zeros((len(ids), length), np.int64), np.full(len(ids), Status.missing), False
        feed = {"ITEM_INDEX": self.lookup.items(ids)[:, None], "ITEM_TOKENS": np.ascontiguousarray(tokens)}
        (values,) = self._items.run(["ITEM_FEATURES"], feed)
        return values, status.astype(np.uint8), there


def _session(path: Path) -> Any:
    """One thread, which does not wait busily: parallelism is instances (docs/decisions/0009)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
