"""Foreign data → a data-set folder: MovieLens, emoji, and tables of any origin.

Media are decoded once and copied to `media/` in the data set. A file that cannot be used leaves its item
without media and its reason in `dataset.json` under `rejected_media`; every other fault stops the import
with a DataError that names file, line and column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from catalogue.movies import movie_caption, movie_slots, release_year
from catalogue.source import Source, columns_of
from sightline.errors import DataError, MediaError
from sightline.media import MediaSpec, decode, sniff
from sightline.schema import CONTEXT_PREFIX, INTERACTIONS, INTERACTIONS_OPTIONAL, TIMESTAMP, write_dataset

__all__ = ["import_emoji", "import_movielens", "import_table", "movie_caption", "movie_slots"]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BINARY = pa.array([0.0, 1.0], pa.float32())


def import_movielens(folder: Path, out: Path, *, positive_rating: float = 4.0) -> dict[str, Any]:
    """A MovieLens folder: ratings.csv, movies.csv and, where there are any, posters/<movieId>.jpg.

    Every movie stays an item, rated or not, with or without poster. The label of a rating is 1 from
    `positive_rating` on: ratings are not logged impressions. An item is created on 1 January of its release
    year; without a year, at its first rating.

    Returns the record written to dataset.json.
    """
    movies = Source(folder / "movies.csv", ["movieId", "title", "genres"])
    movies.require_unique("movieId")
    ids = movies.convert("movieId", pa.int64())
    genres = [[] if not g or g.startswith("(") else g.split("|") for g in movies.strings("genres")]
    years = [release_year(title or "") for title in movies.strings("title")]

    path = folder / "ratings.csv"
    # The header differs between releases.
    names = {"userId": "user_id", "movieId": "movie_id"} if "movie_id" in columns_of(path) else {}
    ratings = Source(path, ["userId", "movieId", "rating", "timestamp"], names=names)
    rated = ratings.convert("movieId", pa.int64())
    ratings.require(pc.is_in(rated, value_set=ids.combine_chunks()), "movieId", "a movieId of movies.csv")
    rating = ratings.convert("rating", pa.float64())
    on_scale = pc.and_(pc.greater_equal(rating, 0.5), pc.less_equal(rating, 5.0))  # false for NaN
    ratings.require(on_scale, "rating", "a number from 0.5 to 5")
    interactions = pa.table(
        {
            "user_id": ratings.convert("userId", pa.int64()),
            "item_id": rated,
            "timestamp": ratings.times("timestamp"),
            "label": pc.greater_equal(rating, positive_rating).cast(pa.float32()),
            # Half a star is −1, five are 1.
            "strength": pc.divide(pc.subtract(rating, 2.75), 2.25).cast(pa.float32()),
        }
    )
    interactions = _in_time_order(interactions)
    posters = [folder / "posters" / f"{movie}.jpg" for movie in ids.to_pylist()]
    media, rejected = _copy_media(ids.to_pylist(), _existing(posters), out)
    items = pa.table(
        {
            "item_id": ids,
            **media,
            "created_at": _created_at(
                ids, [datetime(year, 1, 1, tzinfo=UTC) if year else None for year in years], interactions
            ),
            "text": pa.array(map(movie_caption, genres, years), pa.string()),
        }
    )
    record = {
        "name": "movielens",
        "grammar": "movie",
        "label": f"rating >= {positive_rating:g}; ratings among rated items, not logged impressions",
        "positive_rating": positive_rating,
        "rejected_media": rejected,
    }
    write_dataset(out, items, interactions, record)
    return record


def import_emoji(
    folder: Path, out: Path, *, style: Literal["openmoji", "twemoji"] = "openmoji"
) -> dict[str, Any]:
    """An emoji folder: emoji.csv (hexcode, annotation, …) and <style>/<hexcode>.png; no interactions.

    Item ids are the rows of emoji.csv from 1, the same for both styles, and `external_id` is the hexcode; an
    emoji that a style lacks stays in without media. Emoji carry no date: they are created at the epoch.

    Returns the record written to dataset.json.
    """
    if not (folder / style).is_dir():
        raise DataError(f"{folder / style}: expected a folder of <hexcode>.png, there is none")
    emoji = Source(folder / "emoji.csv", ["hexcode", "annotation"])
    emoji.require_unique("hexcode")
    codes = emoji.strings("hexcode")
    ids = range(1, emoji.rows + 1)
    media, rejected = _copy_media(ids, _existing(folder / style / f"{code}.png" for code in codes), out)
    items = pa.table(
        {
            "item_id": pa.array(ids, pa.int64()),
            **media,
            "created_at": pa.array([EPOCH] * emoji.rows, TIMESTAMP),
            "text": pa.array(emoji.strings("annotation"), pa.string()),
            "external_id": pa.array(codes, pa.string()),
        }
    )
    record = {"name": "emoji", "style": style, "rejected_media": rejected}
    write_dataset(out, items, INTERACTIONS.empty_table(), record)
    return record


def import_table(
    items_file: Path,
    out: Path,
    *,
    media_folder: Path | None = None,
    interactions_file: Path | None = None,
    item_columns: Mapping[str, str] = {},
    interaction_columns: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Tables of any origin, CSV or Parquet by their suffix.

    items: `item_id`; optional `media` (a path inside `media_folder`, by default the file's own folder),
    `created_at`, `text`. interactions: `user_id`, `item_id`, `timestamp`, `label` (0 or 1), optional `strength`
    (−1 … 1), and any `context_<name>` (0, 1, …). The mappings give the files' own names where they differ, e.g.
    `{"item_id": "sku"}` and `{"context_slot": "position"}`.

    Times are ISO 8601 (UTC where no zone is given) or Unix seconds; an item without `created_at` is created
    at its first interaction. Ids that are not all positive integers are numbered from 1; the source's own
    stay in `external_id` of items.parquet and in users.parquet.

    Returns the record written to dataset.json.
    """
    items = Source(items_file, ["item_id"], ["media", "created_at", "text"], item_columns)
    items.require_unique("item_id")
    ids, external = items.ids("item_id")
    interactions, users = INTERACTIONS.empty_table(), None
    if interactions_file is not None:
        numbers = dict(zip(items.strings("item_id"), ids.to_pylist(), strict=True))
        interactions, users = _read_log(interactions_file, interaction_columns, numbers)

    nothing = [None] * items.rows
    created = items.times("created_at", gaps=True).to_pylist() if "created_at" in items else nothing
    texts = items.strings("text") if "text" in items else nothing
    files = _media_files(items, media_folder or items_file.parent) if "media" in items else nothing
    media, rejected = _copy_media(ids.to_pylist(), files, out)
    table = pa.table(
        {
            "item_id": ids,
            **media,
            "created_at": _created_at(ids, created, interactions),
            "text": pa.array([text or None for text in texts], pa.string()),
            **({"external_id": pa.array(external, pa.string())} if external is not None else {}),
        }
    )
    record = {"name": items_file.stem, "rejected_media": rejected}
    write_dataset(out, table, interactions, record)
    if users is not None:
        pq.write_table(
            pa.table({"user_id": pa.array(users.values(), pa.int64()), "external_id": list(users)}),
            out / "users.parquet",
        )
    return record


def _read_log(
    path: Path, names: Mapping[str, str], numbers: Mapping[str | None, int]
) -> tuple[pa.Table, dict[str, int] | None]:
    """Interactions with our item ids; the users' numbers by their own ids, None where they are the same."""
    context = sorted({name for name in (*columns_of(path), *names) if name.startswith(CONTEXT_PREFIX)})
    log = Source(path, INTERACTIONS.names, [*INTERACTIONS_OPTIONAL.names, *context], names)
    item_ids = pa.chunked_array([[numbers.get(own) for own in log.strings("item_id")]], pa.int64())
    log.require(pc.is_valid(item_ids), "item_id", "an item of the items file")
    label = log.convert("label", pa.float32())
    log.require(pc.is_in(label, value_set=_BINARY), "label", "0 or 1")
    user_ids, users = log.ids("user_id")
    columns = {"user_id": user_ids, "item_id": item_ids, "timestamp": log.times("timestamp"), "label": label}
    if "strength" in log:
        strength = columns["strength"] = log.convert("strength", pa.float32())
        inside = pc.and_(pc.greater_equal(strength, -1.0), pc.less_equal(strength, 1.0))  # false for NaN
        log.require(inside, "strength", "a number from -1 to 1")
    for name in context:
        columns[name] = log.convert(name, pa.int32())
        log.require(pc.greater_equal(columns[name], 0), name, "an index of at least 0")
    return _in_time_order(pa.table(columns)), users


def _in_time_order(interactions: pa.Table) -> pa.Table:
    """Sorted by time, with the hour of the day (UTC) as context where the log brought none of its own."""
    ordered = interactions.sort_by("timestamp")
    if not any(name.startswith(CONTEXT_PREFIX) for name in ordered.column_names):
        ordered = ordered.append_column(CONTEXT_PREFIX + "hour", pc.hour(ordered["timestamp"]).cast(pa.int32()))
    return ordered


def _media_files(items: Source, root: Path) -> list[Path | None]:
    """Paths of the `media` column, None where it is empty."""
    files: list[Path | None] = []
    top = root.resolve()
    for row, name in enumerate(items.strings("media")):
        path = (top / name).resolve() if name else None
        if path is not None and not (path.is_relative_to(top) and path.is_file()):
            raise items.fault("media", row, f"a file inside {root}")
        files.append(path)
    return files


def _existing(paths: Iterable[Path]) -> list[Path | None]:
    return [path if path.exists() else None for path in paths]


def _copy_media(
    ids: Sequence[int], files: Sequence[Path | None], out: Path
) -> tuple[dict[str, pa.Array], list[dict[str, Any]]]:
    """Copy what decodes to `out`/media; the three media columns, and item, file and reason of the rest."""
    folder = out / "media"
    folder.mkdir(parents=True, exist_ok=True)
    spec = MediaSpec()
    uris: list[str | None] = []
    kinds: list[str | None] = []
    rejected: list[dict[str, Any]] = []
    for item, file in zip(ids, tqdm(files, desc="media", unit="item", mininterval=1), strict=True):
        uri, kind = None, None
        if file is not None:
            data = file.read_bytes()
            try:
                decode(data, spec)
                uri, kind = f"media/{item}{file.suffix.lower()}", sniff(data)
            except MediaError as error:
                rejected.append({"item_id": item, "file": file.name, "reason": error.reason})
            else:
                (out / uri).write_bytes(data)
        uris.append(uri)
        kinds.append(kind)
    columns = {
        "media": pa.nulls(len(uris), pa.binary()),
        "media_uri": pa.array(uris, pa.string()),
        "media_type": pa.array(kinds, pa.string()),
    }
    return columns, rejected


def _created_at(ids: pa.ChunkedArray, known: Sequence[datetime | None], log: pa.Table) -> pa.Array:
    """Known times; else the item's first interaction; else the first of the log; else the epoch."""
    first = log.group_by("item_id").aggregate([("timestamp", "min")])
    seen = dict(zip(first["item_id"].to_pylist(), first["timestamp_min"].to_pylist(), strict=True))
    start = min(seen.values(), default=EPOCH)
    times = [time or seen.get(item, start) for item, time in zip(ids.to_pylist(), known, strict=True)]
    return pa.array(times, TIMESTAMP)
