"""The embedded store: LMDB, a memory-mapped B-tree. Any number of reading processes, one writer at a time.

Per feature version a named database, 8-byte big-endian id → record, so that scans run in the order of ids; a second
one for the captions. `.meta` has the schemas and the marks. A write is one transaction, flushed to the disk before it
returns: readers see all of it or nothing, and so does whoever opens the store after a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from sightline.errors import StoreError
from sightline.store.base import FeatureStore, Mark, Read, Value
from sightline.store.records import Schema

__all__ = ["LmdbStore"]

_MAP_BYTES = 1 << 38  # address space, not memory or disk: the most that a store can hold
_DATABASES, _READERS = 512, 1024
_META = b".meta"
_SCHEMA, _MARK = b"schema:", b"mark:"


class LmdbStore(FeatureStore):
    """A folder with an LMDB environment; made on first use unless `readonly`.

    Open it once per process, and after a fork, not before.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        super().__init__()
        self.path = Path(path)
        if readonly and not (self.path / "data.mdb").is_file():
            raise StoreError(f"{self.path}: expected a feature store, there is none; `sightline store load` makes one")
        self._open: dict[str, Any] = {}
        self._opening = threading.Lock()
        with self._errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(
                os.fspath(self.path), map_size=_MAP_BYTES, readonly=readonly, max_dbs=_DATABASES,
                max_readers=_READERS, readahead=False, meminit=False,
            )  # fmt: skip
            self._env.reader_check()  # readers that were killed would keep old pages in use
            self._meta = self._env.open_db(_META, create=not readonly)

    def close(self) -> None:
        self._env.close()

    def scan(self, schema: Schema, batch: int = 2048) -> Iterator[list[tuple[int, bytes, bytes | None]]]:
        """One transaction from the first to the last batch: what it yields is the store at one moment."""
        database, texts = self._database(schema.space), self._database(schema.texts)
        with self._errors(), self._env.begin() as txn, txn.cursor(database) as cursor:
            found = []
            for key, record in cursor:
                found.append((int.from_bytes(key, "big"), record, txn.get(key, db=texts)))
                if len(found) == batch:
                    yield found
                    found = []
            if found:
                yield found

    def count(self, schema: Schema) -> int:
        with self._errors(), self._env.begin() as txn:
            return txn.stat(self._database(schema.space))["entries"]

    def marks(self) -> dict[str, int]:
        return {name: int(rows) for name, rows in self._entries(_MARK).items()}

    def describe(self) -> dict[str, Any]:
        file = (self.path / "data.mdb").stat()
        info = self._env.info()
        return {
            "store": "lmdb", "path": str(self.path), "file_bytes": file.st_blocks * 512,
            "limit_bytes": info["map_size"], "readers": info["num_readers"],
        }  # fmt: skip

    @contextmanager
    def _snapshot(self) -> Iterator[Read]:
        def read(ids: NDArray[np.int64], spaces: Sequence[str]) -> list[list[Value | None]]:
            keys = _keys(ids)
            found: list[list[Value | None]] = []
            for space in spaces:
                with txn.cursor(self._database(space)) as cursor:
                    found.append(list(map(cursor.get, keys)))
            return found

        with self._errors(), self._env.begin(buffers=True) as txn:
            yield read

    def _write(self, ids: NDArray[np.int64], values: Mapping[str, Sequence[bytes]], mark: Mark | None) -> None:
        keys = _keys(ids)
        databases = {space: self._database(space) for space in values}
        with self._errors(), self._env.begin(write=True) as txn:
            for space, column in values.items():
                with txn.cursor(databases[space]) as cursor:
                    cursor.putmulti(list(zip(keys, column, strict=True)))
            if mark:
                name, rows = _MARK + mark[0].encode(), mark[1]
                if rows is None:
                    txn.delete(name, db=self._meta)
                else:
                    txn.put(name, b"%d" % rows, db=self._meta)

    def _delete(self, ids: NDArray[np.int64], spaces: Sequence[str]) -> None:
        databases = [self._database(space) for space in spaces]
        with self._errors(), self._env.begin(write=True) as txn:
            for database in databases:
                for key in _keys(ids):
                    txn.delete(key, db=database)

    def _drop(self, schema: Schema, marks: Sequence[str]) -> None:
        databases = [self._database(space) for space in (schema.space, schema.texts)]
        with self._errors(), self._env.begin(write=True) as txn:
            for database in databases:
                txn.drop(database, delete=False)  # emptied, not closed: other threads may be reading from it
            for name in (_SCHEMA + schema.space.encode(), *(_MARK + mark.encode() for mark in marks)):
                txn.delete(name, db=self._meta)

    def _put_schema(self, space: str, text: bytes) -> bytes:
        with self._errors(), self._env.begin(write=True) as txn:
            for name in (space, f"{space}/text"):
                self._env.open_db(name.encode(), txn)
            txn.put(_SCHEMA + space.encode(), text, overwrite=False, db=self._meta)
            return bytes(txn.get(_SCHEMA + space.encode(), b"", db=self._meta))

    def _get_schemas(self) -> dict[str, bytes]:
        found = self._entries(_SCHEMA)
        for space in found:  # a database that is opened after a transaction began cannot be read in it
            self._database(space), self._database(f"{space}/text")
        return found

    def _entries(self, prefix: bytes) -> dict[str, bytes]:
        with self._errors(), self._env.begin() as txn, txn.cursor(self._meta) as cursor:
            cursor.set_range(prefix)
            return {key[len(prefix) :].decode(): value for key, value in cursor if key.startswith(prefix)}

    def _database(self, space: str) -> Any:
        with self._opening:  # LMDB asks that no two threads do this at once
            if space not in self._open:
                with self._errors():
                    self._open[space] = self._env.open_db(space.encode(), create=False)
            return self._open[space]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreError(f"{self.path}: expected at most {_MAP_BYTES >> 30} GiB of features; use Redis") from error
        except lmdb.Error as error:
            raise StoreError(f"{self.path}: expected a feature store that can be opened and used: {error}") from error


def _keys(ids: NDArray[np.int64]) -> list[bytes]:
    keys: list[bytes] = ids.astype(">i8").view("V8").tolist()
    return keys
