"""The data set: items and interactions as Parquet, checked on every read.

    items.parquet         one row per item; its media inside (`media`) or beside it (`media_uri`)
    interactions.parquet  one row per shown item: who, what, when, clicked or not, context
    dataset.json          how the data set came to be
    oracle.parquet        optional, row-aligned with the interactions: the true click `probability` (float64)
                          of a simulated log; only evaluation reads it

Every DataError names file, column, row (from 0), what was expected and what was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sightline.errors import DataError

__all__ = [
    "CONTEXT_PREFIX",
    "INTERACTIONS",
    "INTERACTIONS_OPTIONAL",
    "ITEMS",
    "MEDIA_TYPES",
    "MediaReader",
    "context_columns",
    "open_parquet",
    "read_interactions",
    "read_items",
    "read_record",
    "stream_interactions",
    "validate",
    "write_dataset",
]

TIMESTAMP = pa.timestamp("us", tz="UTC")
MEDIA_TYPES = ("image", "video")
CONTEXT_PREFIX = "context_"

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),  # > 0, unique
        pa.field("media", pa.binary()),
        pa.field("media_uri", pa.string()),  # path relative to the folder; at most one of media and media_uri
        pa.field("media_type", pa.string()),  # "image" or "video"; null exactly where there is no media
        pa.field("created_at", TIMESTAMP, nullable=False),
        pa.field("text", pa.string()),  # reference caption
    ]
)
ITEMS_OPTIONAL = pa.schema([pa.field("external_id", pa.string(), nullable=False)])  # the id at the source

INTERACTIONS = pa.schema(
    [
        pa.field("user_id", pa.int64(), nullable=False),  # > 0
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("timestamp", TIMESTAMP, nullable=False),
        pa.field("label", pa.float32(), nullable=False),  # 0 or 1
    ]
)
"""Any number of `context_<name>` int32 columns (0, 1, …) may follow."""
INTERACTIONS_OPTIONAL = pa.schema(
    # How the user took the item, −1 … 1, where the log knows more than the label (ratings, dwell time).
    [pa.field("strength", pa.float32(), nullable=False)]
)

_CONTEXT_NAME = re.compile(rf"{CONTEXT_PREFIX}[a-z][a-z0-9_]*")
# Absolute, with a scheme or drive, with a backslash, with a `..` step, or empty.
_OUTSIDE = r"^/|^[A-Za-z][A-Za-z0-9+.-]*:|\\|(^|/)\.\.(/|$)|^$"
_ITEM_ROWS, _INTERACTION_ROWS = 1024, 131_072  # rows per Parquet row group: what a streaming reader holds


def read_items(folder: str | Path) -> pa.Table:
    """Read and check `items.parquet`; columns in the order of ITEMS, then `external_id` if it is there."""
    path = Path(folder) / "items.parquet"
    with _open(path) as file:
        return _check_items(file.read(_columns(path, file.schema_arrow, ITEMS)), path)


def read_interactions(folder: str | Path, items: pa.Table | None = None) -> pa.Table:
    """Read and check `interactions.parquet`; with `items`, every item_id must be one of theirs."""
    path = Path(folder) / "interactions.parquet"
    with _open(path) as file:
        table = file.read(_columns(path, file.schema_arrow, INTERACTIONS))
    return _check_interactions(table, path, items)


def stream_interactions(
    folder: str | Path, batch_rows: int, items: pa.Table | None = None
) -> Iterator[pa.RecordBatch]:
    """Like `read_interactions`, holding one batch of at most `batch_rows` rows at a time."""
    path = Path(folder) / "interactions.parquet"
    with _open(path) as file:
        columns = _columns(path, file.schema_arrow, INTERACTIONS)
        first_row = 0
        for batch in file.iter_batches(batch_rows, columns=columns):
            _check_interactions(pa.Table.from_batches([batch]), path, items, first_row)
            first_row += batch.num_rows
            yield batch


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read `dataset.json`."""
    path = Path(folder) / "dataset.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _missing(path) from error
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(record).__name__}")
    return record


def write_dataset(
    folder: str | Path, items: pa.Table, interactions: pa.Table, record: Mapping[str, Any]
) -> None:
    """Check everything, then write the data set. An older oracle in the folder is removed: it is stale."""
    folder = Path(folder)
    paths = folder / "items.parquet", folder / "interactions.parquet"
    items = _check_items(items.select(_columns(paths[0], items.schema, ITEMS)), paths[0])
    interactions = _check_interactions(
        interactions.select(_columns(paths[1], interactions.schema, INTERACTIONS)), paths[1], items
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "oracle.parquet").unlink(missing_ok=True)
    for path, table, rows in zip(paths, (items, interactions), (_ITEM_ROWS, _INTERACTION_ROWS), strict=True):
        part = path.with_suffix(".part")
        pq.write_table(table, part, compression="zstd", row_group_size=rows)
        part.replace(path)
    text = json.dumps(dict(record), indent=1, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")


def validate(folder: str | Path) -> dict[str, Any]:
    """Check a whole data set, media files included (that they are there, not that they decode).

    Returns a summary: rows, items by media type, users, label mean, time range, context cardinalities.
    """
    folder = Path(folder)
    record, items = read_record(folder), read_items(folder)
    for row, uri in enumerate(items["media_uri"].to_pylist()):
        if uri is not None and not (folder / uri).is_file():
            raise _error(folder / "items.parquet", "media_uri", row, "a file in the data set's folder", uri)
    interactions = read_interactions(folder, items)
    if (folder / "oracle.parquet").exists():
        _check_oracle(folder / "oracle.parquet", interactions.num_rows)
    times = pc.min_max(interactions["timestamp"]).as_py()
    kinds = items["media_type"]
    return {
        "name": record.get("name", folder.name),
        "items": items.num_rows,
        **{f"{kind}s": pc.sum(pc.equal(kinds, kind)).as_py() or 0 for kind in MEDIA_TYPES},
        "without_media": kinds.null_count,
        "with_text": items.num_rows - items["text"].null_count,
        "interactions": interactions.num_rows,
        "users": pc.count_distinct(interactions["user_id"]).as_py(),
        "label_mean": pc.mean(interactions["label"]).as_py(),
        "first": times["min"].isoformat() if times["min"] else None,
        "last": times["max"].isoformat() if times["max"] else None,
        "context": {
            name.removeprefix(CONTEXT_PREFIX): (pc.max(interactions[name]).as_py() or 0) + 1
            for name in context_columns(interactions)
        },
    }


def context_columns(interactions: pa.Table | pa.RecordBatch) -> list[str]:
    """Names of the context columns."""
    return [name for name in interactions.schema.names if name.startswith(CONTEXT_PREFIX)]


class MediaReader:
    """Media bytes by item id, wherever they are kept.

    >>> reader = MediaReader(folder, read_items(folder))    # doctest: +SKIP
    >>> reader[17]                                          # doctest: +SKIP
    b'...'
    """

    def __init__(self, folder: str | Path, items: pa.Table) -> None:
        self._folder = Path(folder).resolve()
        self._items = items
        self._row = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}

    def __getitem__(self, item_id: int) -> bytes | None:
        """Bytes of the item's image or video, None if it has none.

        Raises DataError if there is no such item, or its file is missing or outside the folder.
        """
        row = self._row.get(item_id)
        if row is None:
            raise DataError(f"item {item_id}: expected an item_id of {self._folder / 'items.parquet'}")
        media: bytes | None = self._items["media"][row].as_py()
        uri: str | None = self._items["media_uri"][row].as_py()
        if media is not None or uri is None:
            return media
        path = (self._folder / uri).resolve()  # follows links: the check on read sees only the path's text
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise _error(self._folder / "items.parquet", "media_uri", row, "a file in the folder", uri)
        return path.read_bytes()


def _check_items(items: pa.Table, path: Path) -> pa.Table:
    ids, media, uri, kind = (items[name] for name in ("item_id", "media", "media_uri", "media_type"))
    _require(pc.greater(ids, 0), path, "item_id", "an id above 0", ids)
    _require_unique(ids, path, "item_id")
    _require(pc.invert(_matches(uri, _OUTSIDE)), path, "media_uri", "a path inside the folder", uri)
    has_media = pc.or_(pc.is_valid(media), pc.is_valid(uri))
    both = pc.and_(pc.is_valid(media), pc.is_valid(uri))
    _require(pc.invert(both), path, "media_uri", "null where media is set (one of the two)", uri)
    known = pc.is_in(kind, value_set=pa.array([*MEDIA_TYPES, None], pa.string()))
    _require(known, path, "media_type", " or ".join(map(repr, MEDIA_TYPES)), kind)
    _require(
        pc.equal(pc.is_valid(kind), has_media),
        path,
        "media_type",
        "null exactly where there is no media",
        kind,
    )
    _require_past(items["created_at"], path, "created_at")
    if "external_id" in items.column_names:
        _require_unique(items["external_id"], path, "external_id")
    return items


def _check_interactions(
    interactions: pa.Table, path: Path, items: pa.Table | None, first_row: int = 0
) -> pa.Table:
    users, ids, label = (interactions[name] for name in ("user_id", "item_id", "label"))
    _require(pc.greater(users, 0), path, "user_id", "an id above 0", users, first_row)
    _require(pc.greater(ids, 0), path, "item_id", "an id above 0", ids, first_row)
    if items is not None:
        known = pc.is_in(ids, value_set=items["item_id"].combine_chunks())
        _require(known, path, "item_id", "an item_id of items.parquet", ids, first_row)
    _require_past(interactions["timestamp"], path, "timestamp", first_row)
    binary = pc.or_(pc.equal(label, 0.0), pc.equal(label, 1.0))  # false for NaN
    _require(binary, path, "label", "0 or 1", label, first_row)
    if "strength" in interactions.column_names:
        strength = interactions["strength"]
        inside = pc.and_(pc.greater_equal(strength, -1.0), pc.less_equal(strength, 1.0))  # false for NaN
        _require(inside, path, "strength", "a number from -1 to 1", strength, first_row)
    for name in context_columns(interactions):
        values = interactions[name]
        _require(pc.greater_equal(values, 0), path, name, "an index of at least 0", values, first_row)
    return interactions


def _check_oracle(path: Path, rows: int) -> None:
    with _open(path) as file:
        _columns(path, file.schema_arrow, oracle := pa.schema([("probability", pa.float64())]))
        probability = file.read(oracle.names)["probability"]
    if len(probability) != rows:
        raise DataError(f"{path}: expected one row per interaction ({rows}), got {len(probability)}")
    inside = pc.and_(pc.greater_equal(probability, 0.0), pc.less_equal(probability, 1.0))
    _require(inside, path, "probability", "a number from 0 to 1", probability)


def _columns(path: Path, found: pa.Schema, expected: pa.Schema) -> list[str]:
    """Check names and types; return the names in the schema's order, then optional and context columns."""
    fields = {field.name: field.type for field in expected}
    if expected is ITEMS:
        fields |= {field.name: field.type for field in ITEMS_OPTIONAL if field.name in found.names}
    if expected is INTERACTIONS:
        fields |= {field.name: field.type for field in INTERACTIONS_OPTIONAL if field.name in found.names}
        fields |= {name: pa.int32() for name in sorted(found.names) if _CONTEXT_NAME.fullmatch(name)}
    has = f"the columns are {', '.join(found.names) or 'none'}"
    for name, kind in fields.items():
        if found.names.count(name) != 1:
            raise DataError(f"{path}: column {name!r}: expected one column of type {kind}, {has}")
        if found.field(name).type != kind:
            raise DataError(f"{path}: column {name!r}: expected type {kind}, got {found.field(name).type}")
    for name in found.names:
        if name not in fields:
            allowed = ", ".join([*fields, *([f"{CONTEXT_PREFIX}<name>"] if expected is INTERACTIONS else [])])
            raise DataError(f"{path}: column {name!r}: expected only the columns {allowed}")
    return list(fields)


def _require(
    ok: pa.ChunkedArray,
    path: Path,
    column: str,
    expectation: str,
    values: pa.ChunkedArray,
    first_row: int = 0,
) -> None:
    """Raise DataError for the first row that is not true; null (from a null input) is not true."""
    row = pc.index(pc.fill_null(ok, False), pa.scalar(False)).as_py()
    if row >= 0:
        raise _error(path, column, first_row + row, expectation, values[row].as_py())


def _require_past(values: pa.ChunkedArray, path: Path, column: str, first_row: int = 0) -> None:
    now = pa.scalar(datetime.now(UTC), TIMESTAMP)
    _require(pc.less_equal(values, now), path, column, "a time that is not in the future", values, first_row)


def _require_unique(values: pa.ChunkedArray, path: Path, column: str) -> None:
    _require(pc.is_valid(values), path, column, "a value", values)
    if pc.count_distinct(values).as_py() == len(values):
        return
    first: dict[Any, int] = {}
    for row, value in enumerate(values.to_pylist()):
        if value in first:
            raise _error(path, column, row, f"a value used once (row {first[value]} has it too)", value)
        first[value] = row


def _matches(values: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    return pc.fill_null(pc.match_substring_regex(values, pattern), False)


def _error(path: Path, column: str, row: int, expectation: str, got: object) -> DataError:
    shown = got.isoformat() if isinstance(got, datetime) else "null" if got is None else repr(got)
    return DataError(f"{path}: column {column!r}, row {row}: expected {expectation}, got {shown}")


def _missing(path: Path) -> DataError:
    return DataError(
        f"{path}: expected a file of a data set, there is none; "
        "make one with `sightline data generate` or `sightline data import`"
    )


def open_parquet(path: Path, what: str) -> pq.ParquetFile:
    """Raises DataError where there is no Parquet file; `what` it should have been, and how it is made."""
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: expected {what}: {error}") from error


def _open(path: Path) -> pq.ParquetFile:
    if not path.exists():
        raise _missing(path)
    return open_parquet(path, "a Parquet file")
