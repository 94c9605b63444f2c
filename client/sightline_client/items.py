"""Items of the catalogue, as the server's model `rank_items` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sightline_client.errors import InvalidArgument, ServerError

__all__ = ["STATUS", "RankedItems"]

MODEL = "rank_items"
OUTPUTS = ("SCORES", "FEATURE_STATUS")
LARGEST = 4096  # items of one request
STATUS = ("fresh", "stale_version", "missing")
"""Meaning of `RankedItems.status` 0, 1, 2: features by the served captioner, by another one, none."""


class RankedItems(NamedTuple):
    """Arrays in the order in which the items were named."""

    item_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    """Probabilities of a positive interaction."""
    status: npt.NDArray[np.uint8]
    """What the score could lean on, an index into `STATUS`."""

    def best(self, count: int) -> npt.NDArray[np.int64]:
        """Places of the `count` best items, the best first; equal scores in the order in which they were named."""
        return np.argsort(-self.scores, kind="stable")[:count]


def check(user_id: int, item_ids: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The ids as an array. Raises InvalidArgument for what the server would refuse."""
    if user_id < 0:
        raise InvalidArgument(f"user_id: expected at least 0 (0 is nobody), got {user_id}")
    ids = np.asarray(item_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidArgument(f"item_ids: expected a sequence of int64 ids, got {ids.dtype} of shape {list(ids.shape)}")
    return ids.astype(np.int64)


def columns(
    user_id: int, ids: npt.NDArray[np.int64], context: Sequence[int]
) -> list[tuple[str, str, npt.NDArray[np.int64]]]:
    """Name, datatype and values [1, …] of each input."""
    values = {"USER_ID": np.array([user_id]), "ITEM_IDS": ids, "CONTEXT": np.array(context, np.int64)}
    return [(name, "INT64", value[None]) for name, value in values.items()]


def parse(result: Any, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Scores and status [count]. Raises ServerError for an answer of another form."""
    found = []
    for name in OUTPUTS:
        values = result.as_numpy(name)
        if values is None or values.shape != (1, count):
            got = "nothing" if values is None else f"the shape {list(values.shape)}"
            raise ServerError(f"{MODEL}: expected {name} [1, {count}], got {got}")
        found.append(values[0])
    return found[0], found[1]
