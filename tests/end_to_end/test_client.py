"""The client and its command against a real Triton server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sightline_client import AsyncRankClient, DeadlineExceeded, InvalidArgument, RankClient, Unavailable

from tests.media_files import again, clip, encoded


def images(count: int) -> list[bytes]:
    """Different pictures: blocks of random colours."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [
        encoded(Image.fromarray(block).resize((64, 64), Image.Resampling.NEAREST), "PNG") for block in blocks
    ]


def test_images_and_videos_are_ranked(server: Any, tmp_path: Path) -> None:
    media = [*images(2), clip(tmp_path / "v.mp4", list(range(0, 240, 20)))]
    with RankClient(server.url, timeout=120) as client:
        rows = client.rank(7, media)
    assert sorted(row.index for row in rows) == [0, 1, 2]
    scores = [row.score for row in rows]
    assert all(score is not None and 0 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)
    assert {row.source for row in rows} == {"model"}


def test_more_media_than_the_models_batch(server: Any) -> None:
    """Chunks answer the same as single calls: captions are identical, scores within 1e-4 (the sums of a
    batched matrix product come in another order)."""
    media = images(3)
    with RankClient(server.url, timeout=240) as client:
        singles = [client.rank(7, [again(item)])[0] for item in media]
        assert client.info is not None
        many = client.rank(7, media * client.info.max_batch_size)
        assert len(many) == 3 * client.info.max_batch_size
    for row in many:
        single = singles[row.index % 3]
        assert row.caption == single.caption
        assert row.score == pytest.approx(single.score, abs=1e-4)


def test_asyncio_client_answers_the_same(server: Any) -> None:
    media = images(3)
    with RankClient(server.url, timeout=120) as client:
        expected = client.rank(42, media)

    async def calls() -> list[Any]:
        async with AsyncRankClient(server.url, timeout=120) as client:
            return await asyncio.gather(*(client.rank(42, media) for _ in range(3)))

    for rows in asyncio.run(calls()):
        assert [(row.index, row.caption) for row in rows] == [(row.index, row.caption) for row in expected]
        assert [row.score for row in rows] == pytest.approx([row.score for row in expected], abs=1e-4)


def test_context_reaches_the_ranker_and_is_checked(server: Any) -> None:
    media = images(1)
    with RankClient(server.url, timeout=120) as client:
        zero = client.rank(7, media)[0].score
        assert client.info is not None
        assert client.info.release == server.manifest.release
        last = {field.name: field.cardinality - 1 for field in client.info.context}
        assert client.rank(7, media, context=last)[0].score != zero
        with pytest.raises(InvalidArgument, match="context: expected names among"):
            client.rank(7, media, context={"weather": 1})
        name, top = next(iter(last.items()))
        with pytest.raises(InvalidArgument, match=f"context {name}: expected 0 to {top}"):
            client.rank(7, media, context={name: top + 1})


def test_deadline(server: Any) -> None:
    with RankClient(server.url, timeout=0.002) as client, pytest.raises(DeadlineExceeded):
        client.rank(7, images(32))


def test_http_port_is_not_mistaken_for_a_server(server: Any) -> None:
    with RankClient(server.http_url, timeout=20, retries=0) as client, pytest.raises(Unavailable):
        client.rank(7, images(1))


def command(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sightline.cli", "rank", "--user", "7", "--url", url, *arguments],
        capture_output=True, text=True, timeout=240, check=False, env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip


def test_command(server: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.png", "two.png", "note.txt")]
    for file, content in zip(files, [*images(2), b"just text"], strict=True):
        file.write_bytes(content)
    done = command(server.url, "--json", *map(str, files))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert sorted(row["file"] for row in results[:2]) == [str(files[0]), str(files[1])]
    assert results[2]["file"] == str(files[2])
    assert results[2]["error"].startswith("neither image nor video")
    done = command(server.url, str(files[2]))
    assert done.returncode == 1
    assert "neither image nor video" in done.stdout
