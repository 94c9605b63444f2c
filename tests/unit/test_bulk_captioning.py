"""Bulk captioning: in blocks as in one go, killed and continued, from shards, and what is refused."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from sightline import cli
from sightline.annotation import Annotated, plain
from sightline.errors import ConfigError, DataError
from sightline.features import item_schema
from sightline.media import content_hash
from sightline.ray_cluster import REQUIREMENT
from sightline.schema import INTERACTIONS, ITEMS, read_items, write_dataset
from sightline.store import open_store
from sightline.tokens import TokenSpec
from tests.factories import tiny_captioner
from tests.levels import agree
from trainer.bulk import BulkConfig, caption_catalogue
from trainer.captioning import caption_items, read_captions
from trainer.shards import Catalogue, blocks_of

ROOT = Path(__file__).parents[2]
BLOCK, BATCH = 2, 1  # small: there shall be time to kill a run in its middle
GONE, DAMAGED, BARE, BESIDE = 1, 7, 8, 9  # rows: file missing, not decodable, no media, file beside


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a captioner is not faster with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner"), words=True)


@pytest.fixture(scope="module")
def data(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 pictures and videos, most of them inside the file."""
    folder = tmp_path_factory.mktemp("bulk") / "data"
    rows = read_items(catalogue).slice(0, 38).to_pylist()
    folder.mkdir()
    (folder / "beside.bin").write_bytes(rows[BESIDE]["media"])
    rows[BESIDE] |= {"media": None, "media_uri": "beside.bin"}
    rows[GONE] |= {"media": None, "media_uri": "gone.png"}
    rows[DAMAGED] |= {"media": b"not an image"}
    rows[BARE] |= {"media": None, "media_type": None}
    write_dataset(folder, pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "bulk"})
    return folder


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "token_spec.json"
    TokenSpec.fit(["abc"], families=["trigram"], length=8, min_count=1, rows=64).save(path)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, captioner: Path, spec: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An uninterrupted run with a store, and what the command said in the end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(data, captioner, folder, "--store", folder / "store", "--spec", spec)


def command(data: Path, captioner: Path, folder: Path, *more: Any) -> list[str]:
    paths = ["--data", data, "--captioner", captioner, "--out", folder / "run"]
    paths += ["--captions", folder / "captions.parquet"]
    return [*map(str, ["caption", "run", *paths, "--block", BLOCK, "--batch", BATCH, *more])]


def run(data: Path, captioner: Path, folder: Path, *more: Any) -> Any:
    done = CliRunner().invoke(cli.app, command(data, captioner, folder, *more), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def block_files(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "blocks").glob("*.parquet"))


def test_blocks_are_captioned_like_the_whole(data: Path, captioner: Path, whole: tuple[Path, Any]) -> None:
    folder, said = whole
    items = read_items(data)["item_id"].to_pylist()
    usable = [item for row, item in enumerate(items) if row not in (GONE, DAMAGED, BARE)]
    expected = caption_items(captioner, data, usable)
    found, version = read_captions(folder / "captions.parquet")
    assert (list(found), version) == (usable, "test-captioner")
    assert list(map(plain, found.values())) == list(map(plain, expected.values()))
    notes = [[Annotated.parse(text).confidences for text in texts.values()] for texts in (found, expected)]
    assert agree(*notes)
    assert len(set(found.values())) > 20
    counts = {"items": 38, "captioned": 35, "without_media": 1, "failed": 2, "blocks": 19, "new_blocks": 19}
    assert counts.items() <= said.items()
    assert len(said["reasons"]) == 2

    rows = pa.concat_tables([pq.read_table(path) for path in block_files(folder)])
    assert rows["item_id"].to_pylist() == items
    rows = rows.to_pylist()
    assert [row for row, one in enumerate(rows) if one["error"]] == [GONE, DAMAGED]
    assert "not there, or outside" in rows[GONE]["error"]
    assert "neither image nor video" in rows[DAMAGED]["error"]
    assert rows[BARE] == {
        "item_id": items[BARE],
        "caption": None,
        "annotation": None,
        "media_hash": None,
        "error": None,
    }
    assert rows[BESIDE]["media_hash"] == content_hash((data / "beside.bin").read_bytes())
    assert {row["item_id"]: row["annotation"] for row in rows if row["annotation"] is not None} == found
    assert [row["caption"] for row in rows if row["item_id"] in found] == list(map(plain, found.values()))


def test_the_store_has_what_the_file_has(whole: tuple[Path, Any], spec: Path) -> None:
    folder, _ = whole
    captions, version = read_captions(folder / "captions.parquet")
    hashes = pa.concat_tables([pq.read_table(path) for path in block_files(folder)])
    tokens = TokenSpec.load(spec)
    schema = item_schema(version, tokens.version, tokens.length)
    with open_store(str(folder / "store")) as store:
        kept = store.read_details(list(captions), [schema.version])
        assert store.count(schema) == len(captions)
        of_hash = dict(zip(hashes["item_id"].to_pylist(), hashes["media_hash"].to_pylist(), strict=True))
        assert store.read_captions(version, [of_hash[item] for item in captions]) == list(captions.values())
    for (item, annotation), one in zip(captions.items(), kept, strict=True):
        assert one is not None
        assert (one.caption, one.media_hash) == (annotation, of_hash[item])
        assert one.tokens == [token for token in tokens.encode_batch([annotation])[0].tolist() if token]


SLOWLY = """
import runpy, time
from trainer.bulk import Worker
call = Worker.__call__
Worker.__call__ = lambda self, block: (time.sleep(0.2), call(self, block))[1]
runpy.run_module("sightline.cli", run_name="__main__", alter_sys=True)
"""


def test_a_killed_run_continues(data: Path, captioner: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Ctrl-C, then kill −9, each in the middle: finished blocks stay as they are, and all is as without."""
    kept: dict[Path, tuple[int, int]] = {}
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            # The run must not end before this process sees its second block, on a busy machine either.
            [sys.executable, "-c", SLOWLY, *command(data, captioner, tmp_path)], cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and len(block_files(tmp_path)) < len(kept) + 2:
            time.sleep(0.002)
        os.kill(process.pid, how)
        said = process.communicate()[1]
        assert process.returncode == code, said
        found = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in block_files(tmp_path)}
        assert kept.items() <= found.items()
        kept = found
    assert 4 <= len(kept) < 19
    assert not (tmp_path / "captions.parquet").exists()
    (tmp_path / "run" / "blocks" / "x.parquet.1.part").write_bytes(b"left behind")
    damaged = max(kept)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert run(data, captioner, tmp_path)["new_blocks"] == 19 - len(kept) + 1
    del kept[damaged]
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == was for path, was in kept.items())
    assert not list((tmp_path / "run").rglob("*.part"))
    for path in [*block_files(whole[0]), whole[0] / "captions.parquet"]:
        assert (tmp_path / path.relative_to(whole[0])).read_bytes() == path.read_bytes(), path.name


def test_failed_media_are_tried_again_when_asked(
    data: Path, captioner: Path, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    shutil.copy(moved / "beside.bin", moved / "gone.png")
    assert run(moved, captioner, tmp_path)["new_blocks"] == 0, "the same input elsewhere"
    said = run(moved, captioner, tmp_path, "--retry-failed")
    assert (said["new_blocks"], said["captioned"], said["failed"]) == (2, 36, 1)


def test_shards_are_one_catalogue(data: Path, captioner: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Of other tools' types, with fewer or more columns, row groups of any size, and an empty one among them."""
    items = read_items(data)
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copy(data / "beside.bin", folder)
    pl.DataFrame(items.slice(9, 4).select(["item_id", "media", "media_uri"])).write_parquet(folder / "a.parquet")
    pq.write_table(items.slice(0, 0), folder / "b.parquet")
    pq.write_table(items.slice(13, 9).select(["media", "item_id"]), folder / "c.parquet", row_group_size=2)
    assert pq.read_schema(folder / "a.parquet").field("media").type == pa.large_binary()
    said = run(folder, captioner, tmp_path)
    assert (said["items"], said["captioned"], said["blocks"]) == (13, 13, 7)
    names = [path.name for path in block_files(tmp_path)]
    assert names[:3] == ["00000-000000000.parquet", "00000-000000002.parquet", "00002-000000000.parquet"]
    ours, _ = read_captions(tmp_path / "captions.parquet")
    all_of_them, _ = read_captions(whole[0] / "captions.parquet")
    assert list(ours) == items["item_id"].to_pylist()[9:22]
    assert {item: plain(text) for item, text in ours.items()} == {item: plain(all_of_them[item]) for item in ours}


def test_blocks_are_rows_of_shards(data: Path, tmp_path: Path) -> None:
    items = read_items(data)
    for folder, path in ((data, data), (data, data / "items.parquet"), (tmp_path, tmp_path)):
        if path == tmp_path:  # a folder of shards in a data set's place
            (tmp_path / "items.parquet").mkdir()
            pq.write_table(items, tmp_path / "items.parquet" / "part-0.parquet", row_group_size=7)
        catalogue = Catalogue.find(path)
        assert catalogue.folder == folder.resolve()
        blocks = blocks_of(catalogue.describe([]), 16)
        assert [(block.first, block.rows) for block in blocks] == [(0, 16), (16, 16), (32, 6)]
        read = pa.concat_tables([catalogue.read(block) for block in blocks])
        assert read.equals(items.select(["item_id", "media", "media_uri"]).cast(read.schema))


def test_another_run_is_refused(data: Path, captioner: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole[0] / "run", tmp_path / "run"))
    other = Path(shutil.copytree(captioner, tmp_path / "other"))
    own = json.loads((other / "sightline.json").read_text())
    (other / "sightline.json").write_text(json.dumps(own | {"version": "another"}))
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    pq.write_table(pq.read_table(changed / "items.parquet").slice(1), changed / "items.parquet")
    same = {
        "data": data,
        "captioner": captioner,
        "out": out,
        "captions": tmp_path / "c.parquet",
        "block": BLOCK,
        "batch": BATCH,
    }
    for what, message in (
        (
            {"captioner": other},
            "captioner test-captioner, not another; continue it with what it was begun with, give a",
        ),
        ({"data": changed}, r"a run with input \w{12}, not \w{12};"),
        ({"block": 6}, "a run with block 2, not 6;"),
        ({"batch": 64}, "a run with batch 1, not 64;"),
    ):
        with pytest.raises(ConfigError, match=message):
            caption_catalogue(BulkConfig(**same | what))
    assert not (tmp_path / "c.parquet").exists()
    assert [path.read_bytes() for path in block_files(tmp_path)] == [
        path.read_bytes() for path in block_files(whole[0])
    ]
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="a run is going on there"):
            caption_catalogue(BulkConfig(**same))
    (out / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: expected the JSON of a run"):
        caption_catalogue(BulkConfig(**same))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "expected a data set, a Parquet file of items or a folder of such files"),
        (
            [{"item_id": [1], "title": ["a"]}],
            r"0\.parquet: expected the columns item_id and media or media_uri, found it",
        ),
        (
            [{"item_id": [1], "media": [b""]}, {"item_id": [2, 0], "media": [b"", b""]}],
            r"1\.parquet: .* row 1: .* got 0",
        ),
        ([{"item_id": [1, 4], "media": [b"", b""]}, {"item_id": [2, 4], "media": [b"", b""]}], "4 is there again"),
        ([{"item_id": ["x"], "media": [b""]}], r"0\.parquet: expected item_id int64"),
        ([{"item_id": [None], "media": [b""]}], r"0\.parquet: expected item_id int64"),
        (None, r"0\.parquet: expected a Parquet file of items"),
    ],
)
def test_bad_catalogues(tables: list[dict[str, Any]] | None, message: str, captioner: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, table in enumerate(tables or []):
        pq.write_table(pa.table(table), folder / f"{number}.parquet")
    if tables is None:
        (folder / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=message):
        run(folder, captioner, tmp_path)
    assert not block_files(tmp_path)


def test_nothing_to_caption_is_said(captioner: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [1, 2], "media_uri": ["no.png", "none.png"]}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="expected media that can be captioned, found none: its file is not there"):
        run(tmp_path, captioner, tmp_path)
    assert not (tmp_path / "captions.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--workers", "2"], "--workers: expected at least 1, with --ray"),
        (["run", "--block", "0"], "--block: expected at least 1, got 0"),
        (["run", "--store", "somewhere"], "--store and --spec: expected both or none"),
        (["--seed", "1", "run"], "--seed: expected behind `run`"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli.app, ["caption", *options], catch_exceptions=False)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_command_says_what_to_install(data: Path, captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"make ray.*pip install 'ray\[data\]==") as refused:
        run(data, captioner, tmp_path, "--ray", "local")
    assert REQUIREMENT in str(refused.value)
    pins = (ROOT / "deploy" / "requirements-ray.lock").read_text().splitlines()
    assert REQUIREMENT.replace("[data]", "") in pins
    ours = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert not {line.partition("==")[0] for line in pins if "==" in line} & ours, "requirements.lock has them"
