"""Feature stores to and from Parquet, and their examination.

One file per version; the schema is in the file's metadata under `sightline.store`, as JSON.

    item   id int64 · tokens list<int32> [L] · caption string · media_hash string or null · vector list [V] or null
    user   id int64 · history_items list<int64> · history_times list<int64> · history_strengths list<float> ·
           tokens, negative_tokens list<int32> [K] · weights, negative_weights list<float> [K] · dense list<float> ·
           state binary

`advance` is called with a number of rows when these are done: what a progress bar wants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sightline.errors import DataError, StoreError
from sightline.profile import Profile
from sightline.schema import open_parquet
from sightline.store.base import FeatureStore
from sightline.store.records import (
    Items,
    ItemSchema,
    Schema,
    UserRecord,
    UserSchema,
    decode_items,
    decode_user,
    fault,
    parse_schema,
)

__all__ = ["Report", "count_rows", "export", "find_user", "item_table", "load", "user_table", "verify"]

METADATA = b"sightline.store"
_BATCH = 2048
_PROFILE = {"tokens": pa.int32(), "weights": pa.float32(), "negative_tokens": pa.int32(),
            "negative_weights": pa.float32(), "dense": pa.float32()}  # fmt: skip
_HISTORY = {"items": pa.int64(), "times": pa.int64(), "strengths": pa.float32()}
_NULLABLE = ("media_hash", "vector")
Advance = Callable[[int], object]


def arrow_schema(schema: Schema) -> pa.Schema:
    """Columns of the version's file."""
    fields: dict[str, pa.DataType] = {"id": pa.int64()}
    if schema.kind == "item":
        fields |= {"tokens": pa.list_(pa.int32()), "caption": pa.string(), "media_hash": pa.string()}
        if schema.vector:
            fields["vector"] = pa.list_(pa.float16() if schema.vector_dtype == "float16" else pa.float32())
    else:
        fields |= {f"history_{name}": pa.list_(kind) for name, kind in _HISTORY.items()}
        fields |= {name: pa.list_(kind) for name, kind in _PROFILE.items()}
        fields["state"] = pa.binary()
    columns = [pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in fields.items()]
    return pa.schema(columns, {METADATA: schema.model_dump_json().encode()})


def item_table(schema: ItemSchema, items: Items) -> pa.Table:
    """What `load` reads, of items; write it with `pyarrow.parquet.write_table`."""
    columns = [
        pa.array(items.ids), _lists(items.tokens.astype(np.int32)), pa.array(items.captions, pa.string()),
        pa.array(items.media_hashes, pa.string()),
    ]  # fmt: skip
    if schema.vector:
        has = np.zeros(len(items), bool)
        if items.vectors is not None:
            has = ~has if items.has_vector is None else items.has_vector
        vectors = np.zeros((len(items), schema.vector)) if items.vectors is None else items.vectors
        columns.append(_lists(vectors.astype(schema.vector_dtype), has))
    return pa.table(columns, arrow_schema(schema))


def user_table(schema: UserSchema, users: Sequence[UserRecord]) -> pa.Table:
    """What `load` reads, of users."""
    names = arrow_schema(schema)
    values: dict[str, list[Any]] = {"id": [user.id for user in users], "state": [user.state for user in users]}
    values |= {f"history_{name}": [getattr(user, name) for user in users] for name in _HISTORY}
    values |= {name: [getattr(user.profile, name) for user in users] for name in _PROFILE}
    return pa.table([pa.array(values[column.name], column.type) for column in names], names)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file."""
    with open_parquet(path, "a Parquet file of features") as file:
        rows: int = file.metadata.num_rows
    return rows


def load(store: FeatureStore, path: Path, advance: Advance, *, batch: int = _BATCH) -> Schema:
    """Write a file's version into a store, in batches; continues where an interrupted load of the file stopped.

    `advance` hears of rows when the store has acknowledged them, and first of those of an earlier, interrupted load.
    How far a load came is kept in the store, with the batch; it is forgotten at the end, so that the next load of the
    file begins anew. Raises DataError for a file without a schema, or with rows that do not fit it.
    """
    with open_parquet(path, "a Parquet file of features") as file:
        text = (file.schema_arrow.metadata or {}).get(METADATA)
        if text is None:
            raise DataError(
                f"{path}: expected {METADATA.decode()} in the file's metadata, the JSON of a feature version's schema; "
                "write it with sightline.store.transfer.item_table or user_table"
            )
        schema = parse_schema(text, str(path))
        columns = arrow_schema(schema)
        missing = [name for name in columns.names if name not in file.schema_arrow.names]
        if missing:
            raise DataError(f"{path}: expected the columns {', '.join(columns.names)}; there is no {missing[0]}")
        store.register(schema)
        name, total = f"{schema.space}:{_identity(path)}", file.metadata.num_rows
        done = store.marks().get(name, 0)
        advance(done)
        for part in _batches(file, done, batch, columns.names):
            rows = part.num_rows
            mark = name, done + rows if done + rows < total else None
            try:
                table = pa.Table.from_batches([part]).cast(columns)
                if schema.kind == "item":
                    store.write_items(schema.version, _items(schema, table), mark=mark)
                else:
                    store.write_users(schema.version, _users(schema, table), mark=mark)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, DataError) as error:
                raise DataError(f"{path}, rows {done} to {done + rows - 1}: {error}") from error
            done += rows
            advance(rows)
    return schema


def find_user(path: Path, user: int) -> UserRecord | None:
    """A user of a file that `load` reads; None if it is not in there."""
    with open_parquet(path, "a Parquet file of features") as file:
        schema = parse_schema((file.schema_arrow.metadata or {}).get(METADATA, b""), str(path))
    table = pq.read_table(path, filters=[("id", "=", user)])
    if not isinstance(schema, UserSchema) or not len(table):
        return None
    return _users(schema, table)[0]


def export(store: FeatureStore, schema: Schema, path: Path, advance: Advance) -> int:
    """Write one version to a Parquet file, from which `load` makes records of the same bytes; returns their number.

    Raises StoreError at the first damaged record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with pq.ParquetWriter(part, arrow_schema(schema), compression="zstd") as writer:
        for rows in store.scan(schema):
            for identity, record, caption in rows:
                if wrong := fault(schema, identity, record, caption):
                    raise StoreError(f"{schema.space}: {identity}: {wrong}; `sightline store verify` lists all of them")
            if schema.kind == "item":
                records = np.frombuffer(b"".join(record for _, record, _ in rows), schema.record)
                captions = [(caption or b"").decode() for *_, caption in rows]
                table = item_table(schema, decode_items(records, captions))
            else:
                table = user_table(schema, [decode_user(schema, record) for _, record, _ in rows])
            writer.write_table(table)
            advance(len(rows))
    part.replace(path)
    return count_rows(path)


@dataclass
class Report:
    """What `verify` found: records read, and what is wrong, by id."""

    records: int = 0
    damaged: dict[int, str] = field(default_factory=dict)


def verify(store: FeatureStore, schema: Schema, advance: Advance) -> Report:
    """Read and check every record of a version, checksums included."""
    report = Report()
    for rows in store.scan(schema):
        for identity, record, caption in rows:
            if wrong := fault(schema, identity, record, caption):
                report.damaged[identity] = wrong
        report.records += len(rows)
        advance(len(rows))
    return report


def _batches(file: pq.ParquetFile, done: int, batch: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows from `done` on; row groups before it are not read."""
    at = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if at + rows <= done:
            at += rows
            continue
        for part in file.iter_batches(batch, row_groups=[group], columns=columns):
            if at + part.num_rows > done:
                yield part.slice(max(done - at, 0))
            at += part.num_rows


def _items(schema: ItemSchema, table: pa.Table) -> Items:
    vectors = has = None
    if schema.vector:
        column = table["vector"].combine_chunks()
        has = np.asarray(column.is_valid())
        vectors = np.zeros((len(column), schema.vector), schema.vector_dtype)
        vectors[has] = _rows("vector", column.drop_null(), schema.vector)
    return Items(
        ids=table["id"].to_numpy(), tokens=_rows("tokens", table["tokens"].combine_chunks(), schema.tokens),
        captions=table["caption"].to_pylist(), media_hashes=table["media_hash"].to_pylist(),
        vectors=vectors, has_vector=has,
    )  # fmt: skip


def _users(schema: UserSchema, table: pa.Table) -> list[UserRecord]:
    columns = {name: [row.values.to_numpy(zero_copy_only=False) for row in table[name]]
               for name in (*_PROFILE, *(f"history_{name}" for name in _HISTORY))}  # fmt: skip
    for name in ("tokens", "negative_tokens"):
        columns[name] = [row.astype(np.int64) for row in columns[name]]
    return [
        UserRecord(
            id=identity, state=state, profile=Profile(**{name: columns[name][row] for name in _PROFILE}),
            **{name: columns[f"history_{name}"][row] for name in _HISTORY},
        )
        for row, (identity, state) in enumerate(zip(table["id"].to_pylist(), table["state"].to_pylist(), strict=True))
    ]  # fmt: skip


def _rows(name: str, lists: pa.ListArray, length: int) -> NDArray[Any]:
    """Lists of one length as an array [rows, length]."""
    lengths = pc.list_value_length(lists)
    if not pc.all(pc.equal(lengths, length), min_count=0).as_py():
        raise DataError(f"column {name!r}: expected lists of {length}, got lengths from {pc.min(lengths)} to "
                        f"{pc.max(lengths)}")  # fmt: skip
    rows: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, length)
    return rows


def _lists(rows: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.ListArray:
    """Rows of an array as lists, null where not valid."""
    valid = np.ones(len(rows), bool) if valid is None else valid
    ends = np.concatenate([[0], np.cumsum(valid * rows.shape[1])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(rows[valid].ravel()), mask=pa.array(~valid))


def _identity(path: Path) -> str:
    """Changes when the file does: a digest of its footer, size and time of change."""
    status = path.stat()
    with path.open("rb") as file:
        file.seek(-8, 2)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, 2)
        digest = hashlib.sha256(file.read(size) + f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
