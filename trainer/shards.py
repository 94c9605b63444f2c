"""A catalogue in Parquet files, and blocks of its rows: what bulk captioning reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sightline.errors import DataError
from sightline.schema import ITEMS

__all__ = ["Block", "Catalogue", "blocks_of"]

COLUMNS = ("item_id", "media", "media_uri")
_READ, _BUFFER = 64, 1 << 20  # rows and bytes at a time


@dataclass(frozen=True)
class Block:
    """Rows `first` … `first + rows − 1` of a shard."""

    shard: str
    number: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}-{self.first:09d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Parquet files with `item_id` int64 and `media` (bytes), `media_uri` (a path in `folder`) or both."""

    folder: Path
    shards: tuple[Path, ...]

    @classmethod
    def find(cls, path: Path) -> Self:
        """A data set's folder with items.parquet, which may be a folder of files; one file; any folder of files.

        Raises DataError where there is none of these.
        """
        items = path / "items.parquet"
        where = items if items.exists() else path
        folder = path if path.is_dir() else path.parent
        shards = tuple(sorted(where.glob("*.parquet"))) if where.is_dir() else (where,)
        if not where.exists() or not shards:
            raise DataError(f"{path}: expected a data set, a Parquet file of items or a folder of such files")
        return cls(folder=folder.resolve(), shards=tuple(shard.resolve() for shard in shards))

    def read(self, block: Block) -> pa.Table:
        """The block's columns."""
        path = next(shard for shard in self.shards if shard.name == block.shard)
        with _open(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            batches = list(_rows(file, block.first, block.first + block.rows, columns))
        return _cast(pa.Table.from_batches(batches), path)

    def describe(self, known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Per shard its name, rows, bytes, time of change and SHA-256.

        Those of `known` that have the size and time they had are not read. Where any is, all ids are checked: above 0,
        each once. Raises DataError.
        """
        same = {(one["name"], one["bytes"], one["changed_ns"]): one for one in known}
        total = sum(path.stat().st_size for path in self.shards)
        described = []
        with tqdm(total=total, desc="check", unit="B", unit_scale=True, mininterval=1) as progress:
            for path in self.shards:
                size, changed = path.stat().st_size, path.stat().st_mtime_ns
                if (found := same.get((path.name, size, changed))) is None:
                    with _open(path) as file:
                        rows = file.metadata.num_rows
                    found = {"name": path.name, "rows": rows, "bytes": size, "changed_ns": changed,
                             "sha256": _sha256(path)}  # fmt: skip
                described.append(found)
                progress.update(size)
        if described != list(known):
            self._check_ids()
        return described

    def _check_ids(self) -> None:
        found = []
        for path in self.shards:
            with _open(path) as file:
                ids = _cast(file.read(["item_id"]), path)["item_id"].to_numpy()
            if (wrong := np.flatnonzero(ids <= 0)).size:
                raise DataError(
                    f"{path}: column 'item_id', row {wrong[0]}: expected an id above 0, got {ids[wrong[0]]}"
                )
            found.append(ids)
        seen = np.sort(np.concatenate(found))
        if (twice := seen[1:][seen[1:] == seen[:-1]]).size:
            raise DataError(f"{self.folder}: column 'item_id': expected ids used once; {twice[0]} is there again")


def blocks_of(shards: Sequence[dict[str, Any]], size: int) -> list[Block]:
    """All blocks of described shards, in the catalogue's order."""
    return [
        Block(shard["name"], number, first, min(size, shard["rows"] - first))
        for number, shard in enumerate(shards)
        for first in range(0, shard["rows"], size)
    ]


def _open(path: Path) -> pq.ParquetFile:
    """A shard's columns are read as a stream: a row group may be larger than the memory."""
    try:
        file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: expected a Parquet file of items: {error}") from error
    names = file.schema_arrow.names
    if "item_id" not in names or not {"media", "media_uri"} & set(names):
        file.close()
        raise DataError(f"{path}: expected the columns item_id and media or media_uri, found {', '.join(names)}")
    return file


def _rows(file: pq.ParquetFile, first: int, end: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Rows `first` … `end − 1`; row groups without any of them are not read."""
    at = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if at + rows <= first or at >= end:
            at += rows
            continue
        for batch in file.iter_batches(_READ, row_groups=[group], columns=columns):
            begin, stop = max(first - at, 0), min(end - at, batch.num_rows)
            if begin < stop:
                yield batch.slice(begin, stop - begin)
            at += batch.num_rows
            if at >= end:
                return


def _cast(table: pa.Table, path: Path) -> pa.Table:
    """With the types of a data set's items, and nulls for the column that is not there."""
    try:
        for name in {"media", "media_uri"} - set(table.column_names):
            table = table.append_column(name, pa.nulls(table.num_rows))
        ids = pa.field("item_id", pa.int64(), nullable=False)
        return table.select(COLUMNS).cast(pa.schema([ids, *(ITEMS.field(name) for name in COLUMNS[1:])]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"{path}: expected item_id int64, media binary and media_uri string: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
