"""The log of changed items, by which readers know what of their memory is out of date."""

from __future__ import annotations

import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import numpy as np
import pytest

from sightline.store import embedded, open_store, server
from tests.feature_stores import NEW, OLD, PROCESSES, USERS, empty, items, user


def test_changes_name_written_and_deleted_items(location: str) -> None:
    with open_store(location) as store:
        for schema in (OLD, NEW, USERS):
            store.register(schema)
        store.write_items("v1", items(OLD, [1, 2, 3]))
        first, unknown = store.changes(-1)
        assert unknown is None
        assert first > 0
        position, nothing = store.changes(first)
        assert (position, nothing.tolist(), nothing.dtype) == (first, [], np.int64)
        store.write_items("v1", items(OLD, [2**40, 2]))
        second, _ = store.changes(first)
        store.write_items("v2", items(NEW, [2, 7]))
        store.delete(OLD, [1, 99])
        last, ids = store.changes(first)
        assert first < second < last
        assert (ids.tolist(), ids.dtype) == ([1, 2, 7, 99, 2**40], np.int64)
        assert store.changes(second)[1].tolist() == [1, 2, 7, 99]
        store.write_users("v1", [user(5, 1)])
        store.update_users("v1", [6], lambda identity, record: user(identity, 0))
        store.delete(USERS, [5])
        store.delete(OLD, [])
        position, nothing = store.changes(last)
        assert (position, nothing.tolist()) == (last, [])


def test_drop_changes_everything(location: str) -> None:
    with open_store(location) as store:
        for schema in (OLD, NEW, USERS):
            store.register(schema)
        store.write_items("v2", items(NEW, [1]))
        before, _ = store.changes(-1)
        store.drop(USERS)
        assert store.changes(before)[1].tolist() == []
        store.drop(NEW)
        store.write_items("v1", items(OLD, [2]))
        position, ids = store.changes(before)
        assert ids is None
        store.write_items("v1", items(OLD, [3]))
        assert store.changes(position)[1].tolist() == [3]


def test_log_is_bounded(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis gives up entries by the hundred."""
    for module in (embedded, server):
        monkeypatch.setattr(module, "REMEMBERED", 5)
    with open_store(location) as store:
        store.register(OLD)
        positions = []
        for one in range(1, 211):
            store.write_items("v1", items(OLD, [one]))
            positions.append(store.changes(positions[-1] if positions else 0)[0])
        assert positions == sorted(set(positions))
        assert store.changes(positions[0]) == (positions[-1], None)
        assert store.changes(positions[-6])[1].tolist() == [206, 207, 208, 209, 210]
        if not location.startswith("redis"):
            assert store.changes(positions[-7])[1] is None


def test_positions_that_the_store_does_not_know(location: str) -> None:
    """As after a server came back without its last writes, or a store was put back from a copy."""
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1]))
        position, _ = store.changes(-1)
        assert store.changes(position + 1) == (position, None)
        if location.startswith("redis"):
            empty(location)
            assert store.changes(position) == (0, None)
            position, nothing = store.changes(0)
            assert (position, nothing.tolist()) == (0, [])


def _write(location: str, first: int, writes: int) -> None:
    with open_store(location) as store:
        for one in range(first, first + writes):
            store.write_items("v1", items(OLD, [one, one + 1000]))


def test_reader_hears_of_every_write_of_other_processes(location: str) -> None:
    """Two writers; whatever is named is there to be read."""
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [9999]))
    heard: list[int] = []
    with open_store(location, readonly=True) as reader:
        position, _ = reader.changes(-1)
        writers = [PROCESSES.Process(target=_write, args=(location, first, 100)) for first in (1, 501)]
        for writer in writers:
            writer.start()
        until = time.monotonic() + 60
        while len(heard) < 400 and time.monotonic() < until:
            now, ids = reader.changes(position)
            assert now >= position
            assert ids is not None
            assert not reader.read_items(ids, ["v1"]).status.any()
            heard += ids.tolist()
            position = now
        for writer in writers:
            writer.join()
    assert sorted(heard) == [*range(1, 101), *range(501, 601), *range(1001, 1101), *range(1501, 1601)]


def _write_until_killed(location: str, acknowledged: Connection) -> None:
    with open_store(location) as store:
        for one in range(1, 100_000):
            store.write_items("v1", items(OLD, [one]))
            acknowledged.send(one)


@pytest.mark.parametrize("location", ["lmdb", "lone_redis"], indirect=True)
def test_killed_writer_leaves_no_write_without_its_entry(location: str) -> None:
    """kill −9 five times; what is in the store and what the log names are the same, acknowledged or not."""
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1]))
    for attempt in range(5):
        with open_store(location) as store:
            store.delete(OLD, np.arange(1, 5000))
            position, _ = store.changes(-1)
        here, there = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=_write_until_killed, args=(location, there))
        writer.start()
        there.close()
        while (acknowledged := here.recv()) < 20 + attempt:
            pass
        writer.kill()
        writer.join()
        here.close()
        with open_store(location) as store:
            _, ids = store.changes(position)
            status = store.read_items(np.arange(1, 5000), ["v1"]).status
        assert ids is not None
        assert len(ids) >= acknowledged
        assert np.array_equal(ids, np.arange(1, len(ids) + 1))
        assert np.array_equal(np.flatnonzero(status == 0) + 1, ids)


# --- the embedded store -------------------------------------------------------------------------------------


def test_store_without_a_log(tmp_path: Path) -> None:
    """As written before there were logs."""
    with open_store(str(tmp_path)) as store:
        store.register(OLD)
    with lmdb.open(str(tmp_path), max_dbs=8) as environment, environment.begin(write=True) as txn:
        txn.drop(environment.open_db(b".changes", txn), delete=True)
    with open_store(str(tmp_path), readonly=True) as reader:
        assert reader.changes(-1) == (0, None)
        for _ in range(2):
            position, nothing = reader.changes(0)
            assert (position, nothing.tolist()) == (0, [])
        writer = PROCESSES.Process(target=_write, args=(str(tmp_path), 1, 2))
        writer.start()
        writer.join()
        position, ids = reader.changes(0)
        assert (position, ids.tolist()) == (2, [1, 2, 1001, 1002])


def test_asking_whether_anything_changed_costs_next_to_nothing(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, list(range(1, 2000))))
        position, _ = store.changes(-1)
        seconds = []
        for _ in range(500):
            start = time.perf_counter()
            store.changes(position)
            seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 50e-6
