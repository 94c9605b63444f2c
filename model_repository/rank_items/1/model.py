"""A user and item ids → scores: the item path, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.item_path import MAX_ITEMS, STAGES, ItemPath, RankedItems
from sightline.metrics import Metrics
from sightline.store import Status, open_store


class TritonPythonModel:
    """One thread of ranking, with a cache of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the store that SIGHTLINE_STORE names; load graphs and tables, and rank once, for nobody."""
        config = json.loads(args["model_config"])
        rows = int(config["parameters"]["cache_rows"]["string_value"])
        self.store = open_store(os.environ["SIGHTLINE_STORE"])
        self.path = ItemPath(
            Path(args["model_repository"], args["model_version"]), self.store, cache_rows=rows
        )
        (columns,) = next(tensor["dims"] for tensor in config["input"] if tensor["name"] == "CONTEXT")
        self.metrics = Metrics(pb_utils, model="rank_items")
        counter, histogram = self.metrics.counter, self.metrics.histogram
        self._seconds = [histogram("sightline_items_seconds", stage=stage) for stage in (*STAGES, "total")]
        self._ranked = [counter("sightline_items_ranked_total", status=status.name) for status in Status]
        self._reads, self._users = (
            [counter("sightline_store_reads_total", kind=kind, status=status.name) for status in Status]
            for kind in ("item", "user")
        )
        self._hits, self._misses = (
            counter("sightline_items_cache_reads_total", result=result) for result in ("hit", "miss")
        )
        self._evictions = counter("sightline_items_cache_evictions_total")
        self._degraded = counter("sightline_degraded_requests_total", reason="store")
        self.path(0, np.zeros(MAX_ITEMS, np.int64), np.zeros(int(columns), np.int64))

    def finalize(self) -> None:
        """Close the store, send the last counts."""
        self.store.close()
        self.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """USER_ID INT64 [rows, 1], ITEM_IDS INT64 [rows, N], CONTEXT INT64 [rows, C], mostly of one row → SCORES FP32
        [rows, N], FEATURE_STATUS UINT8 [rows, N].
        """
        return [self._answer(request) for request in requests]

    def _rank(self, user: int, items: NDArray[np.int64], context: NDArray[np.int64]) -> RankedItems:
        evicted = self.path.cache.evicted
        found = self.path(user, items, context)
        for observe, seconds in zip(self._seconds, (*found.seconds, sum(found.seconds)), strict=True):
            observe(seconds)
        for add, count in zip(self._ranked, _by_status(found.status), strict=True):
            add(count)
        self._hits(len(items) - len(found.read))
        if len(found.read):
            self._misses(len(found.read))
            self._evictions(self.path.cache.evicted - evicted)
            for add, count in zip(self._reads, _by_status(found.read), strict=True):
                add(count)
        if found.user is not None:
            self._users[found.user](1)
        if not found.complete:
            self._degraded(1)
        return found

    def _answer(self, request: Any) -> Any:
        users, items, context = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("USER_ID", "ITEM_IDS", "CONTEXT")
        )
        count = items.shape[1]
        if not 1 <= count <= MAX_ITEMS:
            message = f"ITEM_IDS: expected 1 to {MAX_ITEMS} items, got {count}; rank more in several requests"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        rows = [self._rank(*row) for row in zip(users[:, 0].tolist(), items, context, strict=True)]
        scores, status = (np.stack([row[at] for row in rows]) for at in (0, 1))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("SCORES", scores), pb_utils.Tensor("FEATURE_STATUS", status)]
        )


def _by_status(codes: NDArray[np.uint8]) -> list[int]:
    if not codes.any():  # as nearly always: all of them are fresh
        return [len(codes), *[0] * (len(Status) - 1)]
    found: list[int] = np.bincount(codes, minlength=len(Status)).tolist()
    return found
