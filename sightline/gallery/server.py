"""The gallery in Milvus ≥ 2.6: a server, or Milvus Lite in a file (`….db`), by the same client.

A collection per version: id, vector, whether queries see it there, and when it was last written; one more for the
versions and the documents. Milvus has no transactions over collections, so what moves is made visible in its new
version before it is hidden in the old one, and a search looks at the versions in that order: an item that is on its
way may be found in both, and then its place in the later version counts; it is never missed. Moving back to an earlier
version waits between the two steps for searches that have passed it. One process writes at a time.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pymilvus import DataType, MilvusClient, MilvusException  # type: ignore[import-untyped]

from sightline.errors import GalleryError
from sightline.gallery.base import Count, Found, Gallery, GalleryVersion, State, parse_ids, parse_version
from sightline.gallery.merge import rank_merge

__all__ = ["MilvusGallery"]

_ABOUT = "sightline_gallery"
_BATCH = 1000  # rows per request
_GRACE = 1.0  # seconds: more than a search takes
_LARGEST = 48_000  # bytes of a document, which Milvus keeps as a text of at most 65 535
_DEFAULT_LISTS = 1024
_PAGE = 10_000  # ids per answer
_STATE = "state:"


class MilvusGallery(Gallery):
    """Versions in collections of one Milvus database; `location` is `http(s)://host:port[/database]` or a file."""

    def __init__(self, location: str) -> None:
        self.location = location
        with self._errors():
            self._client = MilvusClient(location)
            if not self._client.has_collection(_ABOUT):
                self._make(_ABOUT, 2, "FLAT", {}, key=True)
        self._known: dict[str, GalleryVersion] = {}

    def close(self) -> None:
        self._client.close()

    def _make(self, name: str, dimension: int, index: str, parameters: dict[str, int], *, key: bool = False) -> None:
        schema = MilvusClient.create_schema(auto_id=False)
        if key:
            schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=512)
            schema.add_field("value", DataType.VARCHAR, max_length=65_535)
        else:
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("seen", DataType.BOOL)
            schema.add_field("position", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        indices = MilvusClient.prepare_index_params()
        indices.add_index("vector", index_type=index, metric_type="L2", params=parameters)
        self._client.create_collection(name, schema=schema, index_params=indices, consistency_level="Strong")

    # --- versions ---------------------------------------------------------------------------------------

    def create(self, version: GalleryVersion) -> None:
        known = {each.name: each for each in self.versions()}
        if known.get(version.name, version) != version:
            raise GalleryError(
                f"version {version.name!r} exists with other parameters: expected "
                f"{known[version.name].model_dump_json()}, got {version.model_dump_json()}; "
                "give the new one a name of its own"
            )
        index, parameters = {
            "flat": ("FLAT", {}),
            "ivf": ("IVF_FLAT", {"nlist": version.lists or _DEFAULT_LISTS}),
            "hnsw": ("HNSW", {"M": version.links, "efConstruction": 80}),
        }[version.index]
        with self._errors():
            if not self._client.has_collection(_collection(version.name)):
                self._make(_collection(version.name), version.dimension, index, parameters)
            if version.name not in known:
                self._put_text(f"version:{time.time_ns():020d}:{version.name}", version.model_dump_json())

    def versions(self) -> list[GalleryVersion]:
        with self._errors():
            rows = self._client.query(_ABOUT, filter='key like "version:%"', output_fields=["key", "value"])
        found = [parse_version(row["value"], self.location) for row in sorted(rows, key=lambda row: str(row["key"]))]
        self._known = {version.name: version for version in found}
        return found

    def version(self, name: str) -> GalleryVersion:
        return self._known[name] if name in self._known else super().version(name)

    def drop(self, version: str) -> None:
        self.versions()
        name = _collection(self.version(version).name)
        with self._errors():
            if seen := self._number(name, "seen == true"):
                raise GalleryError(
                    f"version {version!r}: queries see {seen:,} items in it; show them in another version first"
                )
            for row in self._client.query(_ABOUT, filter='key like "version:%"', output_fields=["key"]):
                if row["key"].split(":", 2)[2] == version:
                    self._client.delete(_ABOUT, ids=[row["key"]])
            self._client.drop_collection(name)
        self._known = {}

    # --- items ------------------------------------------------------------------------------------------

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
        numbers = parse_ids(ids, once=True)
        arrays = self._vectors(vectors, seen, len(numbers))
        written = np.ones(len(numbers), bool)
        names = [version.name for version in self.versions()]
        with self._errors():
            if since is not None:
                last = np.full(len(numbers), -1, np.int64)
                for name in names:
                    known = {row["id"]: row["position"] for row in self._rows(name, numbers, ["position"])}
                    last = np.maximum(last, [known.get(number, -1) for number in numbers.tolist()])
                written = (last >= 0) & (last <= since)
            numbers = numbers[written]
            before = {name: self._in(name, numbers) for name in names if name != seen}
            self._upsert(seen, numbers, arrays[seen][written], True)
            self._wait(seen, [name for name, here in before.items() if len(here)], names)
            for name, here in before.items():
                if name in arrays:
                    self._upsert(name, numbers, arrays[name][written], False)
                elif replace:
                    self._erase(name, numbers)
                else:
                    self._flag(name, here, False)
            self._put_state(state)
        return written

    def show(self, version: str, ids: ArrayLike | None = None, *, state: State | None = None) -> int:
        wanted = None if ids is None else np.unique(parse_ids(ids))
        names = [each.name for each in self.versions()]
        self.version(version)
        with self._errors():
            here = self.ids(version, seen=False)
            if wanted is not None:
                here = np.intersect1d(here, wanted)
            moved = np.setdiff1d(here, self.ids(version))
            self._flag(version, moved, True)
            before = {name: np.intersect1d(self.ids(name), here) for name in names if name != version}
            self._wait(version, [name for name, items in before.items() if len(items)], names)
            for name, items in before.items():
                self._flag(name, items, False)
            self._put_state(state)
        return len(moved)

    @staticmethod
    def _wait(seen: str, before: Sequence[str], names: Sequence[str]) -> None:
        """Where items come back to an earlier version: for searches that looked there before they did."""
        if any(names.index(name) > names.index(seen) for name in before):
            time.sleep(_GRACE)

    def delete(self, ids: ArrayLike, *, state: State | None = None) -> None:
        numbers = np.unique(parse_ids(ids))
        with self._errors():
            for version in self.versions():
                self._erase(version.name, numbers)
            self._put_state(state)

    def _upsert(self, version: str, ids: NDArray[np.int64], vectors: NDArray[np.float32], seen: bool) -> None:
        position = time.time_ns()
        for start in range(0, len(ids), _BATCH):
            rows = slice(start, start + _BATCH)
            self._client.upsert(_collection(version), [
                {"id": identity, "seen": seen, "position": position, "vector": vector}
                for identity, vector in zip(ids[rows].tolist(), vectors[rows], strict=True)
            ])  # fmt: skip

    def _flag(self, version: str, ids: NDArray[np.int64], seen: bool) -> None:
        position = time.time_ns()
        for start in range(0, len(ids), _BATCH):
            rows = [{"id": each, "seen": seen, "position": position} for each in ids[start : start + _BATCH].tolist()]
            self._client.upsert(_collection(version), rows, partial_update=True)

    def _erase(self, version: str, ids: NDArray[np.int64]) -> None:
        for start in range(0, len(ids), _BATCH):
            self._client.delete(_collection(version), ids=ids[start : start + _BATCH].tolist())

    def _rows(
        self, version: str, ids: NDArray[np.int64], fields: list[str], also: str = ""
    ) -> Iterator[dict[str, Any]]:
        for start in range(0, len(ids), _BATCH):
            which = f"id in {ids[start : start + _BATCH].tolist()}"
            yield from self._client.query(_collection(version), filter=which + also, output_fields=["id", *fields])

    def _in(self, version: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the ids that queries see in a version."""
        return np.array([row["id"] for row in self._rows(version, ids, [], " and seen == true")], np.int64)

    def get(self, ids: ArrayLike, version: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        numbers = parse_ids(ids)
        vectors = np.zeros((len(numbers), self.version(version).dimension), np.float32)
        here = np.zeros(len(numbers), bool)
        with self._errors():
            for row in self._rows(version, np.unique(numbers), ["vector"]):
                at = numbers == row["id"]
                vectors[at], here[at] = row["vector"], True
        return vectors, here

    def seen(self, ids: ArrayLike) -> list[str | None]:
        numbers = parse_ids(ids)
        found: dict[int, str] = {}
        with self._errors():
            for version in self.versions():
                found |= dict.fromkeys(self._in(version.name, np.unique(numbers)).tolist(), version.name)
        return [found.get(identity) for identity in numbers.tolist()]

    def count(self) -> dict[str, Count]:
        with self._errors():
            return {
                version.name: Count(
                    self._number(_collection(version.name), "seen == true"),
                    self._number(_collection(version.name), ""),
                )
                for version in self.versions()
            }

    def _number(self, collection: str, which: str) -> int:
        return int(self._client.query(collection, filter=which, output_fields=["count(*)"])[0]["count(*)"])

    def ids(self, version: str, *, seen: bool = True) -> NDArray[np.int64]:
        collection, found = _collection(self.version(version).name), [np.zeros(0, np.int64)]
        also, ranges = " and seen == true" if seen else "", [(0, 2**63 - 1)]
        with self._errors():
            while ranges:  # halved until an answer is small enough: pages of a query need not be in order
                low, high = ranges.pop()
                which = f"id >= {low} and id <= {high}{also}"
                if self._number(collection, which) <= _PAGE:
                    rows = self._client.query(collection, filter=which, output_fields=["id"])
                    found.append(np.array([row["id"] for row in rows], np.int64))
                else:
                    middle = (low + high) // 2
                    ranges += [(low, middle), (middle + 1, high)]
        return np.sort(np.concatenate(found))

    def position(self) -> int:
        """Nanoseconds since 1970 by this machine's clock: there is no log."""
        return time.time_ns()

    # --- queries ----------------------------------------------------------------------------------------

    def search(self, queries: Mapping[str, NDArray[Any]], k: int, *, effort: int | None = None) -> Found:
        arrays = self._queries(queries, k, effort)
        if not len(next(iter(arrays.values()))):  # which Milvus refuses
            return rank_merge([_arrays([], k)], k)
        names = [name for name in self._order(arrays) if name in arrays]
        found = self._search(names, arrays, k, k, effort)
        if found is None:  # some took two places, and others may be missing behind them
            found = self._search(names, arrays, k, 2 * k, effort)
        assert found is not None
        places = np.array([*(list(arrays).index(name) for name in names), -1], np.int8)
        return found._replace(version=places[found.version])

    def _order(self, asked: Mapping[str, Any]) -> list[str]:
        """Versions as they were created; asked of Milvus only where an unknown one is wanted."""
        if not self._known.keys() >= asked.keys():
            self.versions()
        return list(self._known)

    def _search(
        self, names: Sequence[str], arrays: Mapping[str, NDArray[np.float32]], k: int, limit: int, effort: int | None
    ) -> Found | None:
        """The earlier version first; None where items found in two versions make the lists too short for k."""
        lists = []
        with self._errors():
            for name in names:
                wanted = effort or self.version(name).effort
                lists.append(_arrays(self._client.search(
                    _collection(name), data=list(arrays[name]), limit=limit, filter="seen == true",
                    search_params={"params": {"ef": max(wanted, limit), "nprobe": wanted}}, output_fields=["id"],
                ), limit))  # fmt: skip
        doubled = False
        for place in range(len(lists) - 1):
            ids, distances = lists[place]
            later = np.concatenate([each for each, _ in lists[place + 1 :]], axis=1)
            twice = (ids[:, :, None] == later[:, None, :]).any(2) & (ids >= 0)
            if twice.any():
                doubled = True
                lists[place] = np.where(twice, -1, ids), np.where(twice, np.float32(np.inf), distances)
        return None if doubled and limit == k else rank_merge(lists, k)

    # --- what jobs keep ---------------------------------------------------------------------------------

    def get_state(self, name: str) -> bytes | None:
        with self._errors():
            rows = self._client.query(_ABOUT, ids=[_STATE + name], output_fields=["value"])
        return base64.b64decode(rows[0]["value"]) if rows else None

    def put_state(self, name: str, value: bytes | None) -> None:
        with self._errors():
            self._put_state((name, value))

    def _put_state(self, state: State | None) -> None:
        if state is None:
            return
        name, value = state
        if value is None:
            self._client.delete(_ABOUT, ids=[_STATE + name])
        elif len(value) > _LARGEST:
            raise GalleryError(f"state {name!r}: expected at most {_LARGEST:,} bytes, got {len(value):,}")
        else:
            self._put_text(_STATE + name, base64.b64encode(value).decode())

    def _put_text(self, key: str, value: str) -> None:
        self._client.upsert(_ABOUT, [{"key": key, "value": value, "vector": [0.0, 0.0]}])

    def compact(self, *, force: bool = False) -> bool:
        """Milvus compacts by itself; with `force` it is asked to."""
        if force:
            with self._errors():
                for version in self.versions():
                    self._client.flush(_collection(version.name))
        return force

    def describe(self) -> dict[str, Any]:
        with self._errors():
            return {
                "gallery": "milvus", "location": self.location, "server": self._client.get_server_version(),
                "versions": {version.name: _collection(version.name) for version in self.versions()},
            }  # fmt: skip

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (MilvusException, OSError) as error:
            raise GalleryError(f"{self.location}: expected a Milvus that can be reached and used: {error}") from error


def _collection(version: str) -> str:
    """Its name, of letters and digits alone."""
    return f"version_{version.encode().hex()}"


def _arrays(answers: Sequence[Any], limit: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and distances [B, limit]."""
    ids = np.full((len(answers), limit), -1, np.int64)
    distances = np.full((len(answers), limit), np.inf, np.float32)
    for row, hits in enumerate(answers):
        ids[row, : len(hits)] = [hit["id"] for hit in hits]
        distances[row, : len(hits)] = [hit["distance"] for hit in hits]
    return ids, distances
