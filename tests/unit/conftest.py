"""Feature stores of every kind, each a `location`; the servers are started once for the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.feature_stores import empty
from tests.redis_server import redis_cluster, redis_server


@pytest.fixture(scope="session")
def lone_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (port, _):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def redis_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as port:
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(params=["lmdb", "lone_redis", "redis_nodes"], ids=["lmdb", "server", "cluster"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty store."""
    if request.param == "lmdb":
        return str(tmp_path / "features")
    url: str = request.getfixturevalue(request.param)
    empty(url)
    return url
