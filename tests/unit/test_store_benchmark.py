"""benchmarks/store.py: its floors hand out the store's own records, and its ratios are those of its figures."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks import store as benchmark
from benchmarks.redis_server import PROGRAM
from benchmarks.store import GET, MGET, PROFILE, STORES, TOKENS, VIEWS, Contenders, StoreOptions, generate
from sightline.errors import ConfigError
from sightline.store import ItemSchema, UserSchema
from sightline.store.records import encode_items

LMDB, REDIS = STORES
WAYS = {GET, VIEWS, LMDB} | ({MGET, REDIS} if PROGRAM else set())
SMALL = ["--items", "40", "--users", "3", "--keys", "5", "40", "--vectors", "0", "8", "--runs", "3"]


@pytest.mark.parametrize("size", [0, 8])
def test_every_way_reads_the_same_items(tmp_path: Path, size: int) -> None:
    schema = ItemSchema(version="v1", captioner="none", token_spec="none", tokens=TOKENS, vector=size)
    expected, ids = generate(schema, 40), np.array([17, 40, 1])
    records, _ = encode_items(schema, expected)
    with ExitStack() as stack:
        ways = Contenders(tmp_path, stack).ways(schema, 40)
        found = {name: way(ids)() for name, way in ways.items()}
    assert set(found) == WAYS
    for name in {GET, MGET} & WAYS:
        assert found[name] == [records[item - 1] for item in ids]
        assert type(found[name][0]) is bytes
    assert found[VIEWS] == b"".join(found[GET])
    for name in {LMDB, REDIS} & WAYS:
        assert not found[name].status.any()
        assert np.array_equal(found[name].tokens, expected.tokens[ids - 1])
        assert found[name].has_vector.all() == (size > 0)
        if size:
            assert np.array_equal(found[name].vectors, expected.vectors[ids - 1])


def test_every_way_reads_the_same_user(tmp_path: Path) -> None:
    schema = UserSchema(version="v1", token_spec="none", profile=PROFILE, history=benchmark.HISTORY)
    with ExitStack() as stack:
        ways = Contenders(tmp_path, stack).ways(schema, 3)
        found = {name: way(np.array([2]))() for name, way in ways.items()}
    (record,) = np.frombuffer(found[VIEWS], schema.record)
    assert record["id"] == 2
    for name in {GET, MGET} & WAYS:
        assert found[name] == [found[VIEWS]]
    for name in {LMDB, REDIS} & WAYS:
        assert np.array_equal(found[name].record.items, record["items"])
        assert np.array_equal(found[name].record.profile.tokens, record["tokens"])


def test_small_run_ends_in_json_whose_ratios_follow(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(SMALL)
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    document = json.loads(line)
    assert {"hardware", "versions", "commit", "command", "seconds"} <= set(document)
    assert {"lmdb", "redis", "hiredis"} <= set(document["versions"])
    assert [(read["kind"], read["vector"], read["keys"], read["record_bytes"]) for read in document["reads"]] == [
        ("item", 0, 5, 196), ("item", 0, 40, 196), ("item", 8, 5, 212), ("item", 8, 40, 212),
        ("user", None, 1, document["reads"][-1]["record_bytes"]),
    ]  # fmt: skip
    assert document["skipped"] == ([] if PROGRAM else [f"Redis: {benchmark.MISSING}"])
    for read in document["reads"]:
        assert set(read["us"]) == WAYS
        assert all(0 < taken["median"] <= taken["p99"] for taken in read["us"].values())
        assert read["store_over"] == {
            name: {floor: round(read["us"][name]["median"] / read["us"][floor]["median"], 2) for floor in floors}
            for name, floors in STORES.items() if name in WAYS
        }  # fmt: skip
        rows = [row.split("|")[1].strip() for row in benchmark.table(read).splitlines() if row.startswith("| ")]
        assert rows == ["way", *read["us"]]
        assert benchmark.table(read) in captured.err
    assert captured.err.splitlines()[0].endswith("?")


def test_without_a_server_redis_is_left_out_and_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PROGRAM", None)
    benchmark.main(SMALL)
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert all(set(read["us"]) == {GET, VIEWS, LMDB} for read in document["reads"])
    assert all(set(read["store_over"]) == {LMDB} for read in document["reads"])
    assert "left out: Redis: no redis-server: run `make setup`" in captured.err


@pytest.mark.parametrize("bad", [{"items": 0}, {"runs": 0}, {"keys": [50], "items": 40}, {"vectors": [-1]}])
def test_bad_options(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(bad))}: got .*expected"):
        StoreOptions(**{"keys": [1], **bad})
