"""The embedded store: LMDB, a memory-mapped B-tree. Any number of reading processes, one writer at a time.

Per feature version a named database, 8-byte big-endian id → record, so that scans run in the order of ids; a second
one for the captions. `.meta` has the schemas and the marks; `.changes` the ids int64 [C] of the last writes
by their positions, none for a drop; `caption.<captioner>` captions by the 32 bytes of their media's hash. A write is
one transaction, flushed to the disk before it returns: readers see all of it or nothing, and so does whoever opens the
store after a crash.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from sightline.errors import StoreError
from sightline.store.base import NOTHING, REMEMBERED, Change, FeatureStore, Mark, Read
from sightline.store.records import Schema, Value

__all__ = ["LmdbStore"]

_MAP_BYTES = 1 << 38  # address space, not memory or disk: the most that a store can hold
_DATABASES, _READERS = 512, 1024
_META, _CHANGES = b".meta", ".changes"
_SCHEMA, _MARK = b"schema:", b"mark:"
_CAPTIONS = "caption."
_UNTIL = struct.Struct("<d16s")  # of a lease: its end, in seconds since 1970, and its holder


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
        self._leases = self._env  # which cannot be written to, as it should be
        if not readonly:
            self._database(_CHANGES, create=True)
            # Apart, so that a lease waits for no disk and no load, and is no change to the rest. A crash of the machine
            # ends the leases' holders, too.
            with self._errors():
                self._leases = lmdb.open(
                    os.fspath(self.path / "leases"), map_size=1 << 30, sync=False, metasync=False, meminit=False
                )
        self._seen = (-1, 0)  # a transaction, and the position of the last change in it

    def close(self) -> None:
        self._env.close()
        self._leases.close()

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
        database = self._database(schema.space)  # before the transaction, which would not know it
        with self._errors(), self._env.begin() as txn:
            return txn.stat(database)["entries"]

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

    def changes(self, after: int) -> tuple[int, NDArray[np.int64] | None]:
        with self._errors():
            transaction = self._env.info()["last_txnid"]  # read from shared memory: whoever committed it
            if self._seen == (transaction, after):
                return after, NOTHING
            database = self._find(_CHANGES)
            if database is None:  # of a store that nobody has written to since there are logs
                self._seen = (transaction, 0)
                return 0, NOTHING if after == 0 else None
            with self._env.begin() as txn, txn.cursor(database) as cursor:
                position = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
                self._seen = (txn.id(), position)
                if after == position:
                    return position, NOTHING
                if 0 <= after < position and cursor.set_key(_position(after + 1)):
                    writes = list(cursor.iternext(keys=False))
                    if all(writes):
                        return position, np.unique(np.frombuffer(b"".join(writes), "<i8")).astype(np.int64)
        return position, None

    def _log(self, txn: lmdb.Transaction, ids: NDArray[np.int64]) -> None:
        with txn.cursor(self._database(_CHANGES)) as cursor:
            last = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
            cursor.put(_position(last + 1), ids.astype("<i8").tobytes(), append=True)
            while cursor.first() and int.from_bytes(cursor.key(), "big") <= last + 1 - REMEMBERED:
                cursor.delete()

    def _write(
        self, ids: NDArray[np.int64], values: Mapping[str, Sequence[bytes]], mark: Mark | None, *, logged: bool = False
    ) -> None:
        keys = _keys(ids)
        databases = {space: self._database(space) for space in values}
        with self._errors(), self._env.begin(write=True) as txn:
            for space, column in values.items():
                with txn.cursor(databases[space]) as cursor:
                    cursor.putmulti(list(zip(keys, column, strict=True)))
            if logged and len(ids):
                self._log(txn, ids)
            if mark:
                name, rows = _MARK + mark[0].encode(), mark[1]
                if rows is None:
                    txn.delete(name, db=self._meta)
                else:
                    txn.put(name, b"%d" % rows, db=self._meta)

    def _delete(self, ids: NDArray[np.int64], spaces: Sequence[str], *, logged: bool = False) -> None:
        databases = [self._database(space) for space in spaces]
        with self._errors(), self._env.begin(write=True) as txn:
            for database in databases:
                for key in _keys(ids):
                    txn.delete(key, db=database)
            if logged and len(ids):
                self._log(txn, ids)

    def _drop(self, schema: Schema, marks: Sequence[str]) -> None:
        databases = [self._database(space) for space in (schema.space, schema.texts)]
        with self._errors(), self._env.begin(write=True) as txn:
            for database in databases:
                txn.drop(database, delete=False)  # emptied, not closed: other threads may be reading from it
            for name in (_SCHEMA + schema.space.encode(), *(_MARK + mark.encode() for mark in marks)):
                txn.delete(name, db=self._meta)
            if schema.kind == "item":
                self._log(txn, NOTHING)

    def _change(self, space: str, ids: Sequence[int], change: Change) -> None:
        """One transaction: who writes to an LMDB environment is alone."""
        database = self._database(space)
        with self._errors(), self._env.begin(write=True) as txn:
            for identity, key in zip(ids, _keys(np.array(ids, np.int64)), strict=True):
                if (changed := change(identity, txn.get(key, db=database))) is not None:
                    txn.put(key, changed, db=database)

    def _write_captions(self, captioner: str, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        database = self._database(_CAPTIONS + captioner, create=True)
        with self._errors(), self._env.begin(write=True) as txn, txn.cursor(database) as cursor:
            cursor.putmulti(list(zip(keys, values, strict=True)))

    def _read_captions(self, captioner: str, keys: Sequence[bytes]) -> Sequence[Value | None]:
        database = self._find(_CAPTIONS + captioner)
        if database is None:
            return [None] * len(keys)
        with self._errors(), self._env.begin() as txn, txn.cursor(database) as cursor:
            return [cursor.get(key) for key in keys]

    def _drop_captions(self, captioner: str) -> None:
        database = self._find(_CAPTIONS + captioner)
        if database is not None:
            with self._errors(), self._env.begin(write=True) as txn:
                txn.drop(database, delete=False)

    def count_captions(self) -> dict[str, int]:
        prefix = _CAPTIONS.encode()
        with self._errors(), self._env.begin() as txn, txn.cursor() as cursor:  # of the databases' names
            cursor.set_range(prefix)
            names = [key.decode() for key in cursor.iternext(values=False) if key.startswith(prefix)]
        databases = {name.removeprefix(_CAPTIONS): self._database(name) for name in names}
        with self._errors(), self._env.begin() as txn:
            counts = {name: txn.stat(database)["entries"] for name, database in databases.items()}
        return {name: count for name, count in counts.items() if count}

    def _claim(self, name: bytes, seconds: float) -> bool:
        with self._errors():
            with self._leases.begin() as txn:  # first, so that whoever waits for a lease takes no writer's time
                if self._is_of_another(txn, name):
                    return False
            with self._leases.begin(write=True) as txn:
                if self._is_of_another(txn, name):
                    return False
                txn.put(name, _UNTIL.pack(time.time() + seconds, self._holder))
                self._sweep(txn, name)
        return True

    def _sweep(self, txn: lmdb.Transaction, name: bytes) -> None:
        """Look at two leases for one that is made, and remove those that nobody ended: so they do not pile up."""
        with txn.cursor() as cursor:
            cursor.set_range(name + b"\0")
            for _ in range(2):
                if not cursor.key():  # behind the last: go on with the first
                    cursor.first()
                if _has_ended(cursor.value()):
                    cursor.delete()
                else:
                    cursor.next()

    def _is_of_another(self, txn: lmdb.Transaction, name: bytes) -> bool:
        lease = txn.get(name)
        return lease is not None and not bytes(lease).endswith(self._holder) and not _has_ended(lease)

    def _unclaim(self, name: bytes) -> None:
        with self._errors(), self._leases.begin(write=True) as txn:
            if bytes(txn.get(name) or b"").endswith(self._holder):
                txn.delete(name)

    def _put_schema(self, space: str, text: bytes) -> bytes:
        with self._errors(), self._opening, self._env.begin(write=True) as txn:
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

    def _database(self, space: str, *, create: bool = False) -> Any:
        if space not in self._open:
            with self._opening:  # LMDB asks that no two threads do this at once
                if space not in self._open:
                    self._open[space] = self._opened(space.encode(), create)
        return self._open[space]

    def _opened(self, name: bytes, create: bool) -> Any:
        with self._errors():
            if self._env.flags()["readonly"]:
                return self._env.open_db(name, create=create)
            # In a transaction of ours: `open_db` begins its own without letting other threads run, among them perhaps
            # the one whose write it waits for.
            with self._env.begin(write=True) as txn:
                return self._env.open_db(name, txn, create=create)

    def _find(self, space: str) -> Any | None:
        """The database, None where there is none so far."""
        try:
            return self._database(space)
        except StoreError as error:
            if isinstance(error.__cause__, lmdb.NotFoundError):
                return None
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreError(f"{self.path}: expected at most {_MAP_BYTES >> 30} GiB of features; use Redis") from error
        except lmdb.Error as error:
            raise StoreError(f"{self.path}: expected a feature store that can be opened and used: {error}") from error


def _has_ended(lease: Value) -> bool:
    return float(_UNTIL.unpack(lease)[0]) <= time.time()


def _position(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _keys(ids: NDArray[np.int64]) -> list[bytes]:
    keys: list[bytes] = ids.astype(">i8").view("V8").tolist()
    return keys
