"""The contract of every feature store, on LMDB, a Redis server and a Redis cluster; then what is LMDB's alone."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sightline.commands import store as commands
from sightline.errors import DataError, StoreError
from sightline.store import Items, ItemSchema, Schema, Status, open_store, transfer
from sightline.store.base import FeatureStore
from sightline.store.records import encode_items
from tests.feature_stores import NEW, OLD, PROCESSES, USERS, items, user


def contents(location: str) -> dict[str, list[tuple[int, bytes, bytes | None]]]:
    """Every byte of a store."""
    with open_store(location, readonly=True) as store:
        return {schema.space: [row for rows in store.scan(schema, 100) for row in rows] for schema in store.schemas()}


# --- items --------------------------------------------------------------------------------------------------


def test_newest_accepted_version_is_read(location: str) -> None:
    old, new = items(OLD, [1, 2, 3, 256, 2**40]), items(NEW, [2, 3, 2**40])
    with open_store(location) as store:
        store.register(OLD)
        store.register(NEW)
        store.write_items("v1", old)
        store.write_items("v2", new)
        asked = [3, 1, 999, 2, 2**40, 3, 0]
        batch = store.read_items(np.array(asked), ["v2", "v1"])
        assert batch.status.tolist() == [0, 1, 2, 0, 0, 0, 2]
        assert batch.version.tolist() == [0, 1, -1, 0, 0, 0, -1]
        assert batch.has_vector.tolist() == [False, False, False, True, True, False, False]
        assert (batch.tokens.dtype, batch.tokens.shape) == (np.int64, (7, 6))
        assert (batch.vectors.dtype, batch.vectors.shape) == (np.float16, (7, 3))
        for row, (identity, status) in enumerate(zip(asked, batch.status, strict=True)):
            source = (new, old, None)[status]
            expected = source.tokens[source.ids == identity][0].tolist() if source else []
            assert batch.tokens[row].tolist() == expected + [0] * (6 - len(expected))
        assert np.array_equal(batch.vectors[3], new.vectors[0].astype(np.float16))
        assert not batch.vectors[[0, 1, 2, 5, 6]].any()
        turned = store.read_items([2, 1], ["v1", "v2"])
        assert turned.status.tolist() == [0, 0]
        assert store.read_items([], ["v1"]).tokens.shape == (0, 4)


def test_details(location: str) -> None:
    with open_store(location) as store:
        for schema, ids in ((OLD, [1, 2, 3]), (NEW, [2])):
            store.register(schema)
            store.write_items(schema.version, items(schema, ids))
        new, unknown, old = store.read_details([2, 9, 3], ["v2", "v1"])
    assert unknown is None
    assert new is not None
    assert old is not None
    assert (new.status, new.schema, new.caption) == (Status.fresh, NEW, "v2: Tasse № 2, 0")
    assert (old.status, old.schema.captioner, old.caption) == (Status.stale_version, "caption-1", "v1: Tasse № 3, 0")
    assert (new.media_hash, old.media_hash) == (f"{62:064x}", None)
    assert new.tokens == items(NEW, [2]).tokens[0].tolist()
    assert np.allclose(new.vector, np.sin([2, 3, 4]), atol=1e-3)
    assert old.vector is None


def test_written_again_is_replaced_for_other_readers(location: str, tmp_path: Path) -> None:
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1, 2]))
        if not location.startswith("redis"):
            child = PROCESSES.Process(target=_rewrite, args=(location,))
            child.start()
            child.join()
        else:
            _rewrite(location)
        assert store.read_details([1, 2], ["v1"])[1].caption == "v1: Tasse № 2, 5"
        assert store.count(OLD) == 2


def _rewrite(location: str) -> None:
    with open_store(location) as store:
        store.write_items("v1", items(OLD, [1, 2], generation=5))


def test_large_reads_are_complete(location: str) -> None:
    written = items(NEW, list(range(1, 5001)))
    with open_store(location) as store:
        store.register(NEW)
        store.write_items("v2", written)
        ids = np.random.default_rng(0).integers(1, 6001, 4096)
        batch = store.read_items(ids, ["v2"])
    known = ids <= 5000
    assert np.array_equal(batch.status == Status.fresh, known)
    assert np.array_equal(batch.tokens[known], written.tokens[ids[known] - 1])
    assert not batch.tokens[~known].any()


def test_schemas_are_kept_and_defended(location: str) -> None:
    with open_store(location) as store:
        store.register(OLD)
        store.register(OLD)
    with open_store(location) as store:
        assert store.schemas() == [OLD]
        with pytest.raises(StoreError, match=r"item\.v1 is registered with another schema: .*give the new one"):
            store.register(OLD.model_copy(update={"tokens": 5}))
        with pytest.raises(StoreError, match=r"item\.v7: expected a registered version, one of item\.v1"):
            store.read_items([1], ["v1", "v7"])
        with pytest.raises(StoreError, match=r"user\.v1: expected a registered version"):
            store.write_users("v1", [])
        with pytest.raises(StoreError, match="accept: expected a list of versions"):
            store.read_items([1], "v1")
        with pytest.raises(StoreError, match=r"ids: expected int64 \[N\], got float64"):
            store.read_items(np.ones(3), ["v1"])


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"ids": np.array([1, 1])}, "expected ids above 0, each once"),
    ({"ids": np.array([0, 1])}, "expected ids above 0"),
    ({"tokens": np.ones((2, 5), int)}, r"tokens: expected ids from 0 to 2\*\*31 - 1 of shape \[2, 6\], got int64 of"),
    ({"tokens": np.full((2, 6), -1)}, "tokens: expected ids from 0"),
    ({"tokens": np.full((2, 6), 2**31)}, "tokens: expected ids from 0"),
    ({"tokens": np.ones((2, 6))}, "got float64"),
    ({"captions": ["one"]}, "expected 2 captions and media hashes, one per id; got 1 and 2"),
    ({"media_hashes": [None, "abc"]}, "media hash 1: expected 64 hexadecimal digits"),
    ({"vectors": np.ones((2, 4))}, r"vectors: expected finite numbers of shape \[2, 3\], got shape \[2, 4\]"),
    ({"vectors": np.full((2, 3), np.nan)}, "with others among them"),
    ({"vectors": np.full((2, 3), 1e6)}, "vectors as float16: expected finite numbers"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_items_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    fitting = vars(items(NEW, [2, 4]))
    encode_items(NEW, Items(**fitting))
    with pytest.raises(DataError, match=message):
        encode_items(NEW, Items(**fitting | change))


def test_layout_of_records_is_as_documented() -> None:
    """Readers in other languages, and stores on disk, rely on these bytes."""
    (record,), (caption,) = encode_items(NEW, items(NEW, [2]))
    magic, layout, schema, size, crc, flags, identity = struct.unpack_from("<4sIIIIIq", record)
    assert (magic, layout, size, flags, identity) == (b"SLfr", 1, len(record), 1, 2)
    text = '{"captioner": "caption-2", "token_spec": "spec-2", "tokens": 6, "vector": 3, "version": "v2"}'
    assert schema == zlib.crc32(f"item.v2 {text}".encode())
    assert crc == zlib.crc32(record[20:])
    assert record[32:64].hex() == f"{62:064x}"
    assert struct.unpack_from("<I6i3e", record, 64) == (
        zlib.crc32(caption), 15, 16, 17, 18, 19, 20, *np.sin([2, 3, 4]).astype(np.float16),
    )  # fmt: skip
    assert len(record) == 64 + 4 + 6 * 4 + 3 * 2


# --- users --------------------------------------------------------------------------------------------------


def test_users(location: str) -> None:
    newer = USERS.model_copy(update={"version": "v2", "profile": 2})
    with open_store(location) as store:
        store.register(USERS)
        store.register(newer)
        store.write_users("v1", [user(10, 3), user(11, 0)])
        store.write_users("v2", [user(11, 2)])
        found, newest, unknown = (store.read_user(identity, ["v2", "v1"]) for identity in (10, 11, 12))
        with pytest.raises(DataError, match=r"user\.v1, user 5: expected at most 3 events"):
            store.write_users("v1", [user(5, 4)])
    assert (found.status, found.version) == (Status.stale_version, 1)
    assert (newest.status, newest.version) == (Status.fresh, 0)
    assert (unknown.status, unknown.version, unknown.record) == (Status.missing, -1, None)
    assert newest.record is not None
    assert len(newest.record.items) == 2
    expected = user(10, 3)
    assert found.record is not None
    assert (found.record.id, found.record.state) == (10, expected.state)
    for one, other in ((found.record, expected), (found.record.profile, expected.profile)):
        for name, value in vars(other).items():
            if isinstance(value, np.ndarray):
                assert getattr(one, name).dtype == value.dtype, name
                assert np.array_equal(getattr(one, name), value), name


# --- removal ------------------------------------------------------------------------------------------------


def test_deleted_items_and_users_are_missing(location: str) -> None:
    ids = list(range(1, 201))
    with open_store(location) as store:
        for schema in (OLD, NEW):
            store.register(schema)
            store.write_items(schema.version, items(schema, ids))
        store.register(USERS)
        store.write_users("v1", [user(one, 2) for one in ids])
        before = {schema.space: [row for rows in store.scan(schema) for row in rows] for schema in (OLD, NEW)}
        store.delete(NEW, [*range(1, 101), 999])
        store.delete(NEW, [])
        store.delete(USERS, [7])
        assert [store.count(schema) for schema in (OLD, NEW, USERS)] == [200, 100, 199]
        assert store.read_items([100, 101], ["v2", "v1"]).status.tolist() == [Status.stale_version, Status.fresh]
        assert store.read_user(7, ["v1"]).status == Status.missing
        with store._snapshot() as read:
            ((gone, kept),) = read(np.array([100, 101]), [NEW.texts])
            assert gone is None
            assert kept is not None
        with pytest.raises(StoreError, match=r"item\.v7: expected a registered version"):
            store.delete(NEW.model_copy(update={"version": "v7"}), [1])
    found = contents(location)
    assert (found["item.v1"], found["item.v2"]) == (before["item.v1"], before["item.v2"][100:])


def test_dropped_version_is_gone_with_all_that_belongs_to_it(location: str, tmp_path: Path) -> None:
    longer = NEW.model_copy(update={"version": "v2.1"})  # its name begins as the dropped one's
    users = USERS.model_copy(update={"version": "v2"})  # its name is the dropped one's
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1, 2, 3]))
        store.register(users)
        store.write_users("v2", [user(1, 2)])
        for schema in (NEW, longer):
            with pytest.raises(KeyboardInterrupt):
                _load_some(store, write_features(tmp_path / schema.version, schema, 3000, group=2500))
        assert [store.count(NEW), len(store.marks())] == [2500, 2]
    before = contents(location)
    with open_store(location) as store:
        store.drop(NEW)
        for again in (lambda: store.drop(NEW), lambda: store.read_items([1], ["v2"])):
            with pytest.raises(StoreError, match=r"item\.v2: expected a registered version"):
                again()
    assert contents(location) == {space: rows for space, rows in before.items() if space != "item.v2"}
    with open_store(location) as store:
        assert [name.rpartition(":")[0] for name in store.marks()] == ["item.v2.1"]
        other = NEW.model_copy(update={"tokens": 7})
        store.register(other)
        with store._snapshot() as read:
            assert read(np.array([1, 2]), [NEW.space, NEW.texts]) == [[None, None]] * 2
        store.write_items("v2", items(other, [2]))
        assert store.read_items([1, 2], ["v2", "v1"]).status.tolist() == [Status.stale_version, Status.fresh]


def _load_some(store: FeatureStore, path: Path) -> None:
    """The first 2500 rows; then KeyboardInterrupt."""

    def stop(rows: int) -> None:
        if rows:
            raise KeyboardInterrupt

    transfer.load(store, path, stop, batch=2500)


def test_who_reads_a_dropped_version_gets_the_next(location: str) -> None:
    with open_store(location) as store:
        for schema in (OLD, NEW):
            store.register(schema)
            store.write_items(schema.version, items(schema, [1, 2]))
        assert not store.read_items([1, 2], ["v2", "v1"]).status.any()
        child = PROCESSES.Process(target=_drop, args=(location,))
        child.start()
        child.join()
        assert child.exitcode == 0
        batch = store.read_items([1, 2], ["v2", "v1"])
    assert batch.status.tolist() == [Status.stale_version] * 2
    assert np.array_equal(batch.tokens[:, :4], items(OLD, [1, 2]).tokens)


def _drop(location: str) -> None:
    with open_store(location) as store:
        store.drop(NEW)


# --- damage -------------------------------------------------------------------------------------------------

DAMAGE: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda record: record[:-1], "expected 98 bytes, got 97"),
    (lambda record: b"", "expected 98 bytes, got 0"),
    (lambda record: record + b"x", "expected 98 bytes, got 99"),
    (lambda record: b"xxxx" + record[4:], "magic: expected"),
    (lambda record: record[:4] + b"\2" + record[5:], "layout: expected 1, got 2"),
    (lambda record: record[:8] + b"abcd" + record[12:], "schema: expected"),
    (lambda record: record[:24] + b"\5" + record[25:], "id: expected 4, got 5"),
    (lambda record: record[:80] + bytes([record[80] ^ 1]) + record[81:], "checksum: the record is damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_verify_finds_damage(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    with open_store(str(tmp_path)) as store:
        store.register(NEW)
        store.write_items("v2", items(NEW, [2, 4, 6]))
        (_, (_, record, _), _) = next(store.scan(NEW))
        store._write(np.array([4]), {NEW.space: [damage(record)]}, None)
        report = transfer.verify(store, NEW, lambda rows: None)
        assert report.records == 3
        assert report.damaged.keys() == {4}
        assert message in report.damaged[4]
        assert store.read_details([4], ["v2"]) == [None]
        with pytest.raises(StoreError, match=r"item\.v2: 4: "):
            transfer.export(store, NEW, tmp_path / "out.parquet", lambda rows: None)


def test_damaged_records_do_not_fail_the_others(location: str, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(location) as store:
        for schema in (OLD, NEW):
            store.register(schema)
            store.write_items(schema.version, items(schema, [2, 4, 6, 8]))
        (record,), _ = encode_items(NEW, items(NEW, [8]))
        store._write(np.array([4, 6]), {NEW.space: [b"short", record]}, None)
        batch = store.read_items([2, 4, 6, 8], ["v2", "v1"])
        assert batch.status.tolist() == [0, 1, 1, 0]
        assert np.array_equal(batch.tokens[2, :4], items(OLD, [6]).tokens[0])
        assert "damaged records, among them that of item 6" in caplog.text


def test_verify_finds_captions_of_others(location: str) -> None:
    with open_store(location) as store:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1, 2]))
        store._write(np.array([2]), {OLD.texts: [b"other"]}, None)
        report = transfer.verify(store, OLD, lambda rows: None)
        assert report.damaged == {2: "caption: not the one that the record was written with"}


# --- Parquet ------------------------------------------------------------------------------------------------


def write_features(path: Path, schema: ItemSchema, rows: int, group: int) -> Path:
    table = transfer.item_table(schema, items(schema, list(range(1, rows + 1))))
    pq.write_table(table, path, row_group_size=group)
    return path


def test_export_and_load_keep_every_byte(location: str, tmp_path: Path) -> None:
    versions: list[Schema] = [OLD, NEW, USERS]
    with open_store(location) as store:
        for schema in versions:
            store.register(schema)
        store.write_items("v1", items(OLD, [1, 2, 2**40]))
        store.write_items("v2", items(NEW, list(range(1, 300))))
        store.write_users("v1", [user(one, one % 4) for one in range(1, 40)])
        for schema in versions:
            transfer.export(store, schema, tmp_path / f"{schema.space}.parquet", lambda rows: None)
    with open_store(str(tmp_path / "copy")) as copy:
        for schema in versions:
            assert transfer.load(copy, tmp_path / f"{schema.space}.parquet", lambda rows: None, batch=64) == schema
    assert contents(str(tmp_path / "copy")) == contents(location)
    assert [len(rows) for rows in contents(location).values()] == [3, 299, 39]


def test_load_goes_on_where_it_stopped(location: str, tmp_path: Path) -> None:
    path = write_features(tmp_path / "items.parquet", NEW, 1000, group=300)
    seen: list[int] = []

    def stop(rows: int) -> None:
        seen.append(rows)
        if sum(seen) >= 350:
            raise KeyboardInterrupt

    with open_store(location) as store:
        with pytest.raises(KeyboardInterrupt):
            transfer.load(store, path, stop, batch=100)
        assert seen == [0, 100, 100, 100, 100]
        assert list(store.marks().values()) == [400]
        assert store.count(NEW) == 400
        seen.clear()
        transfer.load(store, path, seen.append, batch=150)
        assert seen == [400, 50, 150, 150, 150, 100]  # row groups end at 300, 600, 900
        assert store.marks() == {}
        assert transfer.verify(store, NEW, lambda rows: None).records == 1000
        seen.clear()
        transfer.load(store, path, seen.append, batch=1000)
        assert seen[0] == 0, "a finished load begins anew"


def test_files_that_are_no_features_are_refused(tmp_path: Path) -> None:
    good = transfer.item_table(NEW, items(NEW, [2, 4]))
    path = tmp_path / "bad.parquet"

    def refuse(table: pa.Table, message: str) -> None:
        pq.write_table(table, path)
        with open_store(str(tmp_path / "store")) as store, pytest.raises(DataError, match=message):
            transfer.load(store, path, lambda rows: None)

    refuse(good.replace_schema_metadata({}), r"expected sightline\.store in the file's metadata")
    refuse(good.drop_columns(["caption"]), "there is no caption")
    short = pa.array([[1] * 6, [1] * 5], pa.list_(pa.int32()))
    refuse(good.set_column(1, "tokens", short), "rows 0 to 1: column 'tokens': expected lists of 6, got lengths from 5")
    refuse(good.set_column(2, "caption", pa.array(["one", None])), "rows 0 to 1: .*caption")
    refuse(good.set_column(3, "media_hash", pa.array(["one", None])), "media hash 0: expected 64 hexadecimal digits")
    path.write_text("text")
    with open_store(str(tmp_path / "store")) as store, pytest.raises(DataError, match="expected a Parquet file"):
        transfer.load(store, path, lambda rows: None)


# --- processes ----------------------------------------------------------------------------------------------


def _load(location: str, path: Path, acknowledged: Connection) -> None:
    with open_store(location) as store:
        transfer.load(store, path, acknowledged.send, batch=64)


def _checked(location: str, at_least: int, position: int) -> None:
    """All that was acknowledged is there, as it was written, and nothing else; the log of changes names all of it."""
    with open_store(location) as store:
        (mark,) = store.marks().values()  # first: a server may still be at the last command of a client that is dead
        assert mark >= at_least
        report = transfer.verify(store, NEW, lambda rows: None)
        assert report.damaged == {}
        if location.startswith("redis"):
            assert mark <= report.records <= mark + 64
        else:
            assert report.records == mark
        ids = np.arange(1, mark + 1)
        batch = store.read_items(ids, ["v2"])
        assert not batch.status.any()
        assert np.array_equal(batch.tokens, items(NEW, ids.tolist()).tokens)
        _, changed = store.changes(position)
        assert changed is not None
        assert np.array_equal(changed[:mark], ids)


@pytest.mark.parametrize("location", ["lmdb", "lone_redis"], indirect=True)
def test_killed_loader_loses_nothing_that_was_acknowledged(location: str, tmp_path: Path) -> None:
    """kill −9 twelve times at random moments; each loader goes on where the last one was killed."""
    path = write_features(tmp_path / "items.parquet", NEW, 12_000, group=1000)
    chance = random.Random(0)
    acknowledged = 0
    with open_store(location) as store:
        store.register(NEW)
        store.delete(NEW, [99_999])
        position, _ = store.changes(-1)
    for _ in range(12):
        here, there = PROCESSES.Pipe(duplex=False)
        loader = PROCESSES.Process(target=_load, args=(location, path, there))
        loader.start()
        there.close()
        resumed = here.recv()
        assert resumed >= acknowledged
        heard = [resumed, *(here.recv() for _ in range(chance.randint(1, 5)))]
        time.sleep(chance.uniform(0, 0.005))
        loader.kill()
        loader.join()
        assert loader.exitcode == -9
        while here.poll():
            try:
                heard.append(here.recv())
            except EOFError:
                break
        here.close()
        acknowledged = sum(heard)
        _checked(location, acknowledged, position)
    with open_store(location) as store:
        heard = []
        transfer.load(store, path, heard.append)
        assert heard[0] >= acknowledged > 12 * 64
        assert store.marks() == {}
        assert transfer.verify(store, NEW, lambda rows: None).records == 12_000


def _watch(location: str, result: Connection) -> None:
    """Read a batch and an item's caption until there were five generations; send them, or what was wrong."""
    seen: set[int] = set()
    with open_store(location, readonly=True) as store:
        while len(seen) < 5:
            tokens = store.read_items(np.arange(1, 201), ["v2"]).tokens
            (details,) = store.read_details([3], ["v2"])
            if len(found := np.unique(tokens)) > 1 or details is None or details.caption != str(details.tokens[0]):
                result.send(f"half a write: {found} {details}")
                return
            seen.add(int(found[0]))
    result.send(seen)


@pytest.mark.parametrize("location", ["lmdb", "lone_redis"], indirect=True)
def test_reading_processes_never_see_half_of_a_write(location: str) -> None:
    """One writer, four reading processes. A generation fills all tokens of all items with one number."""
    ids = np.arange(1, 201)

    def generation(number: int) -> Items:
        return Items(ids=ids, tokens=np.full((200, 6), number), captions=[str(number)] * 200, media_hashes=[None] * 200)

    with open_store(location) as store:
        store.register(NEW)
        store.write_items("v2", generation(1))
    readers = []
    for _ in range(4):
        here, there = PROCESSES.Pipe(duplex=False)
        readers.append((PROCESSES.Process(target=_watch, args=(location, there)), here))
        readers[-1][0].start()
        there.close()
    number = 1
    with open_store(location) as store:
        while any(process.is_alive() for process, _ in readers):
            number += 1
            store.write_items("v2", generation(number))
    for process, result in readers:
        seen = result.recv()
        process.join()
        result.close()
        assert isinstance(seen, set), seen
        assert seen <= set(range(1, number + 1))


# --- the embedded store -------------------------------------------------------------------------------------


def test_reading_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a feature store, there is none"):
        open_store(str(tmp_path / "none"), readonly=True)
    assert not (tmp_path / "none").exists()


def test_read_only_store_does_not_write(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as store:
        store.register(OLD)
    with open_store(str(tmp_path), readonly=True) as store, pytest.raises(StoreError, match=r"[Rr]ead-only|Permission"):
        store.write_items("v1", items(OLD, [1]))


def test_folder_that_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match="expected a feature store that can be opened"):
        open_store(str(tmp_path), readonly=True)


# --- the command --------------------------------------------------------------------------------------------


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_command(tmp_path: Path, location: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for schema in (OLD, NEW):
        write_features(source / f"{schema.version}.parquet", schema, 100, group=40)
    pq.write_table(transfer.user_table(USERS, [user(10, 2)]), source / "users.parquet")
    assert "v2.parquet: 100 records of item.v2" in run("load", source, "--store", location)

    shown = json.loads(run("stats", "--store", location))
    assert [(one["kind"], one["version"], one["records"]) for one in shown["versions"]] == [
        ("item", "v1", 100), ("item", "v2", 100), ("user", "v1", 1),
    ]  # fmt: skip
    assert shown["unfinished_loads"] == {}

    lines = [json.loads(line) for line in run("get", "item", 2, "--store", location).splitlines()]
    assert [line["caption"] for line in lines] == ["v1: Tasse № 2, 0", "v2: Tasse № 2, 0"]
    assert json.loads(run("get", "user", 10, "--store", location))["profile"]["tokens"] == [10, 0]
    assert run("get", "item", 101, "--store", location, code=1) == ""

    assert json.loads(run("verify", "--store", location))["item.v2"] == {"records": 100, "damaged": {}}
    run("export", tmp_path / "out", "--version", "v2", "--store", location)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["item.v2.parquet"]
    with open_store(location) as store:
        store._write(np.array([7]), {NEW.space: [b"short"]}, None)
    report = json.loads(run("verify", "--version", "v2", "--store", location, code=1))
    assert report["item.v2"]["damaged"].keys() == {"7"}

    drop = ("drop", "--version", "v1", "--store", location, "--kind")
    assert "removed" not in run(*drop, "item", code=1), "nobody said yes"
    assert json.loads(run("stats", "--store", location))["versions"] == shown["versions"]
    assert run(*drop, "item", "--yes") == "item.v1: 100 records removed\n"
    shown = json.loads(run("stats", "--store", location))
    assert [(one["kind"], one["version"]) for one in shown["versions"]] == [("item", "v2"), ("user", "v1")]
