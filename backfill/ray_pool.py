"""A backfill's batches on Ray: a pool of actors, each with the release's vision tower and the data set.

Only ids go out, only vectors and reasons come back; actors do not know the gallery. Release and data set have to be
where every node sees them. The batches of an actor that dies are given to the one that Ray starts in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from backfill.job import Embedded, Stage, embed
from backfill.source import Catalogue
from sightline.content import LocalEncoder
from sightline.errors import ConfigError, SightlineError
from sightline.ray_cluster import RETRIES, ray_cluster

__all__ = ["ray_pool"]

IN_FLIGHT = 2  # batches of each actor: it has the next one while its answer is written


@contextmanager
def ray_pool(address: str, workers: int, data: Path, release_dir: Path, captioner: str) -> Iterator[Stage]:
    """Workers on Ray as a `Stage`.

    Args:
        address: as in `ray_cluster`.
        captioner: version that the release must have on every worker.

    Raises:
        ConfigError: as `ray_cluster`.
        SightlineError: what a worker found wrong; a batch with which worker after worker died.
    """
    with ray_cluster(address, workers, "batch") as (ray, cpus):
        actor = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=RETRIES)(_Actor)
        of = (data.resolve(), release_dir.resolve(), captioner, cpus)
        yield partial(_embed, ray, [actor.remote(*of) for _ in range(workers)])


def _embed(ray: Any, actors: Sequence[Any], batches: Iterable[Sequence[int]]) -> Iterator[Embedded]:
    todo, free, busy = iter(batches), [*actors] * IN_FLIGHT, dict[Any, Any]()
    while True:
        busy |= {actor.embed.remote(ids): actor for actor, ids in zip(free, todo, strict=False)}
        if not busy:
            return
        (ready,), _ = ray.wait(list(busy))
        free = [busy.pop(ready)]
        try:
            done: Embedded = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SightlineError | OSError):
                raise SightlineError(str(error.cause)) from error
            raise
        yield done


class _Actor:
    """One encoder of the pool."""

    def __init__(self, data: Path, release_dir: Path, captioner: str, threads: int) -> None:
        self._data, self._release_dir, self._captioner, self._threads = data, release_dir, captioner, threads

    @cached_property
    def _loaded(self) -> tuple[LocalEncoder, Catalogue]:
        """With the first batch, whose answer can say what is wrong."""
        encoder = LocalEncoder(self._release_dir, threads=self._threads)
        if encoder.version != self._captioner:
            raise ConfigError(
                f"--release {self._release_dir}: expected captioner {self._captioner} on every worker, got "
                f"{encoder.version}; put the same release there"
            )
        return encoder, Catalogue(self._data)

    def embed(self, ids: Sequence[int]) -> Embedded:
        return embed(*self._loaded, ids)
