"""Items that look like a picture, as the server's model `retrieve` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sightline_client.errors import InvalidArgument, ServerError

__all__ = ["Retrieved"]

MODEL = "retrieve"
OUTPUTS = ("ITEM_IDS", "DISTANCES", "VERSIONS")
MOST = 4096  # items of one answer


class Retrieved(NamedTuple):
    """What was found for one query, the nearest first."""

    item_ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    """Squared Euclidean distances of vectors of length 1: 2 − 2 cos."""
    versions: list[str]
    """The gallery's version in which each item was found; two of them while an upgrade is under way."""


def check(media: Sequence[bytes] | None, vectors: npt.NDArray[Any] | None, k: int) -> int:
    """Number of queries. Raises InvalidArgument for what the server would refuse."""
    if (media is None) == (vectors is None):
        raise InvalidArgument("expected either media or vectors, got " + ("none" if media is None else "both"))
    if not 1 <= k <= MOST:
        raise InvalidArgument(f"k: expected 1 to {MOST}, got {k}")
    if vectors is not None and (np.ndim(vectors) != 2 or np.asarray(vectors).dtype.kind != "f"):
        array = np.asarray(vectors)
        raise InvalidArgument(f"vectors: expected float32 [queries, numbers], got {array.dtype} {list(array.shape)}")
    for index, data in enumerate(media or ()):
        if not isinstance(data, bytes) or not data:
            raise InvalidArgument(f"media[{index}]: expected the bytes of an image or video, got {data!r:.40}")
    return len(media) if media is not None else len(vectors if vectors is not None else ())


def columns(
    media: Sequence[bytes] | None, vectors: npt.NDArray[Any] | None, part: slice, k: int
) -> list[tuple[str, str, npt.NDArray[Any]]]:
    """Name, datatype and values [rows, …] of each input."""
    if media is not None:
        query: tuple[str, str, npt.NDArray[Any]] = "MEDIA", "BYTES", np.array([[one] for one in media[part]], object)
    else:
        query = "VECTOR", "FP32", np.ascontiguousarray(np.asarray(vectors)[part], np.float32)
    return [query, ("K", "INT32", np.full((len(query[2]), 1), k, np.int32))]


def parse(result: Any, count: int, k: int) -> list[Retrieved]:
    """One per query, without the places that nothing was found for. Raises ServerError for another form."""
    found = []
    for name in OUTPUTS:
        values = result.as_numpy(name)
        if values is None or values.shape != (count, k):
            got = "nothing" if values is None else f"the shape {list(values.shape)}"
            raise ServerError(f"{MODEL}: expected {name} [{count}, {k}], got {got}")
        found.append(values)
    answers = []
    for ids, distances, versions in zip(*found, strict=True):
        there = ids >= 0
        answers.append(Retrieved(ids[there], distances[there], [one.decode() for one in versions[there]]))
    return answers
