"""One small release and one real server for the whole run: building and starting them costs seconds each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from catalogue.synthetic import SyntheticConfig, generate
from serving.triton import TritonServer
from sightline import release
from tests.factories import tiny_captioner, tiny_ranker


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `captioner/` and `ranker/`, made for each other, random weights."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_captioner(folder / "captioner", words=True)
    tiny_ranker(folder / "ranker", families=("confidence", "word", "trigram"))
    return folder


@pytest.fixture(scope="session")
def releases_dir(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A releases folder with one published release of the parts. Copy before you change anything in it."""
    from build.assemble import build_release

    folder = tmp_path_factory.mktemp("releases")
    build_release(parts / "captioner", parts / "ranker", folder)
    return folder


@pytest.fixture(scope="session")
def server(releases_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Triton with that release."""
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with TritonServer(release.current(releases_dir), log_path=log) as running:
        yield running


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set: 240 images and videos, 40 users, 3200 impressions."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    generate(folder, SyntheticConfig(items=240, users=40, sessions_per_user=8))
    return folder
