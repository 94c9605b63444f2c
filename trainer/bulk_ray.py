"""Blocks of a catalogue on Ray Data: a pool of actors, each with a captioner of its own.

Ray carries the names of blocks alone: actors read the catalogue and write the blocks' files themselves, so both have to
be where every node sees them. A block whose actor dies is given to a new one.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from sightline.errors import ConfigError, SightlineError
from trainer.bulk import BulkConfig, Worker
from trainer.shards import Block

__all__ = ["REQUIREMENT", "caption_on_ray"]

REQUIREMENT = "ray[data]==2.60.0"
WORKERS = 2  # where the command does not say
RETRIES = 3  # of one block whose actor died


def caption_on_ray(config: BulkConfig, version: str, todo: Sequence[Block]) -> Iterator[int]:
    """`Worker` on every block that is still to do; yields each one's rows when its file is written.

    Raises:
        ConfigError: Ray is not installed or not to be reached, or has fewer CPUs than there shall be workers.
        SightlineError: what a worker found wrong; a block with which worker after worker died.
    """
    try:
        import ray  # type: ignore[import-not-found]
        from ray.data import ActorPoolStrategy, DataContext  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"--ray: Ray Data is not installed here ({error}); `make ray` installs it beside .venv, and "
            "`.tools/ray/bin/python -m sightline.cli caption run …` uses it; elsewhere: "
            f"pip install '{REQUIREMENT}'"
        ) from error
    if not todo:
        return
    workers = config.workers or WORKERS
    here = replace(config, data=config.data.resolve(), captioner=config.captioner.resolve(), out=config.out.resolve())
    cpus = _connect(ray, config.ray or "local", workers)
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        waiting = ray.data.from_items([asdict(block) for block in todo], override_num_blocks=len(todo))
        with warnings.catch_warnings():
            # Ray has no other way yet to say how often a block is tried; without it, for ever.
            warnings.filterwarnings("ignore", ".*ray_remote_args. is deprecated")
            done = waiting.map_batches(
                _Actor, fn_constructor_args=(here, version), batch_size=1, num_cpus=cpus, max_task_retries=RETRIES,
                # One at a time: with its actor dies one block, and only that one has one try less.
                compute=ActorPoolStrategy(size=min(workers, len(todo)), max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
        for row in done.iter_rows():
            if row["wrong"]:
                raise SightlineError(row["wrong"])
            yield row["rows"]
    except ray.exceptions.RayTaskError:  # this is a bug: with its traceback
        raise
    except ray.exceptions.RayError as error:
        raise SightlineError(
            f"--ray: {1 + RETRIES} workers in turn died with the same block, often for lack of memory; Ray's log, in "
            "/tmp/ray/session_latest where it ran, says why. Finished blocks are kept; continue with fewer --workers"
        ) from error
    finally:
        ray.shutdown()


class _Actor:
    """One captioner of the pool."""

    def __init__(self, config: BulkConfig, version: str) -> None:
        self._of = config, version
        self._worker: Worker | None = None  # loaded with the first block, whose answer can say what is wrong

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One block: {field: array [1]} → its rows [1], and what is wrong [1], which ends the run."""
        block = Block(**{name: column.tolist()[0] for name, column in batch.items()})
        try:
            self._worker = self._worker or Worker(*self._of)
            return {"rows": [self._worker(block)], "wrong": [""]}
        except (SightlineError, OSError) as error:
            return {"rows": [0], "wrong": [str(error)]}


def _connect(ray: Any, address: str, workers: int) -> int:
    """Start or join Ray; returns the CPUs of each worker."""
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
    if sum(nodes) < workers:
        ray.shutdown()
        raise ConfigError(f"--workers: expected at most {sum(nodes)}, the CPUs of {address}; got {workers}")
    return max(1, min(sum(nodes) // workers, max(nodes)))
