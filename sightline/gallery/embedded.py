"""The embedded gallery: LMDB keeps it, FAISS searches it. Any number of reading processes, one writer at a time.

A folder with an LMDB environment. Per version a numbered database `vector.<slot>`, 8-byte big-endian id → float32
vector; `seen`, id → the slot in which queries see the item and the position of the write that last touched it; `.meta`
has versions, counts, documents and the newest snapshot; `.changes` the last writes by position: which ids, and in which
slots their vectors changed. A write is one transaction, flushed to the disk before it returns.

A process that searches has the seen vectors in FAISS indices in memory. Before a search it applies what the log of
changes has, whole transactions at a time (`follow`); snapshots of the indices, mapped from files beside the
environment, are where it starts from (`snapshot`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightline.errors import GalleryError
from sightline.gallery.base import Count, Found, Gallery, GalleryVersion, State, parse_ids, parse_version
from sightline.gallery.follow import Entry, Follower, Slot
from sightline.gallery.snapshot import exclusive

__all__ = ["LmdbGallery"]

_MAP_BYTES = 1 << 40  # address space, not memory or disk: the most that a gallery can hold
_SLOTS, _READERS = 32, 1024
_REMEMBERED = 4096  # writes that a reader may be behind, or a snapshot, before all has to be read anew
_META, _CHANGES, _SEEN = b".meta", b".changes", b"seen"
_VERSION, _COUNT, _STATE, _SNAPSHOT = b"version:", b"count:", b"state:", b"snapshot"
_RECORD = np.dtype([("slot", "u1"), ("position", "<i8")])
_NONE = 255  # slot of an item that is not there
Value: TypeAlias = "bytes | memoryview[int]"


class LmdbGallery(Gallery):
    """A folder; made on first use unless `readonly`. Open it once per process, and after a fork, not before."""

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = Path(path)
        if readonly and not (self.path / "data.mdb").is_file():
            raise GalleryError(f"{self.path}: expected a gallery, there is none; `sightline gallery fill` makes one")
        with self._errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._env = lmdb.open(
                os.fspath(self.path), map_size=_MAP_BYTES, readonly=readonly, max_dbs=_SLOTS + 3,
                max_readers=_READERS, readahead=False, meminit=False,
            )  # fmt: skip
            self._env.reader_check()  # readers that were killed would keep old pages in use
            self._open(readonly)
        self._lock = threading.Lock()
        self._follower = Follower(self.path / "snapshots")
        self._known: tuple[int, dict[str, Slot]] = (-1, {})

    def _open(self, readonly: bool) -> None:
        """All databases, in one transaction of ours: `open_db` by itself would hold up other threads."""
        names = [_META, _CHANGES, _SEEN, *(b"vector.%d" % slot for slot in range(_SLOTS))]
        if readonly:
            databases = [self._env.open_db(name, create=False) for name in names]
        else:
            with self._env.begin(write=True) as txn:
                databases = [self._env.open_db(name, txn) for name in names]
        self._meta, self._changes, self._seen, *self._vector = databases

    def close(self) -> None:
        self._follower.clear()
        self._env.close()

    # --- versions ---------------------------------------------------------------------------------------

    def create(self, version: GalleryVersion) -> None:
        with self._write() as txn:
            slots = self._read_slots(txn)
            if version.name in slots:
                if slots[version.name].version != version:
                    raise GalleryError(
                        f"version {version.name!r} exists with other parameters: expected "
                        f"{slots[version.name].version.model_dump_json()}, got {version.model_dump_json()}; "
                        "give the new one a name of its own"
                    )
                return
            free = sorted(set(range(_SLOTS)) - {slot.number for slot in slots.values()})
            if not free:
                raise GalleryError(f"expected at most {_SLOTS} versions at a time; drop one")
            position = self._log(txn, Entry())
            key = _VERSION + b"%016d%02d" % (position, free[0])
            txn.put(key, version.model_dump_json().encode(), db=self._meta)

    def versions(self) -> list[GalleryVersion]:
        return [slot.version for slot in self._slots().values()]

    def drop(self, version: str) -> None:
        with self._write() as txn:
            slot = self._slot(version, self._read_slots(txn))
            if seen := self._counted(txn, slot.number):
                raise GalleryError(
                    f"version {version!r}: queries see {seen:,} items in it; show them in another version first"
                )
            txn.drop(self._vector[slot.number], delete=False)  # emptied, not closed: others may be reading from it
            txn.delete(_COUNT + b"%d" % slot.number, db=self._meta)
            txn.delete(_VERSION + b"%016d%02d" % (slot.serial, slot.number), db=self._meta)
            self._log(txn, Entry())

    def version(self, name: str) -> GalleryVersion:
        return self._slot(name, self._slots()).version

    def _slots(self) -> dict[str, Slot]:
        transaction = self._env.info()["last_txnid"]
        if self._known[0] != transaction:
            with self._read() as txn:
                self._known = (txn.id(), self._read_slots(txn))
        return self._known[1]

    def _read_slots(self, txn: lmdb.Transaction) -> dict[str, Slot]:
        found = {}
        for key, value in self._entries(txn, _VERSION):
            version = parse_version(bytes(value), str(self.path))
            found[version.name] = Slot(int(key[16:]), int(key[:16]), version)
        return found

    @staticmethod
    def _slot(name: str, slots: Mapping[str, Slot]) -> Slot:
        if name not in slots:
            raise GalleryError(f"version {name!r}: expected one of {', '.join(slots) or 'none so far'}")
        return slots[name]

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
        with self._write() as txn:
            slots = self._read_slots(txn)
            records = self._records(txn, numbers)
            written = np.ones(len(numbers), bool)
            if since is not None:
                written = (records["slot"] != _NONE) & (records["position"] <= since)
            numbers, records = numbers[written], records[written]
            keys = _keys(numbers)
            changed = [self._slot(name, slots).number for name in arrays]
            for slot, array in zip(changed, arrays.values(), strict=True):
                with txn.cursor(self._vector[slot]) as cursor:
                    cursor.putmulti(list(zip(keys, _pieces(array[written]), strict=True)))
            if replace:
                others = sorted({slot.number for slot in slots.values()} - set(changed))
                self._remove(txn, keys, others)
                changed += others
            if len(numbers):
                self._move(txn, numbers, records, self._slot(seen, slots).number, changed)
            self._put_state(txn, state)
        return written

    def show(self, version: str, ids: ArrayLike | None = None, *, state: State | None = None) -> int:
        wanted = None if ids is None else parse_ids(ids)
        with self._write() as txn:
            slot = self._slot(version, self._read_slots(txn)).number
            if wanted is None:
                with txn.cursor(self._vector[slot]) as cursor:
                    numbers = _numbers(cursor.iternext(values=False))
            else:
                numbers = np.unique(wanted)
                with txn.cursor(self._vector[slot]) as cursor:
                    numbers = numbers[[cursor.set_key(key) for key in _keys(numbers)]] if len(numbers) else numbers
            records = self._records(txn, numbers)
            moved = records["slot"] != slot
            if moved.any():
                self._move(txn, numbers[moved], records[moved], slot, [])
            self._put_state(txn, state)
        return int(moved.sum())

    def delete(self, ids: ArrayLike, *, state: State | None = None) -> None:
        numbers = np.unique(parse_ids(ids))
        with self._write() as txn:
            slots = [slot.number for slot in self._read_slots(txn).values()]
            records = self._records(txn, numbers)
            known = records["slot"] != _NONE
            if known.any():
                self._remove(txn, _keys(numbers[known]), slots)
                self._move(txn, numbers[known], records[known], _NONE, slots)
            self._put_state(txn, state)

    def _move(
        self, txn: lmdb.Transaction, ids: NDArray[np.int64], before: NDArray[Any], slot: int, changed: list[int]
    ) -> None:
        """Let queries see items of these records in that slot, count them, log them; `changed`: where vectors did."""
        after = np.empty(len(ids), _RECORD)
        after["slot"], after["position"] = slot, self._log(txn, Entry(ids, tuple(changed)))
        keys = _keys(ids)
        if slot == _NONE:
            for key in keys:
                txn.delete(key, db=self._seen)
        else:
            with txn.cursor(self._seen) as cursor:
                cursor.putmulti(list(zip(keys, _pieces(after), strict=True)))
        difference = np.bincount(after["slot"], minlength=_NONE + 1) - np.bincount(before["slot"], minlength=_NONE + 1)
        for number in np.flatnonzero(difference[:_NONE]).tolist():
            count = self._counted(txn, number) + int(difference[number])
            txn.put(_COUNT + b"%d" % number, b"%d" % count, db=self._meta)

    def _remove(self, txn: lmdb.Transaction, keys: list[bytes], slots: Iterable[int]) -> None:
        for slot in slots:
            for key in keys:
                txn.delete(key, db=self._vector[slot])

    def _records(self, txn: lmdb.Transaction, ids: NDArray[np.int64]) -> NDArray[Any]:
        absent = np.array((_NONE, -1), _RECORD).tobytes()
        with txn.cursor(self._seen) as cursor:
            return np.frombuffer(b"".join(cursor.get(key, absent) for key in _keys(ids)), _RECORD)

    def get(self, ids: ArrayLike, version: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        numbers, slot = parse_ids(ids), self._slot(version, self._slots())
        with self._read() as txn:
            return self._read_vectors(txn, slot, numbers)

    def _read_vectors(
        self, txn: lmdb.Transaction, slot: Slot, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        size = slot.version.dimension
        with txn.cursor(self._vector[slot.number]) as cursor:
            values = [cursor.get(key) for key in _keys(ids)]
        here = np.array([value is not None for value in values], bool)
        joined = b"".join(bytes(4 * size) if value is None else value for value in values)
        return np.frombuffer(joined, "<f4").reshape(len(ids), size).astype(np.float32), here

    def seen(self, ids: ArrayLike) -> list[str | None]:
        numbers = parse_ids(ids)
        with self._read() as txn:
            names = {slot.number: name for name, slot in self._read_slots(txn).items()}
            return [names.get(slot) for slot in self._records(txn, numbers)["slot"].tolist()]

    def count(self) -> dict[str, Count]:
        with self._read() as txn:
            return {
                name: Count(self._counted(txn, slot.number), txn.stat(self._vector[slot.number])["entries"])
                for name, slot in self._read_slots(txn).items()
            }

    def _counted(self, txn: lmdb.Transaction, slot: int) -> int:
        return int(bytes(txn.get(_COUNT + b"%d" % slot, b"0", db=self._meta)))

    def ids(self, version: str, *, seen: bool = True) -> NDArray[np.int64]:
        with self._read() as txn:
            slot = self._slot(version, self._read_slots(txn)).number
            if seen:
                return self._all_seen(txn).get(slot, np.zeros(0, np.int64))
            with txn.cursor(self._vector[slot]) as cursor:
                return _numbers(cursor.iternext(values=False))

    def _all_seen(self, txn: lmdb.Transaction) -> dict[int, NDArray[np.int64]]:
        """Slot → ids [N], ascending."""
        with txn.cursor(self._seen) as cursor:
            ids = _numbers(cursor.iternext(values=False))
            cursor.first()
            slots = np.frombuffer(b"".join(cursor.iternext(keys=False)), _RECORD)["slot"]
        return {int(slot): ids[slots == slot] for slot in np.unique(slots)}

    def position(self) -> int:
        with self._read() as txn:
            return self._last(txn)

    # --- queries ----------------------------------------------------------------------------------------

    def search(self, queries: Mapping[str, NDArray[Any]], k: int, *, effort: int | None = None) -> Found:
        arrays = self._queries(queries, k, effort)
        with self._lock:
            self._follow()
            return self._follower.search(arrays, k, effort)

    def _follow(self) -> None:
        """Apply what was written; a microsecond where nothing was: the number is in memory that all share."""
        if self._env.info()["last_txnid"] != self._follower.transaction:
            with self._read() as txn:
                self._follower.follow(_View(self, txn))

    # --- what jobs keep ---------------------------------------------------------------------------------

    def get_state(self, name: str) -> bytes | None:
        with self._read() as txn:
            value = txn.get(_STATE + name.encode(), db=self._meta)
            return None if value is None else bytes(value)

    def put_state(self, name: str, value: bytes | None) -> None:
        with self._write() as txn:
            self._put_state(txn, (name, value))

    def _put_state(self, txn: lmdb.Transaction, state: State | None) -> None:
        if state:
            name, value = _STATE + state[0].encode(), state[1]
            if value is None:
                txn.delete(name, db=self._meta)
            else:
                txn.put(name, value, db=self._meta)

    def compact(self, *, force: bool = False) -> bool:
        if self._env.flags()["readonly"]:
            raise GalleryError(f"{self.path}: expected a gallery that is open for writing")
        with self._errors(), exclusive(self.path / "snapshots") as alone:
            if not alone:
                return False
            with self._lock:
                self._follow()
                plan = self._follower.plan(force=force)
            if plan is None:
                return False
            number = plan.write(self.path / "snapshots")
            with self._write() as txn:
                txn.put(_SNAPSHOT, b"%d" % number, db=self._meta)
            plan.clean(self.path / "snapshots")
            return True

    def describe(self) -> dict[str, Any]:
        file, info = (self.path / "data.mdb").stat(), self._env.info()
        with self._lock:
            self._follow()
            memory = self._follower.describe()
        return {
            "gallery": "lmdb", "path": str(self.path), "file_bytes": file.st_blocks * 512,
            "limit_bytes": info["map_size"], "readers": info["num_readers"], "versions": memory,
        }  # fmt: skip

    # --- LMDB -------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[lmdb.Transaction]:
        with self._errors(), self._env.begin() as txn:  # copies: a million views are slow
            yield txn

    @contextmanager
    def _write(self) -> Iterator[lmdb.Transaction]:
        with self._errors(), self._env.begin(write=True) as txn:
            yield txn

    def _last(self, txn: lmdb.Transaction) -> int:
        with txn.cursor(self._changes) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0

    def _log(self, txn: lmdb.Transaction, entry: Entry) -> int:
        with txn.cursor(self._changes) as cursor:
            last = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
            cursor.put(_position(last + 1), entry.encode(), append=True)
            while cursor.first() and int.from_bytes(cursor.key(), "big") <= last + 1 - _REMEMBERED:
                cursor.delete()
        return last + 1

    def _entries(self, txn: lmdb.Transaction, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with txn.cursor(self._meta) as cursor:
            cursor.set_range(prefix)
            for key, value in cursor:
                if not bytes(key).startswith(prefix):
                    return
                yield bytes(key)[len(prefix) :], bytes(value)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise GalleryError(f"{self.path}: expected at most {_MAP_BYTES >> 30} GiB; use Milvus") from error
        except lmdb.ReadonlyError as error:
            raise GalleryError(f"{self.path}: expected a gallery that is open for writing") from error
        except (lmdb.Error, OSError) as error:
            raise GalleryError(f"{self.path}: expected a gallery that can be opened and used: {error}") from error


class _View:
    """The gallery at one moment, as a follower reads it."""

    def __init__(self, gallery: LmdbGallery, txn: lmdb.Transaction) -> None:
        self._gallery, self._txn = gallery, txn
        self.transaction = txn.id()
        self.position = gallery._last(txn)
        self.slots = list(gallery._read_slots(txn).values())
        self.snapshot = int(bytes(txn.get(_SNAPSHOT, b"0", db=gallery._meta)))

    def entries(self, after: int) -> list[Entry] | None:
        """Those behind a position; None where they are no longer remembered."""
        if after == self.position:
            return []
        with self._txn.cursor(self._gallery._changes) as cursor:
            if not cursor.set_key(_position(after + 1)):
                return None
            return [Entry.decode(bytes(value)) for value in cursor.iternext(keys=False)]

    def seen(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Numbers of the slots [N] in which queries see these ids; another number for those that are not there."""
        return self._gallery._records(self._txn, ids)["slot"]

    def all_seen(self, slot: Slot) -> NDArray[np.int64]:
        """Ids [N], ascending, that queries see there."""
        return self._all.get(slot.number, np.zeros(0, np.int64))

    @cached_property
    def _all(self) -> dict[int, NDArray[np.int64]]:
        return self._gallery._all_seen(self._txn)

    def vectors(self, slot: Slot, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, D], all of them there."""
        return self._gallery._read_vectors(self._txn, slot, ids)[0]


def _position(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _keys(ids: NDArray[np.int64]) -> list[bytes]:
    keys: list[bytes] = ids.astype(">i8").view("V8").tolist()
    return keys


def _numbers(keys: Iterable[Value]) -> NDArray[np.int64]:
    return np.frombuffer(b"".join(keys), ">i8").astype(np.int64)


def _pieces(rows: NDArray[Any]) -> list[bytes]:
    """The bytes of each row of a contiguous array."""
    if not len(rows):
        return []
    size = rows.nbytes // len(rows)
    pieces: list[bytes] = np.ascontiguousarray(rows).reshape(len(rows), -1).view(f"V{size}").ravel().tolist()
    return pieces
