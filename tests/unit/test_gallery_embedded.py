"""The embedded gallery: several processes, kill −9, snapshots, approximate indices."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightline.errors import GalleryError
from sightline.gallery import GalleryVersion, embedded, open_gallery, snapshot
from sightline.gallery.embedded import LmdbGallery
from sightline.gallery.frozen import FrozenIndex, build
from sightline.gallery.rows import FlatRows
from tests.galleries import NEW, OLD, assert_same, brute_force, unit

COUNT, QUERIES = 3000, 20
A, B = unit(COUNT + QUERIES, 8, 1), unit(COUNT + QUERIES, 12, 2)
A, QA, B, QB = A[:COUNT], A[COUNT:], B[:COUNT], B[COUNT:]
IDS = np.random.default_rng(3).permutation(10**6)[:COUNT]
ASKED = {"v1": QA, "v2": QB}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sightline.gallery.embedded"])


def versions(kind: str) -> list[GalleryVersion]:
    return [version.model_copy(update={"index": kind, "effort": 128}) for version in (OLD, NEW)]


@contextmanager
def elsewhere(path: Path) -> Iterator[Callable[[], Any]]:
    """Another process that has the gallery open: what it finds when asked."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_answer, args=(path, there))
    process.start()
    there.close()

    def ask() -> Any:
        here.send("search")
        return here.recv()

    yield ask
    here.send(None)
    process.join()


def _answer(path: Path, asked: Connection) -> None:
    with LmdbGallery(path, readonly=True) as gallery:
        while asked.recv():
            asked.send((gallery.search(ASKED, 10), in_memory(gallery)))


def in_memory(gallery: LmdbGallery) -> dict[str, dict[int, bytes]]:
    """Version → id → vector, of all that a search in this process can find."""
    found = {}
    for slot, rows in gallery._follower._rows.items():
        ids, vectors = rows.fresh.contents()
        everything = dict(zip(ids.tolist(), map(bytes, vectors), strict=True))
        assert len(everything) == len(ids)
        if rows.frozen:
            kept = np.flatnonzero(rows.frozen.shown)
            index = rows.frozen.index
            if hasattr(index, "make_direct_map"):
                index.make_direct_map()
            indexed = dict(zip(rows.frozen.ids[kept].tolist(), map(bytes, index.reconstruct_batch(kept)), strict=True))
            assert len(indexed) == len(kept)
            assert not indexed.keys() & everything.keys()
            everything |= indexed
        found[slot.version.name] = everything
    return found


def stored(gallery: LmdbGallery) -> dict[str, dict[int, bytes]]:
    """The same from LMDB."""
    return {
        version.name: dict(zip(ids.tolist(), map(bytes, gallery.get(ids, version.name)[0]), strict=True))
        for version in gallery.versions() for ids in [gallery.ids(version.name)]
    }  # fmt: skip


def recall(gallery: LmdbGallery, place: np.ndarray[Any, Any]) -> float:
    found = gallery.search(ASKED, 10)
    expected = brute_force([QA, QB], [A, B], IDS, place, 10)
    assert all(len(set(row)) == 10 for row in found.ids)
    return float(np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found.ids, expected.ids, strict=True)]))


# --- indices and snapshots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_snapshot_and_tail_are_what_is_stored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "FRESH", 400)
    monkeypatch.setattr(snapshot, "DEAD", {"ivf": 0.3, "hnsw": 0.3})
    rng, place = np.random.default_rng(0), np.zeros(COUNT, int)
    with LmdbGallery(tmp_path) as gallery, elsewhere(tmp_path) as other:
        for version in versions(kind):
            gallery.create(version)
        gallery.put(IDS, {"v1": A}, "v1")
        other()  # has it all before there is a snapshot
        assert gallery.compact()
        built = 0
        for part in np.array_split(rng.permutation(COUNT), 8):
            gallery.put(IDS[part], {"v2": B[part]}, "v2")
            place[part] = 1
            gallery.put(IDS[part[:5]], {"v1": A[part[:5]]}, "v1", replace=True)
            place[part[:5]] = 0
            gallery.delete(IDS[part[5:7]])
            place[part[5:7]] = -1
            built += gallery.compact()
            assert recall(gallery, place) >= (1 if kind == "flat" else 0.95)
            found, held = other()
            assert held == in_memory(gallery) == stored(gallery)
            assert_same(found, gallery.search(ASKED, 10))
        assert 2 <= built < 8
        assert gallery.describe()["versions"]["v1"]["dead"] < 0.5 * COUNT
        with elsewhere(tmp_path) as late:  # starts from a snapshot and the changes since
            assert late()[1] == held
        assert len([path for path in (tmp_path / "snapshots").iterdir() if path.is_dir()]) <= 2
        gallery.show("v1")
        place[place == 1] = 0
        assert recall(gallery, place) >= (1 if kind == "flat" else 0.95)
        assert other()[1] == in_memory(gallery) == stored(gallery)
        gallery.drop("v2")
        gallery.create(GalleryVersion(name="v2", dimension=12))  # in the slot of the one before
        gallery.put(IDS[:9], {"v2": B[:9]}, "v2", replace=True)
        place[:9] = 1
        assert recall(gallery, place) >= 0.95
        assert other()[1] == in_memory(gallery) == stored(gallery)


def test_a_graph_finds_what_lies_behind_many_hidden_rows() -> None:
    """Few are hidden near some queries, nearly all near others; those have nothing but hidden ones among the first."""
    index = FrozenIndex(build(versions("hnsw")[0], A), IDS.copy(), np.argsort(IDS), np.ones(COUNT, bool))
    first, few = (np.argsort(2 - 2 * QA @ A.T, axis=1)[:, :count] for count in (200, 2))
    hidden = np.union1d(first[:3], few)
    index.show(IDS[hidden], False)
    expected = brute_force([QA], [A], IDS, np.where(np.isin(np.arange(COUNT), hidden), -1, 0), 10)
    ids, distances = index.search(QA, 10, 256, 1.0)
    assert not np.isin(ids, IDS[hidden]).any()
    assert (ids >= 0).all()
    assert (np.diff(distances) >= 0).all()
    assert np.mean([len(set(one) & set(other)) for one, other in zip(ids, expected.ids, strict=True)]) >= 9.5
    index.show(IDS, False)
    index.show(IDS[:4], True)
    ids, distances = index.search(QA, 10, 256, 1.0)
    assert set(np.unique(ids)) <= {-1, *IDS[:4].tolist()}
    assert (np.isinf(distances) == (ids < 0)).all()


def test_reader_that_is_far_behind_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_REMEMBERED", 3)
    with LmdbGallery(tmp_path) as gallery, elsewhere(tmp_path) as other:
        for version in versions("hnsw"):
            gallery.create(version)
        gallery.put(IDS, {"v1": A}, "v1")
        gallery.compact(force=True)
        for remembered in (3, 9):
            other()
            for one in range(remembered):
                gallery.put(IDS[one::20], {"v2": B[one::20]}, "v2")
            assert other()[1] == stored(gallery)


def test_snapshots_are_made_where_they_are_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "FRESH", 1000)
    with LmdbGallery(tmp_path) as gallery:
        gallery.create(versions("hnsw")[0])
        gallery.put(IDS[:900], {"v1": A[:900]}, "v1")
        assert not gallery.compact()
        assert gallery.compact(force=True)
        assert not gallery.compact(force=True)
        index = next((tmp_path / "snapshots").glob("*/0.index")).stat().st_ino
        gallery.put(IDS[900:2500], {"v1": A[900:2500]}, "v1")
        with snapshot.exclusive(tmp_path / "snapshots") as alone:
            assert alone
            assert not gallery.compact()
        assert gallery.compact()
        assert gallery.describe()["versions"]["v1"] == {"found": 2500, "indexed": 2500, "dead": 0, "fresh": 0}
        gallery.delete(IDS[:100])
        assert gallery.compact(force=True)
        files = {path.stat().st_ino for path in (tmp_path / "snapshots").glob("*/0.index")}
        assert len(files) == 1  # as it was, under both names
        assert files != {index}
    with LmdbGallery(tmp_path, readonly=True) as reader:
        for write in (lambda: reader.compact(), lambda: reader.delete(IDS[:1]), lambda: reader.create(NEW)):
            with pytest.raises(GalleryError, match="expected a gallery that is open for writing"):
                write()


def test_missing_snapshot_is_no_loss(tmp_path: Path) -> None:
    with LmdbGallery(tmp_path) as gallery:
        gallery.create(versions("ivf")[0])
        gallery.put(IDS, {"v1": A}, "v1")
        gallery.compact(force=True)
        for path in (tmp_path / "snapshots").glob("*/0.json"):
            path.unlink()
            path.parent.rename(path.parent.with_suffix(".gone"))
        with elsewhere(tmp_path) as other:
            gallery.create(versions("flat")[1])
            assert other()[1] == stored(gallery)


def test_rows_come_and_go() -> None:
    rng, dimension = np.random.default_rng(0), 4
    rows = FlatRows(np.zeros(0, np.int64), np.zeros((0, dimension), np.float32))
    expected: dict[int, bytes] = {}
    for _ in range(300):
        added = np.setdiff1d(rng.integers(0, 5000, rng.integers(0, 90)), list(expected))
        vectors = unit(len(added), dimension, int(rng.integers(1000)))
        rows.add(added, vectors)
        expected |= dict(zip(added.tolist(), map(bytes, vectors), strict=True))
        removed = rng.permutation(5000)[: rng.integers(0, 300)]
        rows.remove(removed)
        for identity in removed.tolist():
            expected.pop(identity, None)
        ids, kept = rows.contents()
        assert dict(zip(ids.tolist(), map(bytes, kept), strict=True)) == expected
        asked = rng.integers(0, 5000, 50)
        assert rows.has(asked).tolist() == [identity in expected for identity in asked.tolist()]


# --- kill −9 ------------------------------------------------------------------------------------------------


def _move_until_killed(path: Path, seed: int, started: Connection) -> None:
    """Batches forth, single items back, some changed, snapshots all the time."""
    rng = np.random.default_rng(seed)
    snapshot.FRESH = 20
    with LmdbGallery(path) as gallery:
        started.send(True)
        while True:
            part = rng.permutation(300)[:30]
            gallery.put(IDS[part], {"v2": B[part]}, "v2", state=("job", repr(sorted(part.tolist())).encode()))
            gallery.show("v1", IDS[part[:9]])
            gallery.put(IDS[part[9:12]], {"v1": A[part[9:12]]}, "v1", replace=True)
            gallery.compact()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_killed_writers_lose_and_double_nothing(kind: str, tmp_path: Path) -> None:
    """Every search while writers move items, and after they were killed, finds each of the 300 items exactly once."""
    ids, a, b = IDS[:300], A[:300], B[:300]
    with LmdbGallery(tmp_path) as gallery:
        for version in versions(kind):
            gallery.create(version.model_copy(update={"effort": 4096}))
        gallery.put(ids, {"v1": a}, "v1")
    random.seed(0)
    searches, mixes = 0, set()
    with LmdbGallery(tmp_path, readonly=True) as reader:
        for seed in range(12):
            here, there = PROCESSES.Pipe(duplex=False)
            writer = PROCESSES.Process(target=_move_until_killed, args=(tmp_path, seed, there))
            writer.start()
            here.recv()
            end = time.monotonic() + random.uniform(0, 0.3)
            while time.monotonic() < end:
                found = reader.search({"v1": QA[:1], "v2": QB[:1]}, 300)
                assert sorted(found.ids[0].tolist()) == sorted(ids.tolist())
                mixes.add(int(found.version.sum()))
                searches += 1
            writer.kill()
            writer.join()
            place = np.array([("v1", "v2").index(name) for name in reader.seen(ids) if name])
            assert len(place) == 300
            found = reader.search(ASKED, 300)
            assert_same(found, brute_force([QA, QB], [a, b], ids, place, 300))
            assert in_memory(reader) == stored(reader)
            assert [count.seen for count in reader.count().values()] == [(place == 0).sum(), (place == 1).sum()]
    assert searches > 100
    assert len(mixes) > 12  # the reader saw them move
    with open_gallery(str(tmp_path)) as gallery:  # and a job can go on
        gallery.show("v1")
        gallery.put(ids, {"v2": b}, "v2", since=gallery.position())
        gallery.drop("v1")
        assert_same(gallery.search({"v2": QB}, 10), brute_force([QB], [b], ids, np.zeros(300, int), 10))
