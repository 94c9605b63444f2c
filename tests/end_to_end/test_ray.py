"""Bulk captioning on two Ray workers against a single process, workers and the run itself being killed.

Ray is not in requirements.lock: `make test-ray` installs it beside .venv and runs this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from sightline.schema import INTERACTIONS, ITEMS, read_items, write_dataset
from tests.factories import tiny_captioner

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray, which only `make test-ray` brings", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BLOCK, BATCH = 4, 1  # small: there shall be time to kill something in the middle
RAY = ("--ray", "local", "--workers", "2")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner"), words=True)


@pytest.fixture(scope="module")
def data(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the catalogue, with a picture that cannot be decoded and an item without any."""
    folder = tmp_path_factory.mktemp("ray") / "data"
    rows = read_items(catalogue).to_pylist()
    rows[7] |= {"media": b"not an image"}
    rows[8] |= {"media": None, "media_type": None}
    write_dataset(folder, pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "ray"})
    return folder


@pytest.fixture(scope="module")
def alone(data: Path, captioner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a single process without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(data, captioner, folder))["captioned"] == 238
    return folder


def start(data: Path, captioner: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    paths = ["--data", data, "--captioner", captioner, "--out", folder / "run"]
    paths += ["--captions", folder / "captions.parquet", "--block", BLOCK, "--batch", BATCH]
    return subprocess.Popen(
        [sys.executable, "-m", "sightline.cli", "caption", "run", *map(str, paths), *more], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Any:
    out, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    return json.loads(out.splitlines()[-1])


def blocks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "run" / "blocks").iterdir())}


def workers(process: subprocess.Popen[str], doing: str = "") -> list[psutil.Process]:
    """Actors of a run, or those of them that are `doing` something, by the title that Ray gives their processes."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            if "_Actor" in title and doing in title:
                found.append(child)
    return found


def await_blocks(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    """Until a run has finished so many."""
    while process.poll() is None and len(list((folder / "run" / "blocks").glob("*.parquet"))) < count:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_two_workers_write_what_one_process_writes(data: Path, captioner: Path, alone: Path, tmp_path: Path) -> None:
    """Every byte of every block, although a worker is killed in the middle: its block goes to a new one."""
    process = start(data, captioner, tmp_path, *RAY)
    await_blocks(process, tmp_path, 4)
    assert len(workers(process)) == 2
    while not (busy := workers(process, ".submit")):
        assert process.poll() is None
    busy[0].kill()
    said = finish(process)
    assert (said["items"], said["captioned"], said["failed"], said["new_blocks"]) == (240, 238, 1, 60)
    assert blocks(tmp_path) == blocks(alone)
    assert (tmp_path / "captions.parquet").read_bytes() == (alone / "captions.parquet").read_bytes()


def test_a_killed_run_continues_without_ray(data: Path, captioner: Path, alone: Path, tmp_path: Path) -> None:
    process = start(data, captioner, tmp_path, *RAY)
    await_blocks(process, tmp_path, 4)
    pool = workers(process)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(pool, timeout=60)[1], "they end with the run"
    kept = blocks(tmp_path)
    assert 4 <= len(kept) < 60
    said = finish(start(data, captioner, tmp_path))
    assert said["new_blocks"] == 60 - len([name for name in kept if name.endswith(".parquet")])
    assert blocks(tmp_path) == blocks(alone)


def test_what_a_worker_finds_wrong_ends_the_run_with_a_line(data: Path, captioner: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(captioner, tmp_path / "captioner"))
    (broken / "words.npz").write_bytes(b"not an archive")
    for where in ([], RAY):
        process = start(data, broken, tmp_path, *where)
        _, said = process.communicate(timeout=500)
        assert process.returncode == 1
        assert "words.npz: expected words, rate, weight, bias and frames of a classifier" in said.splitlines()[-1]
        assert "Traceback" not in said


def test_a_cluster_that_is_not_there_is_said_at_once(data: Path, captioner: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        process = start(data, captioner, tmp_path, "--ray", f"127.0.0.1:{taken.getsockname()[1]}")
        _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.search(
        r"error: --ray 127\.0\.0\.1:\d+: expected `local` or the address of a Ray cluster: .* refused$", said
    )
