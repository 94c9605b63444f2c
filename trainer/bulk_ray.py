"""Blocks of a catalogue on Ray Data: a pool of actors, each with a captioner of its own.

Ray carries the names of blocks alone: actors read the catalogue and write the blocks' files themselves, so both have to
be where every node sees them. A block whose actor dies is given to a new one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from sightline.errors import SightlineError
from sightline.ray_cluster import RETRIES, WORKERS, ray_cluster
from trainer.bulk import BulkConfig, Worker
from trainer.shards import Block

__all__ = ["caption_on_ray"]


def caption_on_ray(config: BulkConfig, version: str, todo: Sequence[Block]) -> Iterator[int]:
    """`Worker` on every block that is still to do; yields each one's rows when its file is written.

    Raises:
        ConfigError: as `ray_cluster`.
        SightlineError: what a worker found wrong; a block with which worker after worker died.
    """
    if not todo:
        return
    workers = config.workers or WORKERS
    here = replace(config, data=config.data.resolve(), captioner=config.captioner.resolve(), out=config.out.resolve())
    with ray_cluster(config.ray or "local", workers, "block") as (ray, cpus):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        waiting = ray.data.from_items([asdict(block) for block in todo], override_num_blocks=len(todo))
        with warnings.catch_warnings():
            # Ray has no other way yet to say how often a block is tried; without it, for ever.
            warnings.filterwarnings("ignore", ".*ray_remote_args. is deprecated")
            done = waiting.map_batches(
                _Actor, fn_constructor_args=(here, version), batch_size=1, num_cpus=cpus, max_task_retries=RETRIES,
                # One at a time: with its actor dies one block, and only that one has one try less.
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo)), max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
        for row in done.iter_rows():
            if row["wrong"]:
                raise SightlineError(row["wrong"])
            yield row["rows"]


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
