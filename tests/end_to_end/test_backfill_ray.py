"""A backfill on two Ray workers against one process without Ray, workers and the command itself being killed.

Ray is not in requirements.lock: `make test-ray` installs it beside .venv and runs this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from backfill.job import fill
from backfill.source import Catalogue
from sightline import release
from sightline.content import LocalEncoder
from sightline.gallery import Gallery, open_gallery
from sightline.schema import INTERACTIONS, ITEMS, read_items, write_dataset

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray, which only `make test-ray` brings", allow_module_level=True)

ROOT = Path(__file__).parents[2]
OLD, NEW = "old-captioner", "test-captioner"
RAY = ("--ray", "local", "--workers", "2")
SLOW = ("--batch", "4", "--share", "0.1")  # there shall be time to kill something in the middle


@pytest.fixture(scope="module")
def data(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue as it became: a picture cannot be decoded any more, an item lost its own."""
    folder = tmp_path_factory.mktemp("ray") / "data"
    rows = read_items(catalogue).to_pylist()
    rows[7] |= {"media": b"not an image"}
    rows[8] |= {"media": None, "media_type": None}
    write_dataset(folder, pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "ray"})
    return folder


@pytest.fixture(scope="module")
def begun(catalogue: Path, releases_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All items under the old captioner, the upgrade begun; tests copy it."""
    folder = tmp_path_factory.mktemp("begun")
    encoder, media = LocalEncoder(release.current(releases_dir)), Catalogue(catalogue)
    with open_gallery(str(folder / "gallery")) as opened:
        assert fill(opened, encoder, OLD, encoder.width, media, media.ids) == {}
    new = ("--gallery", folder / "gallery", "--releases", releases_dir)
    finish(run("backfill", "train", "--data", catalogue, *new, "--out", folder / "transform", "--epochs", "1"))
    finish(run("backfill", "begin", *new, "--transform", folder / "transform"))
    return folder / "gallery"


@pytest.fixture
def gallery(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "gallery"))


@pytest.fixture
def watched(gallery: Path) -> Iterator[Gallery]:
    with open_gallery(str(gallery), readonly=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(begun: Path, data: Path, releases_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of one process without Ray: each item's version and vector."""
    gallery = Path(shutil.copytree(begun, tmp_path_factory.mktemp("alone") / "gallery"))
    done = finish(start(gallery, data, releases_dir))
    assert (done["phase"], done["moved"], done["remaining"], done["failed"]) == ("running", 238, 2, 2)
    with open_gallery(str(gallery), readonly=True) as opened:
        return content(opened)


def run(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sightline.cli", *map(str, arguments)], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        process_group=0,
    )  # fmt: skip


def start(gallery: Path, data: Path, releases: Path, *more: str) -> subprocess.Popen[str]:
    return run("backfill", "start", "--gallery", gallery, "--data", data, "--releases", releases, *more)


def finish(process: subprocess.Popen[str]) -> Any:
    out, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return json.loads(out.splitlines()[-1])


def refusal(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=500)
    assert process.returncode == 1
    assert "Traceback" not in said
    return said.splitlines()[-1]


def content(opened: Gallery) -> tuple[list[str | None], NDArray[np.float32], list[int]]:
    """Each item's version; the new vectors, and whose they are."""
    new = opened.versions()[-1].name
    ids = opened.ids(new)
    return opened.seen(range(1, 241)), opened.get(ids, new)[0], ids.tolist()


def same(one: Any, other: Any) -> None:
    assert (one[0], one[2]) == (other[0], other[2])
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


def workers(process: subprocess.Popen[str], doing: str = "") -> list[psutil.Process]:
    """Actors of a job, or those of them that are `doing` something, by the title that Ray gives their processes."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            if "_Actor" in title and doing in title:
                found.append(child)
    return found


def moved(opened: Gallery) -> int:
    return opened.count()[opened.versions()[-1].name].seen


def await_moved(process: subprocess.Popen[str], opened: Gallery, items: int) -> None:
    while process.poll() is None and moved(opened) < items:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_a_worker_that_dies_changes_nothing(
    gallery: Path, watched: Gallery, data: Path, releases_dir: Path, alone: Any
) -> None:
    process = start(gallery, data, releases_dir, *RAY, *SLOW)
    await_moved(process, watched, 16)
    pool = workers(process)
    assert len(pool) == 2
    pool[0].suspend()
    await_moved(process, watched, moved(watched) + 24)  # more than it could have finished: now it sits on batches
    assert workers(process) == pool
    pool[0].kill()
    done = finish(process)
    assert (done["phase"], done["moved"], done["remaining"], done["failed"]) == ("running", 238, 2, 2)
    same(content(watched), alone)


def test_a_killed_job_goes_on(gallery: Path, watched: Gallery, data: Path, releases_dir: Path, alone: Any) -> None:
    process = start(gallery, data, releases_dir, *RAY, *SLOW)
    await_moved(process, watched, 40)
    pool = workers(process)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(pool, timeout=60)[1], "they end with the job"
    kept = moved(watched)
    assert 40 <= kept < 238
    assert sum(count.seen for count in watched.count().values()) == 240

    process = start(gallery, data, releases_dir, *RAY, *SLOW)  # the same command, ended with Ctrl-C
    await_moved(process, watched, kept + 20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = finish(process)
    assert done["phase"] == "running"
    assert kept + 20 <= done["moved"] < 238

    assert finish(start(gallery, data, releases_dir, *RAY))["moved"] == 238
    same(content(watched), alone)


def test_a_batch_with_which_every_worker_dies_ends_the_job(
    gallery: Path, watched: Gallery, data: Path, releases_dir: Path, alone: Any
) -> None:
    process = start(gallery, data, releases_dir, *RAY, *SLOW)
    await_moved(process, watched, 16)
    killed = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for one in workers(process, ".embed"):
                one.kill()
                killed += 1
    assert "--ray: 4 workers in turn died with the same batch" in refusal(process)
    assert killed >= 4
    assert 16 <= moved(watched) < 238
    assert finish(start(gallery, data, releases_dir))["moved"] == 238  # without Ray
    same(content(watched), alone)


def test_what_a_worker_finds_wrong_ends_the_job(
    gallery: Path, watched: Gallery, data: Path, releases_dir: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(releases_dir, tmp_path / "releases", symlinks=True))
    model = release.current(broken) / "model_repository" / "vision_encoder" / "1" / "model.onnx"
    model.unlink()
    assert "model.onnx: missing; expected a release of lane" in refusal(start(gallery, data, broken, *RAY))
    assert moved(watched) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "local", "--workers", "0"), "error: --workers: expected at least 1, with --ray; got 0"),
        (("--workers", "2"), "error: --workers: expected at least 1, with --ray; got 2 and --ray None"),
        ((*RAY, "--url", "127.0.0.1:1"), "error: --ray local: expected without --url"),
        (("--ray", "127.0.0.1:1"), "error: --ray 127.0.0.1:1: expected `local` or the address of a Ray cluster"),
    ],
)
def test_wrong_options(begun: Path, data: Path, releases_dir: Path, options: tuple[str, ...], message: str) -> None:
    assert refusal(start(begun, data, releases_dir, *options)).startswith(message)
