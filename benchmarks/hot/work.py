"""What a request asks for, in two forms that have nothing to do with servers. The peers' environment imports this.

    plain     what one writes first: read the user and the items' tokens, repeat the user's side for every item,
              run embed.onnx, then score.onnx
    tricked   Sightline's own engine, `sightline.item_path`
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.hot.wire import Answer
from sightline.item_path import ItemPath
from sightline.lookup import Lookup, tensors
from sightline.store import FeatureStore, open_store

Design = Literal["plain", "tricked"]
GRAPHS, STORE = "graphs", "store"


class Plain:
    """For one thread or several; `threads` is onnxruntime's for one operator."""

    def __init__(self, folder: Path, store: FeatureStore, threads: int = 1) -> None:
        self._store, self._lookup = store, Lookup(folder / GRAPHS, store)
        self._accept = [self._lookup.versions.items.version]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._embed, self._score = (
            onnxruntime.InferenceSession(folder / GRAPHS / name, options, providers=["CPUExecutionProvider"])
            for name in ("embed.onnx", "score.onnx")
        )

    def __call__(self, user: int, items: NDArray[np.int64], context: NDArray[np.int64]) -> Answer:
        """int64 [N], int64 [C] → N scores and statuses."""
        batch = self._store.read_items(items, self._accept)
        one = tensors(self._lookup.profile(user)[0])
        one |= {"USER_INDEX": self._lookup.users(np.array([user]))[None], "CONTEXT": context[None]}
        feed = {name: np.repeat(value, len(items), 0) for name, value in one.items()}
        feed |= {"ITEM_INDEX": self._lookup.items(items)[:, None], "ITEM_TOKENS": batch.tokens}
        dense = feed.pop("DENSE")
        (features,) = self._embed.run(["FEATURES"], feed)
        (scores,) = self._score.run(["SCORE"], {"FEATURES": features, "DENSE": dense})
        return Answer(scores[:, 0], batch.status)


class Tricked:
    """For one thread."""

    def __init__(self, folder: Path, store: FeatureStore) -> None:
        self.path = ItemPath(folder / GRAPHS, store)

    def __call__(self, user: int, items: NDArray[np.int64], context: NDArray[np.int64]) -> Answer:
        """int64 [N], int64 [C] → N scores and statuses."""
        found = self.path(user, items, context)
        return Answer(found.scores, found.status)


def load(design: Design, folder: Path, threads: int = 1) -> Plain | Tricked:
    """The work on the data of a folder that `benchmarks.hot.data` made, once per process."""
    store = open_store(str(folder / STORE))
    return Plain(folder, store, threads) if design == "plain" else Tricked(folder, store)
