"""Real Redis servers for tests, `benchmarks.redis_server`'s; tests skip where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

from benchmarks.redis_server import MISSING, PROGRAM, run_redis


@contextmanager
def redis_server(folder: Path, *options: str, port: int = 0, password: str | None = None) -> Iterator[tuple[int, int]]:
    """`run_redis`; skips the test where there is no redis-server."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with run_redis(folder, *options, port=port, password=password) as server:
        yield server


@contextmanager
def redis_cluster(folder: Path, nodes: int = 2) -> Iterator[int]:
    """Port of one node of a cluster, whose slots the nodes share evenly."""
    with ExitStack() as stack:
        clients = []
        for node in range(nodes):
            port, _ = stack.enter_context(
                redis_server(folder, "--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{node}.conf",
                             "--appendfilename", f"{node}.aof")
            )  # fmt: skip
            clients.append(stack.enter_context(redis.Redis(port=port, decode_responses=True)))
            first = clients[0].connection_pool.connection_kwargs["port"]
            share = range(node * 16384 // nodes, (node + 1) * 16384 // nodes)
            clients[-1].execute_command("CLUSTER ADDSLOTS", *share)
            clients[-1].execute_command("CLUSTER MEET", "127.0.0.1", first)
        until = time.monotonic() + 30
        while not all(_is_whole(client.cluster("info"), nodes) for client in clients):
            assert time.monotonic() < until, "the cluster does not come together"
            time.sleep(0.05)
        yield first


def _is_whole(info: dict[str, str], nodes: int) -> bool:
    return info["cluster_state"] == "ok" and info["cluster_size"] == str(nodes)
