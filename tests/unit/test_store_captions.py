"""Captions by media hash and captioner, and the leases by which processes agree on who makes them."""

from __future__ import annotations

import json
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sightline.commands import store as commands
from sightline.errors import DataError, StoreError
from sightline.store import open_store
from sightline.store.records import encode_caption
from tests.feature_stores import OLD, PROCESSES, elsewhere, items


def media(number: int) -> str:
    return f"{number * 2**250 % 2**256 + number:064x}"


def test_captions(location: str) -> None:
    captions = {media(one): f"<c 0.9> Tasse № {one}" for one in range(1, 300)} | {media(0): ""}
    with open_store(location) as store:
        assert store.read_captions("c1", [media(1)]) == [None]
        store.write_captions("c1", captions)
        store.write_captions("c1.2", {media(2): "other"})
        store.write_captions("c1", {})
        asked = [media(one) for one in (5, 0, 999, 299, 5)]
        assert store.read_captions("c1", asked) == [
            "<c 0.9> Tasse № 5", "", None, "<c 0.9> Tasse № 299", "<c 0.9> Tasse № 5",
        ]  # fmt: skip
        assert store.read_captions("c1", [media(5).upper()]) == ["<c 0.9> Tasse № 5"]
        assert store.read_captions("c1.2", [media(1), media(2)]) == [None, "other"]
        assert store.read_captions("c1", []) == []
        store.write_captions("c1", {media(5): "again"})
    with open_store(location, readonly=True) as store:
        assert store.read_captions("c1", [media(5), media(6)]) == ["again", "<c 0.9> Tasse № 6"]
        assert store.count_captions() == {"c1": 300, "c1.2": 1}


def test_damaged_captions_are_missing(location: str, caplog: pytest.LogCaptureFixture) -> None:
    keys = [bytes.fromhex(media(one)) for one in range(1, 6)]
    good = encode_caption(keys[0], "Tasse")
    with open_store(location) as store:
        store._write_captions("c", keys, [good, good, good[:-1], b"", good[:3]])
        assert store.read_captions("c", [media(one) for one in range(1, 6)]) == ["Tasse", None, None, None, None]
        assert f"captions of c: that of {media(2)} is damaged and counts as missing" in caplog.text


def test_names_and_hashes_that_cannot_be(location: str) -> None:
    with open_store(location) as store:
        for text in ("", "abc", "g" * 64, media(1) + "00", "  " + media(1)[2:]):
            with pytest.raises(DataError, match="media hash: expected 64 hexadecimal digits"):
                store.write_captions("c", {text: "x"})
            with pytest.raises(DataError, match="media hash: expected 64 hexadecimal digits"):
                store.read_captions("c", [text])
        for name in ("", "a/b", "*", "c" * 65):
            with pytest.raises(StoreError, match="captioner: expected a version of at most 64 letters"):
                store.read_captions(name, [])
        for name in ("", "x" * 257):
            with pytest.raises(StoreError, match="lease: expected a name of 1 to 256 bytes"):
                store.claim(name, 1)
        for seconds in (0, -1, float("nan"), float("inf")):
            with pytest.raises(StoreError, match="seconds: expected a lease of"):
                store.claim("x", seconds)


def test_dropped_captions_are_gone(location: str) -> None:
    with open_store(location) as store, elsewhere(location) as call:
        store.register(OLD)
        store.write_items("v1", items(OLD, [1, 2]))
        for captioner in ("c1", "c11"):
            store.write_captions(captioner, {media(one): captioner for one in range(100)})
        assert call("read_captions", "c1", [media(1)]) == ["c1"]
        store.drop_captions("c1")
        store.drop_captions("c7")
        assert call("read_captions", "c1", [media(1)]) == [None]
        assert call("read_captions", "c11", [media(1)]) == ["c11"]
        assert store.count(OLD) == 2
        assert store.count_captions() == {"c11": 100}
        store.write_captions("c1", {media(1): "new"})
        assert call("read_captions", "c1", [media(1), media(2)]) == ["new", None]
    shown = json.loads(CliRunner().invoke(commands.app, ["stats", "--store", location]).stdout)
    assert shown["captions"] == {"c1": 1, "c11": 100}


def _caption(location: str, acknowledged: Connection) -> None:
    with open_store(location) as store:
        assert store.claim("held", 0.5)
        for one in range(100_000):
            store.write_captions("c", {media(one): str(one)})
            acknowledged.send(one)


def test_killed_writer_loses_no_caption_and_its_lease_ends(location: str) -> None:
    with open_store(location):
        pass
    with open_store(location, readonly=True) as reader:  # it reads before there is a first caption
        assert reader.read_captions("c", [media(0)]) == [None]
        here, there = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=_caption, args=(location, there))
        writer.start()
        there.close()
        while (acknowledged := here.recv()) < 30:
            pass
        writer.kill()
        writer.join()
        here.close()
        found = reader.read_captions("c", [media(one) for one in range(acknowledged + 1)])
        assert found == [str(one) for one in range(acknowledged + 1)]
    with open_store(location) as store:
        until = time.monotonic() + 10
        while not store.claim("held", 5):
            assert time.monotonic() < until
            time.sleep(0.02)


def test_leases(location: str) -> None:
    with open_store(location) as one, elsewhere(location) as other:
        assert one.claim("caption.ü", 30)
        assert one.claim("caption.ü", 30), "renewed"
        assert not other("claim", "caption.ü", 30)
        other("unclaim", "caption.ü")
        other("unclaim", "nobody's")
        assert not other("claim", "caption.ü", 30)
        assert other("claim", "caption.x", 30)
        one.unclaim("caption.ü")
        assert other("claim", "caption.ü", 0.05)
        time.sleep(0.1)
        assert one.claim("caption.ü", 30)
        other("unclaim", "caption.ü")
        assert not other("claim", "caption.ü", 30)
        assert one.claim("caption.ü", 0.1)
        assert one.claim("caption.ü", 30)
        time.sleep(0.15)
        assert not other("claim", "caption.ü", 1), "a lease lasts from when it was renewed"


def _claim(location: str, go: float, won: Connection) -> None:
    with open_store(location) as store:
        time.sleep(max(0, go - time.time()))
        won.send([store.claim(f"race {number}", 60) for number in range(50)])


def test_one_of_many_gets_a_lease(location: str) -> None:
    with open_store(location):
        pass
    go, claimants = time.time() + 0.7, []
    for _ in range(3):
        here, there = PROCESSES.Pipe(duplex=False)
        claimants.append((PROCESSES.Process(target=_claim, args=(location, go, there)), here))
        claimants[-1][0].start()
        there.close()
    won = [here.recv() for _, here in claimants]
    for process, here in claimants:
        process.join()
        here.close()
    assert [sum(one) for one in zip(*won, strict=True)] == [1] * 50


# --- the embedded store -------------------------------------------------------------------------------------


def test_leases_that_nobody_ended_do_not_pile_up(tmp_path: Path) -> None:
    with open_store(str(tmp_path)) as store:
        store.register(OLD)
        for one in range(200):
            assert store.claim(f"caption/{media(one * 7919)}", 0.001)
            time.sleep(0.001)
        assert store.claim("kept", 60)
        assert store._leases.stat()["entries"] < 60
        assert store.schemas() == [OLD]


def test_read_only_store_takes_no_lease(tmp_path: Path) -> None:
    with open_store(str(tmp_path)):
        pass
    with open_store(str(tmp_path), readonly=True) as store:
        for write in (lambda: store.claim("x", 1), lambda: store.write_captions("c", {media(1): "x"})):
            with pytest.raises(StoreError, match=r"[Rr]ead-only|Permission"):
                write()
