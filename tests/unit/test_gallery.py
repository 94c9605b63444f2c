"""The contract of every gallery: the embedded one, and Milvus by its embedded server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from sightline.errors import GalleryError
from sightline.gallery import Count, Gallery, GalleryVersion, open_gallery
from tests.galleries import NEW, OLD, assert_same, brute_force, unit

COUNT = 60
IDS = np.random.default_rng(3).permutation(10_000)[:COUNT]
A, B = unit(COUNT, 8, 1), unit(COUNT, 12, 2)
QA, QB = unit(7, 8, 3), unit(7, 12, 4)
QUERIES = {"v1": QA, "v2": QB}


@pytest.fixture(scope="module", params=["embedded", "milvus"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder = tmp_path_factory.mktemp("gallery")
    with open_gallery(str(folder / ("gallery.db" if request.param == "milvus" else "gallery"))) as gallery:
        yield gallery


@pytest.fixture
def gallery(opened: Gallery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gallery]:
    """Two versions, all items in the old one; a new server per test would take most of the time."""
    monkeypatch.setattr("sightline.gallery.server._GRACE", 0.01)
    opened.create(OLD)
    opened.create(NEW)
    opened.put(IDS, {"v1": A}, "v1")
    yield opened
    for version in opened.versions():
        opened.delete(opened.ids(version.name, seen=False))
    for version in opened.versions():
        opened.drop(version.name)
    opened.put_state("job", None)


def check(gallery: Gallery, place: np.ndarray[Any, Any], k: int = 10) -> None:
    """Searches, counts and lookups all say that items are seen there (−1: not at all)."""
    found = gallery.search(QUERIES, k)
    assert_same(found, brute_force([QA, QB], [A, B], IDS, place, k))
    assert gallery.seen(IDS) == [("v1", "v2", None)[each] for each in place]
    for version, name in enumerate(("v1", "v2")):
        assert gallery.ids(name).tolist() == sorted(IDS[place == version].tolist())
        assert gallery.count()[name].seen == (place == version).sum()


def test_items_move_and_come_back(gallery: Gallery) -> None:
    place = np.zeros(COUNT, int)
    check(gallery, place)
    for start in (0, 20, 40):
        moved = slice(start, start + 20)
        assert gallery.put(IDS[moved], {"v2": B[moved]}, "v2").all()
        place[moved] = 1
        check(gallery, place)
    assert gallery.count() == {"v1": Count(0, COUNT), "v2": Count(COUNT, COUNT)}
    assert gallery.show("v1", IDS[:5]) == 5
    place[:5] = 0
    check(gallery, place)
    assert gallery.show("v1") == COUNT - 5
    check(gallery, np.zeros(COUNT, int))
    assert gallery.show("v2", [*IDS[:3].tolist(), 77_777]) == 3
    assert gallery.show("v2", IDS[:3]) == 0
    check(gallery, np.where(np.arange(COUNT) < 3, 1, 0))


def test_fewer_items_than_asked(gallery: Gallery) -> None:
    check(gallery, np.zeros(COUNT, int), k=COUNT + 5)
    gallery.delete(IDS[2:])
    gallery.put(IDS[:1], {"v2": B[:1]}, "v2")
    place = np.full(COUNT, -1)
    place[:2] = [1, 0]
    check(gallery, place, k=4)
    assert gallery.search({"v2": QB}, 3).ids[0].tolist() == [IDS[0], -1, -1]
    assert gallery.search({"v2": QB[:0]}, 3).ids.shape == (0, 3)
    turned = gallery.search({"v2": QB, "v1": QA}, 4)
    assert (np.sort(turned.version, 1) == [-1, -1, 0, 1]).all()
    assert turned.ids[turned.version == 0].tolist() == [IDS[0]] * 7
    gallery.delete(IDS)
    assert (gallery.search(QUERIES, 2).ids == -1).all()
    assert np.isinf(gallery.search(QUERIES, 2).distances).all()


def test_changed_items(gallery: Gallery) -> None:
    gallery.put(IDS, {"v1": A, "v2": B}, "v2")
    gallery.put(IDS[:4], {"v1": A[4:8]}, "v1", replace=True)
    vectors, here = gallery.get(IDS[:6], "v2")
    assert here.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(vectors, np.where(here[:, None], B[:6], 0))
    assert gallery.show("v2") == 0
    assert gallery.seen(IDS[:6]) == ["v1"] * 4 + ["v2"] * 2
    changed = np.concatenate([A[4:8], A[4:]])
    place = np.where(np.arange(COUNT) < 4, 0, 1)
    assert_same(gallery.search(QUERIES, 10), brute_force([QA, QB], [changed, B], IDS, place, 10))


def test_slow_job_overwrites_nothing(gallery: Gallery) -> None:
    before = gallery.position()
    gallery.put(IDS[:1], {"v1": A[1:2]}, "v1", replace=True)  # changed,
    gallery.delete(IDS[1:2])  # gone,
    gallery.put([77_777], {"v1": A[:1]}, "v1")  # and new meanwhile
    written = gallery.put(
        [*IDS[:4].tolist(), 77_777], {"v2": B[:5]}, "v2", since=before, state=("job", b"4 of 60")
    )  # fmt: skip
    assert written.tolist() == [False, False, True, True, False]
    assert gallery.seen([*IDS[:4].tolist(), 77_777]) == ["v1", None, "v2", "v2", "v1"]
    assert gallery.get_state("job") == b"4 of 60"
    assert not gallery.put(IDS[:2], {"v2": B[:2]}, "v2", since=before, state=("job", None)).any()
    assert gallery.get_state("job") is None
    assert gallery.put(IDS[:1], {"v2": B[:1]}, "v2", since=gallery.position()).all()


def test_searches_while_items_move(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forth in batches and all back at once, in another thread: every search finds each item once."""
    monkeypatch.setattr("sightline.gallery.server._GRACE", 0.3)
    gallery.search(QUERIES, COUNT)
    enough, mixes, end = Event(), set(), time.monotonic() + 20

    def job() -> None:
        while not enough.is_set():
            for part in np.array_split(np.arange(COUNT), 6):
                gallery.put(IDS[part], {"v2": B[part]}, "v2")
            gallery.show("v1")

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(job)
        try:
            while len(mixes) < 5 and time.monotonic() < end:
                found = gallery.search(QUERIES, COUNT)
                assert (np.sort(found.ids, 1) == np.sort(IDS)).all()
                mixes.update(found.version.sum(1).tolist())
        finally:
            enough.set()
        running.result()
    assert len(mixes) >= 5
    check(gallery, np.zeros(COUNT, int))


def test_documents(gallery: Gallery) -> None:
    assert gallery.get_state("job") is None
    gallery.put_state("job", bytes(range(256)))
    assert gallery.get_state("job") == bytes(range(256))
    gallery.show("v1", IDS[:1], state=("job", b"shown"))
    assert gallery.get_state("job") == b"shown"
    gallery.delete(IDS[:1], state=("job", b"deleted"))
    assert gallery.get_state("job") == b"deleted"


def test_versions(gallery: Gallery) -> None:
    gallery.create(OLD)
    assert gallery.versions() == [OLD, NEW]
    with pytest.raises(GalleryError, match=r"version 'v1' exists with other parameters: .*a name of its own"):
        gallery.create(OLD.model_copy(update={"dimension": 9}))
    gallery.put(IDS[:9], {"v2": B[:9]}, "v2")
    with pytest.raises(GalleryError, match=r"version 'v1': queries see 51 items in it; show them in another"):
        gallery.drop("v1")
    gallery.put(IDS, {"v2": B}, "v2")
    gallery.drop("v1")
    assert gallery.versions() == [NEW]
    assert_same(gallery.search({"v2": QB}, 5), brute_force([QB], [B], IDS, np.zeros(COUNT, int), 5))
    with pytest.raises(GalleryError, match=r"version 'v1': expected one of v2"):
        gallery.search(QUERIES, 5)
    gallery.create(GalleryVersion(name="v3", dimension=8))
    gallery.put(IDS, {"v3": A}, "v3")
    found = gallery.search({"v2": QB, "v3": QA}, 5)
    assert_same(found, brute_force([QB, QA], [B, A], IDS, np.ones(COUNT, int), 5))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"ids": [1, 1]}, "ids: expected each once, got 1 repetitions"),
    ({"ids": [-1, 1]}, r"ids: expected numbers from 0 to 2\*\*63 - 1, got -1"),
    ({"ids": [0.5, 1]}, r"ids: expected int64 \[N\], got float64 \[2\]"),
    ({"vectors": {"v1": A[:3]}}, r"vectors of v1: expected float32 \[2, 8\], got float32 \[3, 8\]"),
    ({"vectors": {"v1": A[:2] * 1.01}}, "expected vectors of length 1 ± 0.001, got one of length 1.01 in row 0"),
    ({"vectors": {"v1": np.array([A[0], A[1] * np.nan])}}, r"length nan in row 1 \(1 of 2 rows\); divide each"),
    ({"vectors": {"v1": A[:2].astype(int)}}, "got int64"),
    ({"vectors": {"v7": A[:2]}, "seen": "v7"}, "version 'v7': expected one of v1, v2"),
    ({"seen": "v2"}, "seen: expected a version of the vectors, v1; got 'v2'"),
]


def test_writes_that_do_not_fit_are_refused(gallery: Gallery) -> None:
    for change, message in BROKEN:
        with pytest.raises(GalleryError, match=message):
            gallery.put(**{"ids": [1, 2], "vectors": {"v1": A[:2]}, "seen": "v1"} | change)
    assert gallery.count()["v1"].seen == COUNT


def test_questions_that_do_not_fit_are_refused(gallery: Gallery) -> None:
    for queries, k, message in (
        (QUERIES, 0, "k: expected 1 to 4096 items, got 0"),
        ({}, 5, "queries: expected those of one version or more, got none"),
        ({"v1": QA, "v2": QB[:3]}, 5, r"queries of v2: expected float32 \[7, 12\], got float32 \[3, 12\]"),
        ({"v1": QA * 2}, 5, "queries of v1: expected vectors of length 1"),
        ({"v1": QA[0]}, 5, r"queries of v1: expected float32 \[8, 8\], got float32 \[8\]"),
        ({"v9": QA}, 5, "version 'v9': expected one of v1, v2"),
    ):
        with pytest.raises(GalleryError, match=message):
            gallery.search(queries, k)
    with pytest.raises(GalleryError, match="effort: expected 1 or more, got 0"):
        gallery.search(QUERIES, 5, effort=0)
    for call in (lambda: gallery.get(IDS, "v9"), lambda: gallery.show("v9"), lambda: gallery.drop("v9")):
        with pytest.raises(GalleryError, match="version 'v9'"):
            call()


def test_galleries_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="expected a gallery, there is none"):
        open_gallery(str(tmp_path / "none"), readonly=True)
    with pytest.raises(GalleryError, match="expected a Milvus that can be reached"):
        open_gallery("http://127.0.0.1:1")
