"""The data set's checks: every rule broken once, every error names file, column, row, expectation, value."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sightline import schema
from sightline.errors import DataError
from sightline.schema import (
    INTERACTIONS,
    ITEMS,
    MediaReader,
    read_interactions,
    read_items,
    read_record,
    stream_interactions,
    validate,
    write_dataset,
)

WHEN = datetime(2024, 5, 1, tzinfo=UTC)
FUTURE = datetime(2999, 1, 1, tzinfo=UTC)
CONTEXT = INTERACTIONS.append(pa.field("strength", pa.float32())).append(pa.field("context_position", pa.int32()))


def items(**columns: list[Any]) -> pa.Table:
    """Three items: an image inside, a video beside, one without media."""
    values = {
        "item_id": [1, 2, 3],
        "media": [b"png", None, None],
        "media_uri": [None, "videos/two.mp4", None],
        "media_type": ["image", "video", None],
        "created_at": [WHEN] * 3,
        "text": ["one", None, "three"],
    }
    return pa.table(values | columns, ITEMS)


def interactions(**columns: list[Any]) -> pa.Table:
    values = {
        "user_id": [10, 10, 11, 12],
        "item_id": [1, 2, 3, 1],
        "timestamp": [WHEN + timedelta(days=day) for day in range(4)],
        "label": [0.0, 1.0, 0.0, 1.0],
        "strength": [-1.0, 0.5, 0.0, 1.0],
        "context_position": [0, 1, 2, 0],
    }
    return pa.table(values | columns, CONTEXT)


def store(folder: Path, items: pa.Table, interactions: pa.Table) -> Path:
    """Write without checks, as a foreign tool would."""
    for name, table in (("items", items), ("interactions", interactions)):
        nullable = pa.schema([pa.field(field.name, field.type) for field in table.schema])
        pq.write_table(table.cast(nullable), folder / f"{name}.parquet")
    (folder / "dataset.json").write_text('{"name": "three"}')
    (folder / "videos").mkdir()
    (folder / "videos" / "two.mp4").write_bytes(b"mp4")
    return folder


def test_written_is_read(tmp_path: Path) -> None:
    write_dataset(tmp_path, items(), interactions(), {"name": "three", "seed": 1})
    assert read_items(tmp_path).equals(items())
    assert read_interactions(tmp_path, read_items(tmp_path)).equals(interactions())
    assert read_record(tmp_path) == {"name": "three", "seed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "interactions.parquet",
        "items.parquet",
    ]


def test_columns_may_come_in_any_order(tmp_path: Path) -> None:
    shuffled = items().select(ITEMS.names[::-1])
    write_dataset(tmp_path, shuffled, interactions().select(CONTEXT.names[::-1]), {})
    assert read_items(tmp_path).column_names == ITEMS.names
    assert read_interactions(tmp_path).column_names == CONTEXT.names


def test_writing_again_drops_a_stale_oracle(tmp_path: Path) -> None:
    (tmp_path / "oracle.parquet").write_bytes(b"old")
    write_dataset(tmp_path, items(), interactions(), {})
    assert not (tmp_path / "oracle.parquet").exists()


def test_media_reader(tmp_path: Path) -> None:
    store(tmp_path, items(), interactions())
    reader = MediaReader(tmp_path, read_items(tmp_path))
    assert [reader[item] for item in (1, 2, 3)] == [b"png", b"mp4", None]
    with pytest.raises(DataError, match="item 9: expected an item_id of"):
        reader[9]


def test_media_reader_does_not_follow_links_out(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    folder = tmp_path / "data"
    folder.mkdir()
    store(folder, items(), interactions())
    (folder / "videos" / "two.mp4").unlink()
    (folder / "videos" / "two.mp4").symlink_to(outside)
    with pytest.raises(DataError, match="'media_uri', row 1: expected a file in the folder"):
        MediaReader(folder, read_items(folder))[2]


def test_missing_media_file(tmp_path: Path) -> None:
    store(tmp_path, items(media_uri=[None, "videos/gone.mp4", None]), interactions())
    with pytest.raises(DataError, match=r"'media_uri', row 1: expected a file in .*, got 'videos/gone\.mp4'"):
        validate(tmp_path)
    with pytest.raises(DataError, match=r"'media_uri', row 1"):
        MediaReader(tmp_path, read_items(tmp_path))[2]


BROKEN_ITEMS: list[tuple[dict[str, list[Any]], str]] = [
    ({"item_id": [1, 0, 3]}, "column 'item_id', row 1: expected an id above 0, got 0"),
    (
        {"item_id": [1, 2, 1]},
        "column 'item_id', row 2: expected a value used once (row 0 has it too), got 1",
    ),
    (
        {"media_uri": ["a.png", "videos/two.mp4", None]},
        "column 'media_uri', row 0: expected null where media is set (one of the two), got 'a.png'",
    ),
    (
        {"media_type": ["image", "audio", None]},
        "column 'media_type', row 1: expected 'image' or 'video', got 'audio'",
    ),
    (
        {"media_type": [None, "video", None]},
        "column 'media_type', row 0: expected null exactly where there is no media, got null",
    ),
    (
        {"media_type": ["image", "video", "image"]},
        "column 'media_type', row 2: expected null exactly where there is no media, got 'image'",
    ),
    (
        {"created_at": [WHEN, WHEN, FUTURE]},
        "column 'created_at', row 2: expected a time that is not in the future, "
        "got 2999-01-01T00:00:00+00:00",
    ),
    *(
        (
            {"media_uri": [None, uri, None]},
            f"column 'media_uri', row 1: expected a path inside the folder, got {uri!r}",
        )
        for uri in (
            "../two.mp4",
            "videos/../../two.mp4",
            "/etc/passwd",
            "file:///etc/passwd",
            "C:two",
            "a\\b",
            "",
        )
    ),
]


@pytest.mark.parametrize(("columns", "message"), BROKEN_ITEMS)
def test_broken_items(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    store(tmp_path, items(**columns), interactions())
    with pytest.raises(DataError) as caught:
        read_items(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'items.parquet'}: {message}"
    with pytest.raises(DataError, match="items"):
        write_dataset(tmp_path / "copy", items(**columns), interactions(), {})
    assert not (tmp_path / "copy").exists()


BROKEN_INTERACTIONS: list[tuple[dict[str, list[Any]], str]] = [
    ({"user_id": [10, -1, 11, 12]}, "column 'user_id', row 1: expected an id above 0, got -1"),
    ({"item_id": [1, 2, 3, 4]}, "column 'item_id', row 3: expected an item_id of items.parquet, got 4"),
    (
        {"timestamp": [WHEN, FUTURE, WHEN, WHEN]},
        "column 'timestamp', row 1: expected a time that is not in the future, got 2999-01-01T00:00:00+00:00",
    ),
    ({"label": [0.0, 1.0, float("nan"), 1.0]}, "column 'label', row 2: expected 0 or 1, got nan"),
    ({"label": [0.0, 1.0, 0.5, 1.0]}, "column 'label', row 2: expected 0 or 1, got 0.5"),
    ({"strength": [0.0, -1.0, 1.5, 1.0]}, "column 'strength', row 2: expected a number from -1 to 1, got 1.5"),
    ({"strength": [0.0, float("nan"), 0.0, 1.0]}, "column 'strength', row 1: expected a number from -1 to 1, got nan"),
    (
        {"context_position": [0, 1, -2, 0]},
        "column 'context_position', row 2: expected an index of at least 0, got -2",
    ),
]


@pytest.mark.parametrize(("columns", "message"), BROKEN_INTERACTIONS)
def test_broken_interactions(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    store(tmp_path, items(), interactions(**columns))
    expected = f"{tmp_path / 'interactions.parquet'}: {message}"
    with pytest.raises(DataError) as caught:
        read_interactions(tmp_path, items())
    assert str(caught.value) == expected
    with pytest.raises(DataError) as caught:  # the row is counted over the file, not within the batch
        list(stream_interactions(tmp_path, 1, items()))
    assert str(caught.value) == expected


@pytest.mark.parametrize("column", INTERACTIONS.names)
def test_null_in_interactions(tmp_path: Path, column: str) -> None:
    broken = interactions(**{column: [*interactions()[column].to_pylist()[:3], None]})
    store(tmp_path, items(), broken)
    with pytest.raises(DataError, match=f"column '{column}', row 3: expected .*, got null"):
        read_interactions(tmp_path)


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("label"), "column 'label': expected one column of type float"),
        (
            lambda t: t.append_column("rating", t["label"]),
            "column 'rating': expected only the columns user_id",
        ),
        (
            lambda t: t.append_column("context_Position!", t["context_position"]),
            "column 'context_Position!': expected only",
        ),
        (cast("label", pa.float64()), "column 'label': expected type float, got double"),
        (cast("user_id", pa.int32()), "column 'user_id': expected type int64, got int32"),
        (cast("context_position", pa.int64()), "column 'context_position': expected type int32, got int64"),
        (
            cast("timestamp", pa.timestamp("us")),
            r"column 'timestamp': expected type timestamp\[us, tz=UTC\], got timestamp\[us\]",
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    store(tmp_path, items(), change(interactions()))
    for read in (read_interactions, lambda folder: list(stream_interactions(folder, 2))):
        with pytest.raises(DataError, match=rf"interactions\.parquet: {message}"):
            read(tmp_path)


def test_external_ids_are_unique(tmp_path: Path) -> None:
    named = items().append_column("external_id", pa.array(["a", "b", "a"]))
    with pytest.raises(DataError, match="'external_id', row 2: expected a value used once"):
        write_dataset(tmp_path, named, interactions(), {})


@pytest.mark.parametrize("name", ["items.parquet", "interactions.parquet", "dataset.json"])
def test_missing_and_damaged_files(tmp_path: Path, name: str) -> None:
    store(tmp_path, items(), interactions())
    (tmp_path / name).write_bytes(b"not it")
    with pytest.raises(DataError, match=f"{name}: expected a (Parquet file|JSON object)"):
        validate(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: expected a file of a data set.*sightline data"):
        validate(tmp_path)


def test_stream_equals_read(tmp_path: Path) -> None:
    store(tmp_path, items(), interactions())
    batches = list(stream_interactions(tmp_path, 3))
    assert [batch.num_rows for batch in batches] == [3, 1]
    assert pa.Table.from_batches(batches).equals(read_interactions(tmp_path))


def test_summary(tmp_path: Path) -> None:
    store(tmp_path, items(), interactions())
    pq.write_table(pa.table({"probability": [0.1, 0.9, 0.0, 1.0]}), tmp_path / "oracle.parquet")
    assert validate(tmp_path) == {
        "name": "three",
        "items": 3,
        "images": 1,
        "videos": 1,
        "without_media": 1,
        "with_text": 2,
        "interactions": 4,
        "users": 3,
        "label_mean": 0.5,
        "first": "2024-05-01T00:00:00+00:00",
        "last": "2024-05-04T00:00:00+00:00",
        "context": {"position": 3},
    }


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        ([0.5] * 3, r"expected one row per interaction \(4\), got 3"),
        ([0.5, 0.5, 1.5, 0.5], "'probability', row 2: expected a number from 0 to 1, got 1.5"),
    ],
)
def test_broken_oracle(tmp_path: Path, oracle: list[float], message: str) -> None:
    store(tmp_path, items(), interactions())
    pq.write_table(pa.table({"probability": oracle}), tmp_path / "oracle.parquet")
    with pytest.raises(DataError, match=message):
        validate(tmp_path)


def test_data_set_without_interactions(tmp_path: Path) -> None:
    write_dataset(tmp_path, items(media_uri=[None] * 3, media_type=["image", None, None]),
                  INTERACTIONS.empty_table(), {})  # fmt: skip
    summary = validate(tmp_path)
    assert (summary["interactions"], summary["users"], summary["first"]) == (0, 0, None)


def test_a_million_interactions_are_checked_in_seconds(tmp_path: Path) -> None:
    """Vectorised checks: about 0.2 s on an idle core. The bound is wide because it guards against a loop
    over rows (tens of seconds), not against a busy machine."""
    rows, rng = 1_000_000, np.random.default_rng(0)
    count = 20_000
    catalogue = pa.table(
        {
            "item_id": np.arange(1, count + 1),
            "media": pa.nulls(count, pa.binary()),
            "media_uri": pa.nulls(count, pa.string()),
            "media_type": pa.nulls(count, pa.string()),
            "created_at": pa.array([WHEN] * count, schema.TIMESTAMP),
            "text": pa.nulls(count, pa.string()),
        }
    )
    log = pa.table(
        {
            "user_id": rng.integers(1, 10_000, rows),
            "item_id": rng.integers(1, count + 1, rows),
            "timestamp": pa.array(rng.integers(0, 10**15, rows), schema.TIMESTAMP),
            "label": rng.integers(0, 2, rows).astype(np.float32),
            "context_position": rng.integers(0, 10, rows).astype(np.int32),
        }
    )
    write_dataset(tmp_path, catalogue, log, {"name": "large"})
    start = time.perf_counter()
    assert validate(tmp_path)["interactions"] == rows
    assert time.perf_counter() - start < 5
