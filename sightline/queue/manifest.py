"""A catalogue's items into the queue, from the Parquet file that lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sightline.errors import DataError
from sightline.media import content_hash
from sightline.queue.base import ItemEvent, ItemQueue, Offer
from sightline.schema import ITEMS, MediaReader, open_parquet

__all__ = ["count_items", "enqueue"]

_COLUMNS = pa.schema([ITEMS.field(name) for name in ("item_id", "media", "media_uri")])
_BATCH = 64  # rows in memory, and between two marks
_POLL = 0.2  # seconds between two tries to put into a full queue
_WHAT = "a Parquet file of items, as `sightline data import` writes it"


def count_items(path: Path) -> int:
    """Rows of the manifest."""
    with open_parquet(path, _WHAT) as file:
        rows: int = file.metadata.num_rows
    return rows


def enqueue(
    queue: ItemQueue, path: Path, advance: Callable[[int], object] = lambda rows: None, *,
    nap: Callable[[float], object] = time.sleep,
) -> int:  # fmt: skip
    """Put all items with media; returns how many were new to the queue. Waits while the queue is full.

    How far it came is kept in the queue, and forgotten at the end: an interrupted run goes on where it stopped, but
    for a few rows, which collapse with what is queued. `advance` hears of rows, first of those of an earlier run.
    Files beside the manifest (`media_uri`) lie in its folder. Raises DataError, which names the row.
    """
    queued = 0
    with open_parquet(path, _WHAT) as file:
        name = _name(path)
        done = queue.mark(name)
        advance(done)
        for first, part in _batches(file, path, done):
            reader = MediaReader(path.parent, part)
            for item in part["item_id"].to_pylist():
                if (media := reader[item]) is not None:
                    event = ItemEvent(item_id=item, media=media, media_hash=content_hash(media))
                    while (offer := queue.offer(event)) is Offer.full:
                        _refuse_what_never_fits(queue, event, path)
                        nap(_POLL)
                    queued += offer is Offer.queued
            queue.set_mark(name, first + len(part))
            advance(first + len(part) - done)
            done = first + len(part)
    queue.set_mark(name, None)
    return queued


def _refuse_what_never_fits(queue: ItemQueue, event: ItemEvent, path: Path) -> None:
    if len(event.media) > queue.bounds.media_bytes:
        raise DataError(
            f"{path}: item {event.item_id}: expected media of at most {queue.bounds.media_bytes} bytes, the queue's "
            f"bound; got {len(event.media)}; raise --max-bytes"
        )


def _batches(file: pq.ParquetFile, path: Path, done: int) -> Iterator[tuple[int, pa.Table]]:
    """First row and rows, from about `done` on: row groups and batches before it are left out."""
    names = file.schema_arrow.names
    if missing := [name for name in _COLUMNS.names if name not in names]:
        raise DataError(f"{path}: expected {_WHAT}, with {', '.join(_COLUMNS.names)}; there is no {missing[0]}")
    at = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if at + rows <= done:
            at += rows
            continue
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=_COLUMNS.names):
            if at + len(batch) > done:
                try:
                    yield at, pa.Table.from_batches([batch]).cast(_COLUMNS)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
                    raise DataError(f"{path}, rows {at} to {at + len(batch) - 1}: {error}") from error
            at += len(batch)


def _name(path: Path) -> str:
    """Another one when the file changes."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
