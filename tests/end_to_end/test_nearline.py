"""The nearline worker as an operator starts it, with the real server: from a manifest to records in its store."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton
from PIL import Image
from typer.testing import CliRunner

from serving.captioner import ServedCaptioner
from serving.triton import TritonServer
from sightline.cli import app
from sightline.errors import ReleaseError
from sightline.features import Versions
from sightline.item_records import Unavailable
from sightline.media import content_hash
from sightline.queue import ItemEvent, open_queue
from sightline.schema import ITEMS
from sightline.store import open_store
from sightline.tokens import TokenSpec
from tests.media_files import clip, encoded
from tests.redis_server import redis_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Nine pictures and a video that no other test has."""
    blocks = np.random.default_rng(4711).integers(0, 256, (9, 3, 3, 3), dtype=np.uint8)
    pictures = [encoded(Image.fromarray(one).resize((50, 50), Image.Resampling.NEAREST), "PNG") for one in blocks]
    return [*pictures, clip(tmp_path_factory.mktemp("media") / "clip.mp4", [10, 200, 30, 90, 7])]


def manifest(folder: Path, media: dict[int, bytes]) -> Path:
    rows = {
        "item_id": list(media), "media": list(media.values()), "media_uri": [None] * len(media),
        "media_type": ["image"] * len(media), "created_at": [0] * len(media), "text": [None] * len(media),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(rows, ITEMS), folder / "items.parquet")
    return folder / "items.parquet"


@contextmanager
def worker(server: TritonServer, queue: str, store: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sightline nearline run` in a process of its own, and the address of its metrics."""
    command = [
        sys.executable, "-m", "sightline.cli", "nearline", "run", "--queue", queue, "--store", store,
        "--release", server.release_dir.name, "--releases", str(server.release_dir.parent), "--url", server.url,
        "--batch", "4", "--metrics-port", "0",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 90)[0], "the worker says nothing"
        line = process.stderr.readline()
        found = re.search(r"metrics: (\S+)", line)
        assert found, line
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if isinstance(pipe, io.IOBase):
                pipe.close()


@pytest.fixture(params=["embedded", "server"])
def places(request: pytest.FixtureRequest, server: TritonServer, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Queue and store: a folder and the running server's own store; then a Redis server for both."""
    if request.param == "embedded":
        yield str(tmp_path / "queue"), server.store
    else:
        with redis_server(tmp_path) as (port, _):
            yield (f"redis://127.0.0.1:{port}",) * 2


def test_from_a_manifest_to_records(
    places: tuple[str, str], server: TritonServer, media: list[bytes], tmp_path: Path
) -> None:
    queue, store = places
    items = {9_000_000 + number: one for number, one in enumerate(media)}
    path = manifest(tmp_path / "data", items | {9_100_000: b"no picture at all"})
    done = CliRunner().invoke(app, ["nearline", "enqueue", "--manifest", str(path), "--queue", queue])
    assert "11 items, 11 new to the queue" in done.output

    with open_queue(queue) as events, worker(server, queue, store) as (process, metrics):
        late = ItemEvent(item_id=0, media=media[0], media_hash=content_hash(media[0]))  # as a ranking server puts it
        assert events.put(late)
        until = time.monotonic() + 60
        while (stats := events.stats()).waiting + stats.taken and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.05)
        with urllib.request.urlopen(metrics, timeout=10) as answer:
            text = answer.read().decode()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        (letter,) = events.dead_letters()
    assert process.returncode == 0
    ended = json.loads(out.splitlines()[-1])
    assert ended["dead"] == 1
    assert sum(ended.values()) == 12  # the server may know captions already: of the first run, of a second time
    assert ended.keys() <= {"captioned", "known", "dead"}
    assert (letter.item_id, letter.note.attempts) == (9_100_000, 1)
    assert "expected" in letter.note.reason or "not" in letter.note.reason
    assert 'sightline_nearline_items_total{model="nearline",result="dead"} 1' in text
    assert 'sightline_nearline_lag_seconds_count{model="nearline"} 11' in text

    models = server.release_dir / "model_repository"
    schema, spec = Versions.read(models / "lookup" / "1").items, TokenSpec.load(models / "tokenize/1/token_spec.json")
    served = served_captions(server, media)
    with open_store(store) as opened:
        found = opened.read_details(list(items), [schema.version])
        for details, caption, one in zip(found, served, media, strict=True):
            assert details is not None
            assert (details.caption, details.media_hash) == (caption, content_hash(one))
            assert details.tokens == [token for token in spec.encode(caption).tolist() if token]
        assert opened.read_details([9_100_000], [schema.version]) == [None]
        assert opened.read_captions(schema.captioner, list(map(content_hash, media))) == served
    assert len(set(served)) > 3  # captions tell these media apart


def served_captions(server: TritonServer, media: list[bytes]) -> list[str]:
    tensor = triton.InferInput("MEDIA", [len(media), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[one] for one in media], object))
    with triton.InferenceServerClient(server.url) as client:
        return [row.decode() for row in client.infer("caption", [tensor]).as_numpy("ANNOTATION")[:, 0]]


def test_captioner_tells_what_is_known_rejected_and_served(server: TritonServer, media: list[bytes]) -> None:
    fresh = encoded(Image.new("RGB", (33, 44), (1, 2, 3)), "PNG")
    with ServedCaptioner(server.url, server.manifest.release) as caption:
        assert [reply.known for reply in caption([fresh])] == [False]
        reply, bad = caption([fresh, b"no picture at all"])
        assert (reply.known, reply.error) == (True, "")
        assert bad.annotation == ""
        assert caption([b"no picture at all"]) == [bad]  # also where the whole request has no usable row
    with ServedCaptioner(server.url, "cpu-of-yesterday") as caption, pytest.raises(
        ReleaseError, match=rf"expected release cpu-of-yesterday, it serves {server.manifest.release}"
    ):  # fmt: skip
        caption([fresh])
    with ServedCaptioner("127.0.0.1:1", "any") as caption, pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: caption"):
        caption([fresh])


def test_a_worker_outlives_kills(server: TritonServer, tmp_path: Path) -> None:
    """Killed with requests under way, three times; what it left is done by the next after the lease."""
    colours = [encoded(Image.new("RGB", (40, 40), (5 * n, 99, 255 - 5 * n)), "PNG") for n in range(24)]
    queue, release = str(tmp_path / "queue"), server.release_dir
    command = [
        sys.executable, "-m", "sightline.cli", "nearline", "run", "--queue", queue, "--store", server.store,
        "--release", release.name, "--releases", str(release.parent), "--url", server.url, "--lease-seconds", "1",
        "--batch", "2",
    ]  # fmt: skip
    items = {9_200_000 + n: one for n, one in enumerate(colours)}
    with open_queue(queue) as events:
        for item, one in items.items():
            assert events.put(ItemEvent(item_id=item, media=one, media_hash=content_hash(one)))
        for _ in range(2):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            before, until = events.stats().waiting, time.monotonic() + 60
            while events.stats().waiting == before and time.monotonic() < until:
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert events.stats().taken > 0
        subprocess.run([*command, "--until-empty"], cwd=ROOT, check=True, capture_output=True, timeout=120)
        stats = events.stats()
        assert (stats.waiting, stats.taken, stats.dead) == (0, 0, 0)
    version = Versions.read(release / "model_repository" / "lookup" / "1").items.version
    with open_store(server.store) as store:
        found = store.read_details(list(items), [version])
    assert [one.media_hash for one in found if one] == list(map(content_hash, colours))
