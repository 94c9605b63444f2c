"""An upgrade of the captioner by its commands, beside a real server that is queried all the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sightline_client as client

from backfill.source import Catalogue
from backfill.upgrade import read_upgrade
from build.assemble import build_release
from catalogue.attributes import COLOURS
from serving.triton import TritonServer
from sightline import release
from sightline.content import LocalEncoder
from sightline.gallery import Gallery, open_gallery
from sightline.retrieval import Transform
from sightline.schema import read_items
from tests.factories import tiny_captioner, tiny_ranker

K = 10


@pytest.fixture(scope="module")
def old_releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was served before: a captioner whose weights lie near those of the new one."""
    folder = tmp_path_factory.mktemp("old")
    tiny_captioner(folder / "captioner", noise=0.1, version="old-captioner")
    tiny_ranker(folder / "ranker", captioner_version="old-captioner")
    build_release(folder / "captioner", folder / "ranker", folder / "releases")
    return folder / "releases"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sightline.cli", *map(str, arguments)]


def run(*arguments: str | Path) -> Any:
    """The JSON on the last line of stdout."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


class Quality:
    """Precision at 10: of the items found, those of the query's colour; the query itself does not count."""

    def __init__(self, catalogue: Path, queries: int = 60) -> None:
        items = read_items(catalogue)
        texts = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
        self.colour = {item: next(one for one in COLOURS if one in text) for item, text in texts.items()}
        self.items = np.random.default_rng(0).permutation(sorted(self.colour))[:queries].tolist()
        media = Catalogue(catalogue)
        self.media = [media[item] or b"" for item in self.items]

    def __call__(self, caller: client.RankClient) -> np.ndarray[Any, Any]:
        """Per query, 0 to 1."""
        found = caller.retrieve(self.media, k=K + 1)
        rows = []
        for item, answer in zip(self.items, found, strict=True):
            ids = answer.item_ids.tolist()
            assert len(set(ids)) == K + 1, "an item twice, or too few of them"
            others = [one for one in ids if one != item][:K]
            rows.append(np.mean([self.colour.get(one) == self.colour[item] for one in others]))
        return np.array(rows)


@contextmanager
def queried(url: str, media: list[bytes]) -> Iterator[dict[str, Any]]:
    """Queries from two threads all the time; the count of those that were answered, and what went wrong."""
    seen: dict[str, Any] = {"answered": 0, "failures": []}
    ended = threading.Event()

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with client.RankClient(url, timeout=20) as caller:
            while not ended.is_set():
                try:
                    (answer,) = caller.retrieve([media[rng.integers(len(media))]], k=K)
                    assert len(set(answer.item_ids.tolist())) == K
                    seen["answered"] += 1
                except Exception as error:
                    seen["failures"].append(repr(error))
                time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(ask, seed) for seed in range(2)]
        try:
            yield seen
        finally:
            ended.set()
            for task in tasks:
                task.result()


def test_an_upgrade_under_load_that_is_killed_again_and_again(
    old_releases: Path, releases_dir: Path, catalogue: Path, tmp_path: Path
) -> None:
    gallery, transform = tmp_path / "gallery", tmp_path / "transform"
    shared = ("--data", catalogue, "--gallery", gallery)
    filled = run("gallery", "fill", *shared, "--releases", old_releases)
    assert filled == {"items": 240, "failed": 0, "versions": {"old-captioner": {"seen": 240, "stored": 240}}}
    quality = Quality(catalogue)
    with (
        TritonServer(release.current(old_releases), gallery=str(gallery), log_path=tmp_path / "old.log") as server,
        client.RankClient(server.url, timeout=20) as caller,
    ):
        before = quality(caller)

    new = ("--releases", releases_dir)
    trained = run("backfill", "train", *shared, *new, "--out", transform, "--epochs", "20")
    assert (trained["old_dim"], trained["new_dim"]) == (32, 32)
    planned = run("backfill", "plan", *shared, *new, "--transform", transform)
    assert planned["items"] == 240
    start = command("backfill", "start", *shared, *new, "--batch", "12", "--share", "0.2")

    curve = list[tuple[float, np.ndarray[Any, Any]]]()
    with (
        TritonServer(release.current(releases_dir), gallery=str(gallery), log_path=tmp_path / "new.log") as server,
        client.RankClient(server.url, timeout=20) as caller,
        open_gallery(str(gallery), readonly=True) as watched,
    ):
        # Nothing was begun: the new captioner has no way into the gallery yet, and says so.
        with pytest.raises(client.Unavailable, match="asked with test-captioner"):
            caller.retrieve(quality.media[:1])
        run("backfill", "begin", "--gallery", gallery, *new, "--transform", transform, "--order", "uncertainty")
        curve.append((0.0, quality(caller)))
        kills, moved = 0, 0
        with queried(server.url, quality.media) as seen:
            while True:
                with (tmp_path / "job.log").open("w") as log:
                    job = subprocess.Popen(start, stdout=log, stderr=log)
                while job.poll() is None and _moved(watched) == moved:
                    time.sleep(0.01)
                time.sleep(0.5)
                if job.poll() is not None:
                    break
                job.send_signal(signal.SIGKILL)
                job.wait()
                kills += 1
                moved = _moved(watched)
                assert sum(count.seen for count in watched.count().values()) == 240
                curve.append((moved / 240, quality(caller)))
            assert job.returncode == 0, (tmp_path / "job.log").read_text()[-2000:]
            assert run("backfill", "status", "--gallery", gallery)["phase"] == "moved"
            curve.append((1.0, quality(caller)))
            run("backfill", "cut-over", "--gallery", gallery)
            after = quality(caller)
        assert seen["failures"] == []
        assert seen["answered"] > 20
        assert kills >= 3
        np.testing.assert_array_equal(after, curve[-1][1])

    # No dip: of the paired differences to the worse end, no upper bound (99.7 %) is below zero.
    shares = [share for share, _ in curve]
    assert shares == sorted(shares)
    floor = before if before.mean() < after.mean() else after
    for share, at in curve:
        difference = at - floor
        bound = difference.mean() + 3 * difference.std(ddof=1) / np.sqrt(len(difference))
        assert bound >= 0, f"{share}: precision {at.mean():.3f}, {floor.mean():.3f} at the worse end"

    # Item by item what a rebuild from nothing gives.
    media, encoder = Catalogue(catalogue), LocalEncoder(release.current(releases_dir))
    whole = Transform((transform / "query.onnx").read_bytes())(
        np.stack([one for one in encoder([media[item] or b"" for item in media]) if isinstance(one, np.ndarray)])
    )["new"]
    with open_gallery(str(gallery), readonly=True) as opened:
        name = opened.versions()[-1].name
        assert opened.ids(name).tolist() == media.ids.tolist()
        np.testing.assert_allclose(opened.get(media.ids, name)[0], whole, atol=1e-5)

    back = run("backfill", "rollback", "--gallery", gallery)
    assert back["versions"]["old-captioner"] == {"seen": 240, "stored": 240}
    assert back["without_old_vector"] == 0
    cleaned = run("backfill", "clean", "--yes", "--gallery", gallery)
    assert cleaned["versions"] == {"old-captioner": {"seen": 240, "stored": 240}}


def _moved(gallery: Gallery) -> int:
    upgrade = read_upgrade(gallery)
    return gallery.count()[upgrade.new].seen if upgrade else 0


def test_through_the_server(releases_dir: Path, catalogue: Path, tmp_path: Path) -> None:
    """The served vision tower embeds as the one in process; put, delete, wrong requests."""
    gallery = tmp_path / "gallery"
    with TritonServer(release.current(releases_dir), gallery=str(gallery), log_path=tmp_path / "log") as server:
        run("gallery", "fill", "--data", catalogue, "--gallery", gallery, "--releases", releases_dir,
            "--url", server.url)  # fmt: skip
        media = Catalogue(catalogue)
        some = media.ids[:8].tolist()
        data = [media[item] or b"" for item in some]
        vectors = np.stack([one for one in LocalEncoder(release.current(releases_dir))(data)
                            if isinstance(one, np.ndarray)])  # fmt: skip
        with client.RankClient(server.url, timeout=20) as caller:
            by_media, by_vector = caller.retrieve(data, k=5), caller.retrieve(vectors=vectors, k=5)
            for item, one, other in zip(some, by_media, by_vector, strict=True):
                assert one.item_ids[0] == other.item_ids[0] == item
                assert one.distances[0] == pytest.approx(0, abs=1e-5)
                assert one.versions == ["test-captioner"] * 5
                np.testing.assert_allclose(one.distances, other.distances, atol=1e-5)
            picture = tmp_path / "picture"
            picture.write_bytes(data[0])
            run("gallery", "put", "9999", picture, "--gallery", gallery, "--releases", releases_dir)
            assert set(caller.retrieve(data[:1], k=2)[0].item_ids.tolist()) == {some[0], 9999}
            run("gallery", "delete", "9999", str(some[0]), "--gallery", gallery)
            assert not {some[0], 9999} & set(caller.retrieve(data[:1], k=50)[0].item_ids.tolist())
            everything = caller.retrieve(data[:1], k=1000)[0]
            assert len(everything.item_ids) == 239
            with pytest.raises(client.InvalidArgument, match=r"MEDIA: row 0: "):
                caller.retrieve([b"no picture"])
            with pytest.raises(client.InvalidArgument, match=r"shape for input .VECTOR."):
                caller.retrieve(vectors=np.ones((1, 3), np.float32))
        stats = run("gallery", "stats", "--gallery", gallery)
        assert stats["versions"] == {"test-captioner": {"seen": 239, "stored": 239}}
        assert os.path.isdir(gallery)


def test_wrong_commands_say_what_to_do(tmp_path: Path) -> None:
    def fails(*arguments: str | Path) -> str:
        done = subprocess.run(command(*arguments), capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    missing = tmp_path / "gallery"
    assert "there is none; `sightline gallery fill` makes one" in fails("backfill", "status", "--gallery", missing)
    assert not missing.exists()
    with open_gallery(str(missing)):
        pass
    named = ("--releases", tmp_path, "--release", "none", "--gallery", missing)
    assert "expected a release folder" in fails("backfill", "begin", *named, "--transform", tmp_path)
    for step in ("cut-over", "rollback", "pause"):
        assert "there is none" in fails("backfill", step, "--gallery", missing)
