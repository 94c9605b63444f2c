"""Ray, for commands that share their work out: `--ray local|ADDRESS --workers N`.

It is no part of requirements.lock: whoever wants it installs it (`REQUIREMENT`), on every machine of a cluster.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sightline.errors import ConfigError, SightlineError

__all__ = ["REQUIREMENT", "RETRIES", "WORKERS", "cpus_each", "ray_cluster"]

REQUIREMENT = "ray[data]==2.60.0"
WORKERS = 2  # where the command does not say
RETRIES = 3  # of a part whose worker died


@contextmanager
def ray_cluster(address: str, workers: int, part: str) -> Iterator[tuple[Any, int]]:
    """Start or join Ray: the module `ray` with `ray.data`, and the CPUs of each worker.

    Args:
        address: `local` starts it here, anything else is for `ray.init(address=…)`.
        part: what a worker is given at a time, in messages.

    Raises:
        ConfigError: Ray is not installed or not to be reached, or has fewer CPUs than there shall be workers.
        SightlineError: a part with which worker after worker died.
    """
    try:
        import ray  # type: ignore[import-not-found]
        import ray.data  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"--ray: Ray Data is not installed here ({error}); `make ray` installs it beside .venv, and "
            "`.tools/ray/bin/python -m sightline.cli …` uses it in place of `sightline …`; elsewhere: "
            f"pip install '{REQUIREMENT}'"
        ) from error
    cpus = _connect(ray, address, workers)
    try:
        yield ray, cpus
    except ray.exceptions.RayTaskError:  # this is a bug: with its traceback
        raise
    except ray.exceptions.RayError as error:
        raise SightlineError(
            f"--ray: {1 + RETRIES} workers in turn died with the same {part}, often for lack of memory; Ray's log, in "
            f"/tmp/ray/session_latest where it ran, says why. Finished {part}s are kept; continue with fewer --workers"
        ) from error
    finally:
        ray.shutdown()


def cpus_each(nodes: Sequence[int], workers: int) -> int:
    """The most CPUs that each worker can have, on nodes with so many; a worker is on one node. 0: there are too few."""
    enough = (cpus for cpus in range(max(nodes), 0, -1) if sum(node // cpus for node in nodes) >= workers)
    return next(enough, 0)


def _connect(ray: Any, address: str, workers: int) -> int:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    how: dict[str, Any] = {"address": address}
    if address == "local":
        how |= {"num_cpus": max(workers, len(os.sched_getaffinity(0))), "include_dashboard": False}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself would wait for minutes, then end the process
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**how, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: expected `local` or the address of a Ray cluster: {error}") from error
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not (cpus := cpus_each(nodes, workers)):
        ray.shutdown()
        raise ConfigError(f"--workers: expected at most {sum(nodes)}, the CPUs of {address}; got {workers}")
    return cpus
