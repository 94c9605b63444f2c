"""What every gallery is: items' vectors under one or more versions of an embedder, and the version each is seen in.

While a backfill job moves items from an old version to a new one, a query is searched in both, in each version's own
space, and the two lists are merged (`merge`). An item may have a vector in several versions (the old one is kept, so
that one can go back), but queries see it in exactly one. See docs/gallery.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sightline.errors import GalleryError

__all__ = [
    "TOLERANCE",
    "Count",
    "Found",
    "Gallery",
    "GalleryVersion",
    "State",
    "normalized",
    "parse_ids",
    "parse_version",
]

TOLERANCE = 1e-3
"""By which a vector's length may differ from 1."""
State = tuple[str, bytes | None]
"""Name and contents of a small document; None removes it."""


class GalleryVersion(BaseModel):
    """One version of an embedder, and how its vectors are indexed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    dimension: Annotated[int, Field(ge=1, le=32_768)]
    index: Literal["flat", "ivf", "hnsw"] = "flat"
    """Exact; inverted lists; a graph of neighbours."""
    effort: Annotated[int, Field(ge=1, le=4096)] = 64
    """Of a search: lists that are probed (ivf), candidates that are kept (hnsw: ef); more is slower and finds more.

    Stated for one index of all items. Where they are divided among versions, the embedded gallery's search scales it
    such that it finds as many of the nearest.
    """
    lists: Annotated[int, Field(ge=0, le=65_536)] = 0
    """ivf: number of lists; 0 stands for 4 √items, as they are when the index is built."""
    links: Annotated[int, Field(ge=4, le=128)] = 16
    """hnsw: neighbours per node and layer (M), twice as many on the lowest."""


class Found(NamedTuple):
    """What a search found, per query in the order of distances. B queries, at most k items each."""

    ids: NDArray[np.int64]
    """[B, k], −1 where there are fewer."""
    distances: NDArray[np.float32]
    """[B, k], squared Euclidean, 2 − 2 cos, ascending; inf where there are fewer."""
    version: NDArray[np.int8]
    """[B, k], place in the mapping of queries that was searched with; −1 where there are fewer."""


class Count(NamedTuple):
    """Items of one version."""

    seen: int
    """That queries see in it."""
    stored: int
    """That have a vector in it."""


class Gallery(ABC):
    """Vectors float32 [N, D] of length 1 by item id (int64, ≥ 0) and version; D may differ between versions.

    A write that returned is there after any crash. The embedded gallery's writes are transactions: a search sees all
    of one or nothing. In Milvus each item is complete at any time, and a write that was interrupted has to be repeated.

    Raises GalleryError for what cannot be stored or is not there, and where the gallery cannot be reached.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release files, memory and connections."""

    # --- versions ---------------------------------------------------------------------------------------

    @abstractmethod
    def create(self, version: GalleryVersion) -> None:
        """Add a version, empty; again with the same parameters is nothing, with others a GalleryError."""

    @abstractmethod
    def versions(self) -> list[GalleryVersion]:
        """In the order of their creation."""

    @abstractmethod
    def drop(self, version: str) -> None:
        """Remove a version with its vectors. Raises GalleryError while queries see items in it."""

    def version(self, name: str) -> GalleryVersion:
        """By its name; GalleryError if there is none."""
        known = {version.name: version for version in self.versions()}
        if name not in known:
            raise GalleryError(f"version {name!r}: expected one of {', '.join(known) or 'none so far'}")
        return known[name]

    # --- items ------------------------------------------------------------------------------------------

    @abstractmethod
    def put(
        self,
        ids: ArrayLike,
        vectors: Mapping[str, NDArray[Any]],
        seen: str,
        *,
        replace: bool = False,
        since: int | None = None,
        state: State | None = None,
    ) -> NDArray[np.bool_]:
        """Write vectors of items, and let queries see these items in one version; one write, durable on return.

        Args:
            ids: int64 [N], each once.
            vectors: version → [N, D] of length 1. Vectors in other versions stay.
            seen: the version in which queries see these items from now on; one of `vectors`.
            replace: the items themselves changed: their vectors in other versions are removed, being out of date.
            since: a `position`, taken before the items' media were read. Items that were written, shown or deleted
                after it, or that are not there, are left as they are: so a job that is slower than a change never
                overwrites or revives anything.
            state: a document to be written with it (`get_state`), also where every item was left.

        Returns:
            bool [N], the items that were written: all of them without `since`.
        """

    @abstractmethod
    def show(self, version: str, ids: ArrayLike | None = None, *, state: State | None = None) -> int:
        """Let queries see items in this version: cut-over and rollback. One write, durable on return.

        Args:
            version: name.
            ids: int64 [N]; those without a vector in the version stay where they are. None: all that have one.
            state: as in `put`.

        Returns:
            Number of items that were seen in another version before.
        """

    @abstractmethod
    def delete(self, ids: ArrayLike, *, state: State | None = None) -> None:
        """Remove items from all versions; ids int64 [N], unknown ones among them or not."""

    @abstractmethod
    def get(self, ids: ArrayLike, version: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Vectors [N, D] of items in a version, seen there or not, zeros where there is none; bool [N], there is."""

    @abstractmethod
    def seen(self, ids: ArrayLike) -> list[str | None]:
        """Per id the version in which queries see it; None for items that are not there."""

    @abstractmethod
    def count(self) -> dict[str, Count]:
        """Version → its items; all of one moment (embedded)."""

    @abstractmethod
    def ids(self, version: str, *, seen: bool = True) -> NDArray[np.int64]:
        """Items [N], ascending, that queries see in a version; with seen=False, all that have a vector there."""

    @abstractmethod
    def position(self) -> int:
        """Of the last write; grows with every write, and is what `put(since=…)` takes."""

    # --- queries ----------------------------------------------------------------------------------------

    @abstractmethod
    def search(self, queries: Mapping[str, NDArray[Any]], k: int, *, effort: int | None = None) -> Found:
        """The k nearest items among those that queries see in the versions asked; distance rank merge.

        Args:
            queries: version → the same B queries in its space, [B, D] of length 1. All versions in which items are
                seen, or their items are not found.
            k: 1 to 4096.
            effort: 1 or more, for this search; None: each version's own.
        """

    # --- what jobs keep ---------------------------------------------------------------------------------

    @abstractmethod
    def get_state(self, name: str) -> bytes | None:
        """A small document that was written with items or by itself; None where there is none."""

    @abstractmethod
    def put_state(self, name: str, value: bytes | None) -> None:
        """Write a document, durably; None removes it."""

    @abstractmethod
    def compact(self, *, force: bool = False) -> bool:
        """Rebuild what searches are slow with: many new or many removed items. Whoever writes much calls it often.

        It does nothing until it is worth its time, or with `force` until anything at all has changed. Searches go on
        meanwhile; readers take over what was built. At most one process does it at a time, others return at once.

        Returns:
            Whether anything was built.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Where and how the gallery is kept: what an operator checks."""

    # --- checks of what comes in ------------------------------------------------------------------------

    def _vectors(self, vectors: Mapping[str, NDArray[Any]], seen: str, count: int) -> dict[str, NDArray[np.float32]]:
        if seen not in vectors:
            raise GalleryError(f"seen: expected a version of the vectors, {', '.join(vectors) or 'none'}; got {seen!r}")
        return {
            name: normalized(array, (count, self.version(name).dimension), f"vectors of {name}")
            for name, array in vectors.items()
        }

    def _queries(
        self, queries: Mapping[str, NDArray[Any]], k: int, effort: int | None
    ) -> dict[str, NDArray[np.float32]]:
        if effort is not None and effort < 1:
            raise GalleryError(f"effort: expected 1 or more, got {effort}")
        if not 1 <= k <= 4096:
            raise GalleryError(f"k: expected 1 to 4096 items, got {k}")
        if not queries:
            raise GalleryError("queries: expected those of one version or more, got none")
        first = np.asarray(next(iter(queries.values())))
        rows = len(first) if first.ndim else 0
        return {
            name: normalized(array, (rows, self.version(name).dimension), f"queries of {name}")
            for name, array in queries.items()
        }


def parse_version(text: str | bytes, where: str) -> GalleryVersion:
    """From its JSON."""
    try:
        return GalleryVersion.model_validate_json(text)
    except ValidationError as error:
        raise GalleryError(f"{where}: expected a version of a gallery, made by this release: {error}") from error


def parse_ids(ids: ArrayLike, *, once: bool = False) -> NDArray[np.int64]:
    """int64 [N]; GalleryError for anything else, for negative ones and, with `once`, for repeated ones."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise GalleryError(f"ids: expected int64 [N], got {array.dtype} {list(array.shape)}")
    found = array.astype(np.int64)
    if len(found) and found.min() < 0:
        raise GalleryError(f"ids: expected numbers from 0 to 2**63 - 1, got {found.min()}")
    if once and len(np.unique(found)) < len(found):
        raise GalleryError(f"ids: expected each once, got {len(found) - len(np.unique(found))} repetitions")
    return found


def normalized(array: NDArray[Any], shape: Sequence[int], what: str) -> NDArray[np.float32]:
    """The same as contiguous float32 of that shape; GalleryError unless all rows are finite and of length 1."""
    given = np.asarray(array)
    if given.shape != tuple(shape) or given.dtype.kind != "f":
        raise GalleryError(f"{what}: expected float32 {list(shape)}, got {given.dtype} {list(given.shape)}")
    found = np.ascontiguousarray(given, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", found, found))
    wrong = ~(np.abs(lengths - 1) <= TOLERANCE)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise GalleryError(
            f"{what}: expected vectors of length 1 ± {TOLERANCE}, got one of length {lengths[row]:.4g} in row {row} "
            f"({wrong.sum()} of {len(wrong)} rows); divide each by its Euclidean norm"
        )
    return found
