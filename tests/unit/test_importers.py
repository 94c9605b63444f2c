"""Importers on small folders in the real layouts, and every fault with its file, line and column."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from catalogue.importers import import_emoji, import_movielens, import_table, movie_caption, movie_slots
from catalogue.movies import release_year
from sightline.cli import app
from sightline.errors import ConfigError, DataError
from sightline.schema import MediaReader, read_interactions, read_items, read_record, validate


def image(colour: str = "red", format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 18), colour).save(buffer, format)
    return buffer.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


MOVIES = """movieId,title,genres
1,Toy Story (1995),Adventure|Animation
5,"American President, The (1995)",Comedy
7,Fawlty Towers (1975-1979),Comedy
9,Hyena Road,(no genres listed)
11,"Never, Rated",Drama|Sci-Fi
"""
RATINGS = """{user},{movie},rating,timestamp
1,1,2.5,1000000300
1,9,4.0,1000000200
2,5,3.5,1000000000
2,9,5.0,1000000100
"""


def movielens(folder: Path, user: str = "userId", movie: str = "movieId") -> Path:
    write(folder / "movies.csv", MOVIES)
    write(folder / "ratings.csv", RATINGS.format(user=user, movie=movie))
    write(folder / "posters" / "1.jpg", image())
    write(folder / "posters" / "9.jpg", b"<html>404</html>")
    return folder


@pytest.mark.parametrize(("user", "movie"), [("userId", "movieId"), ("user_id", "movie_id")])
def test_movielens(tmp_path: Path, user: str, movie: str) -> None:
    out = tmp_path / "out"
    record = import_movielens(movielens(tmp_path / "ml", user, movie), out)
    items, log = read_items(out), read_interactions(out)
    assert items["item_id"].to_pylist() == [1, 5, 7, 9, 11]
    assert items["text"].to_pylist() == [
        "an adventure and animation film from the 1990s",
        "a comedy film from the 1990s",
        "a comedy film from the 1970s",
        None,
        "a drama and sci-fi film",
    ]
    first = datetime.fromtimestamp(1000000100, UTC)  # of movie 9; movie 11 has no rating: first of the log
    assert items["created_at"].to_pylist() == [
        datetime(1995, 1, 1, tzinfo=UTC),
        datetime(1995, 1, 1, tzinfo=UTC),
        datetime(1975, 1, 1, tzinfo=UTC),
        first,
        datetime.fromtimestamp(1000000000, UTC),
    ]
    times = log["timestamp"].to_pylist()
    assert times == sorted(times)  # the files are sorted by user
    assert log["context_hour"].to_pylist() == [time.hour for time in times]
    assert log["label"].to_pylist() == [0, 1, 1, 0]
    assert log["strength"].to_pylist() == pytest.approx([1 / 3, 1, 5 / 9, -1 / 9])  # of 3.5, 5, 4 and 2.5 stars
    reader = MediaReader(out, items)
    assert reader[1] == image()
    assert reader[5] is None
    assert record["rejected_media"] == [
        {"item_id": 9, "file": "9.jpg", "reason": record["rejected_media"][0]["reason"]}
    ]
    assert record["rejected_media"][0]["reason"].startswith("neither image nor video")
    assert read_record(out) == record
    assert validate(out)["images"] == 1


def test_movielens_positive_rating(tmp_path: Path) -> None:
    import_movielens(movielens(tmp_path / "ml"), tmp_path / "out", positive_rating=3.5)
    assert read_interactions(tmp_path / "out")["label"].to_pylist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "ratings.csv",
            "2,5,3.5",
            "2,6,3.5",
            "line 4, column 'movieId': expected a movieId of movies.csv, got '6'",
        ),
        (
            "ratings.csv",
            "1,9,4.0",
            "1,9,good",
            "line 3, column 'rating': expected a value of type double, got 'good'",
        ),
        ("ratings.csv", "1,9,4.0", "1,9,nan", "line 3, column 'rating': expected a number from 0.5 to 5, got 'nan'"),
        (
            "ratings.csv",
            "2,5,3.5",
            ",5,3.5",
            "line 4, column 'userId': expected a value of type int64, got nothing",
        ),
        (
            "ratings.csv",
            "1000000000",
            "99999999999",
            "line 4, column 'timestamp': expected a time that is not in",
        ),
        (
            "ratings.csv",
            "1000000000",
            "noon",
            "line 4, column 'timestamp': expected an ISO 8601 time or Unix",
        ),
        (
            "ratings.csv",
            ",rating,",
            ",stars,",
            "expected a column 'rating' for rating, the columns are userId",
        ),
        ("ratings.csv", "2,5,3.5,1000000000", "2,5,3.5", "Row #4: Expected 4 columns, got 3"),
        (
            "movies.csv",
            "5,",
            "1,",
            "line 3, column 'movieId': expected a value used once (line 2 has it too)",
        ),
        ("movies.csv", "5,", "five,", "line 3, column 'movieId': expected a value of type int64, got 'five'"),
    ],
)
def test_movielens_faults(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    folder = movielens(tmp_path / "ml")
    text = (folder / name).read_text()
    assert old in text
    write(folder / name, text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        import_movielens(folder, tmp_path / "out")
    assert str(caught.value).startswith(str(folder / name))
    assert message in str(caught.value)


def test_movielens_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"movies\.csv: expected a file, there is none"):
        import_movielens(tmp_path, tmp_path / "out")


# --- movie captions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genres", "year", "caption"),
    [
        (["Thriller", "Action"], 1995, "an action and thriller film from the 1990s"),
        (["Drama"], 2000, "a drama film from the 2000s"),
        (["IMAX", "Sci-Fi", "Action"], 2019, "an action, imax and sci-fi film from the 2010s"),
        ([], 1931, "a film from the 1930s"),
        (["Western"], None, "a western film"),
        ([], None, None),
    ],
)
def test_movie_caption_and_its_inverse(genres: list[str], year: int | None, caption: str | None) -> None:
    assert movie_caption(genres, year) == caption
    if caption is not None:
        expected = {("genre", name.lower()) for name in genres}
        expected |= {("decade", f"{year // 10 * 10}s")} if year else set()
        assert movie_slots(caption) == expected


@pytest.mark.parametrize(
    "caption", ["", "a red mug", "film", "an action film from the", "a film from the 90s"]
)
def test_captions_outside_the_grammar_have_no_slots(caption: str) -> None:
    assert movie_slots(caption) == set()


@pytest.mark.parametrize(
    ("title", "year"),
    [
        ("A (1995)", 1995),
        ("B (2007-)", 2007),
        ("C (1975-1979)", 1975),
        ("D (1995) again", None),
        ("2001", None),
    ],
)
def test_release_year(title: str, year: int | None) -> None:
    assert release_year(title) == year


# --- emoji ----------------------------------------------------------------------------------------

EMOJI = """hexcode,group,subgroup,annotation,tags,skintone,in_twemoji
1F600,smileys,face,grinning face,"face, grin",,1
2BEB,extras,symbol,star with right half black,half star,,0
"""


def emoji(folder: Path) -> Path:
    write(folder / "emoji.csv", EMOJI)
    for code in ("1F600", "2BEB"):
        write(folder / "openmoji" / f"{code}.png", image("yellow", "PNG"))
    write(folder / "twemoji" / "1F600.png", image("blue", "PNG"))
    return folder


def test_emoji_in_both_styles(tmp_path: Path) -> None:
    source = emoji(tmp_path / "emoji")
    import_emoji(source, tmp_path / "open")
    import_emoji(source, tmp_path / "twe", style="twemoji")
    one, other = read_items(tmp_path / "open"), read_items(tmp_path / "twe")
    assert one["item_id"].to_pylist() == other["item_id"].to_pylist() == [1, 2]
    assert one["external_id"].to_pylist() == ["1F600", "2BEB"]
    assert one["text"].to_pylist() == ["grinning face", "star with right half black"]
    assert one["media_type"].to_pylist() == ["image", "image"]
    assert other["media_type"].to_pylist() == ["image", None]
    assert MediaReader(tmp_path / "twe", other)[1] == image("blue", "PNG")
    assert validate(tmp_path / "open")["interactions"] == 0


def test_emoji_without_the_style(tmp_path: Path) -> None:
    write(tmp_path / "emoji.csv", EMOJI)
    with pytest.raises(DataError, match=r"twemoji: expected a folder of <hexcode>\.png"):
        import_emoji(tmp_path, tmp_path / "out", style="twemoji")


# --- tables ---------------------------------------------------------------------------------------

SHOP = {"item_id": "sku", "media": "photo", "text": "title"}
CLICKS = {
    "user_id": "who",
    "item_id": "product",
    "timestamp": "at",
    "label": "clicked",
    "context_slot": "slot",
}


def shop(folder: Path) -> tuple[Path, Path]:
    items = """sku,photo,title,created_at,price
A-1,img/a.png,"a red
thing",2024-01-01,3.0
B-2,,,2024-01-02T12:00:00+02:00,4.0
C-3,img/c.png,third,,5.0
"""
    log = """who,product,at,clicked,slot
ann,C-3,2024-02-01T00:00:00Z,1,0
bob,A-1,1706832000,0,2
ann,A-1,2024-02-03 10:00,1,1
"""
    write(folder / "img" / "a.png", image("red", "PNG"))
    write(folder / "img" / "c.png", image("green", "PNG"))
    return write(folder / "items.csv", items), write(folder / "log.csv", log)


def imported(folder: Path, **changes: Any) -> Path:
    items, log = shop(folder)
    options = {"interactions_file": log, "item_columns": SHOP, "interaction_columns": CLICKS}
    import_table(items, folder / "out", **(options | changes))
    return folder / "out"


def test_table_with_foreign_ids_and_names(tmp_path: Path) -> None:
    out = imported(tmp_path)
    items, log = read_items(out), read_interactions(out)
    assert items["item_id"].to_pylist() == [1, 2, 3]
    assert items["external_id"].to_pylist() == ["A-1", "B-2", "C-3"]
    assert items["text"].to_pylist() == ["a red\nthing", None, "third"]
    assert items["media_type"].to_pylist() == ["image", None, "image"]
    assert items["created_at"].to_pylist() == [
        datetime(2024, 1, 1, tzinfo=UTC),
        datetime(2024, 1, 2, 10, tzinfo=UTC),
        datetime(2024, 2, 1, tzinfo=UTC),  # no created_at: its first interaction
    ]
    assert log.to_pydict() == {
        "user_id": [1, 2, 1],
        "item_id": [3, 1, 1],
        "timestamp": [
            datetime(2024, 2, 1, tzinfo=UTC),
            datetime(2024, 2, 2, tzinfo=UTC),
            datetime(2024, 2, 3, 10, tzinfo=UTC),
        ],
        "label": [1, 0, 1],
        "context_slot": [0, 2, 1],
    }
    assert pq.read_table(out / "users.parquet").to_pydict() == {
        "user_id": [1, 2],
        "external_id": ["ann", "bob"],
    }
    assert MediaReader(out, items)[3] == image("green", "PNG")


def test_parquet_with_our_names_and_numeric_ids(tmp_path: Path) -> None:
    shop(tmp_path)
    when = pa.array([1706832000], pa.timestamp("s"))
    pq.write_table(pa.table({"item_id": [70, 90], "media": ["a.png", None]}), tmp_path / "items.parquet")
    pq.write_table(
        pa.table({"user_id": [5], "item_id": [90], "timestamp": when, "label": [True], "strength": [0.25]}),
        tmp_path / "log.parquet",
    )
    out = tmp_path / "out"
    import_table(
        tmp_path / "items.parquet",
        out,
        media_folder=tmp_path / "img",
        interactions_file=tmp_path / "log.parquet",
    )
    items = read_items(out)
    assert items["item_id"].to_pylist() == [70, 90]
    assert "external_id" not in items.column_names
    assert not (out / "users.parquet").exists()
    assert read_interactions(out)["timestamp"][0].as_py() == datetime(2024, 2, 2, tzinfo=UTC)
    assert read_interactions(out)["label"].to_pylist() == [1.0]
    assert read_interactions(out)["strength"].to_pylist() == [0.25]


def test_items_without_interactions(tmp_path: Path) -> None:
    out = imported(tmp_path, interactions_file=None, interaction_columns={})
    assert validate(out)["interactions"] == 0
    assert read_items(out)["created_at"][2].as_py() == datetime(1970, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("items.csv", "img/c.png", "img/d.png", "column 'photo': expected a file inside"),
        ("items.csv", "img/c.png", "../outside.png", "column 'photo': expected a file inside"),
        (
            "items.csv",
            "B-2",
            "A-1",
            "column 'sku': expected a value used once (line 2 has it too), got 'A-1'",
        ),
        ("items.csv", "B-2", "", "column 'sku': expected an id, got nothing"),
        (
            "items.csv",
            "2024-01-02T12:00:00+02:00",
            "someday",
            "column 'created_at': expected an ISO 8601 time",
        ),
        ("items.csv", "sku", "id", "expected a column 'sku' for item_id, the columns are id, photo"),
        (
            "log.csv",
            "bob,A-1",
            "bob,A-9",
            "line 3, column 'product': expected an item of the items file, got 'A-9'",
        ),
        ("log.csv", ",0,2", ",2,2", "line 3, column 'clicked': expected 0 or 1, got '2'"),
        ("log.csv", ",0,2", ",0,-2", "line 3, column 'slot': expected an index of at least 0, got '-2'"),
        ("log.csv", ",0,2", ",0,top", "line 3, column 'slot': expected a value of type int32, got 'top'"),
        (
            "log.csv",
            "1706832000",
            "2999-01-01",
            "line 3, column 'at': expected a time that is not in the future",
        ),
        ("log.csv", "slot", "place", "expected a column 'slot' for context_slot"),
    ],
)
def test_table_faults(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    items, log = shop(tmp_path)
    write(tmp_path.parent / "outside.png", image("red", "PNG"))
    text = (tmp_path / name).read_text()
    assert old in text
    write(tmp_path / name, text.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        import_table(
            items, tmp_path / "out", interactions_file=log, item_columns=SHOP, interaction_columns=CLICKS
        )
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.csv", b"\xff\xfe\x00", "expected a csv file"),
        ("items.parquet", b"no parquet", "expected a parquet file"),
        ("items.json", b"{}", r"expected a file name that ends in \.csv or \.parquet"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"{name}: {message}"):
        import_table(write(tmp_path / name, content), tmp_path / "out")


def test_mapping_to_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot map a column to 'price'"):
        imported(tmp_path, item_columns=SHOP | {"price": "price"})


# --- commands -------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_import_commands(tmp_path: Path) -> None:
    code, out, err = command("import-movielens", movielens(tmp_path / "ml"), "--out", tmp_path / "a")
    assert (code, json.loads(out)["items"]) == (0, 5)
    assert "item 9: 9.jpg left out: neither image nor video" in err
    code, out, _ = command(
        "import-emoji", emoji(tmp_path / "e"), "--out", tmp_path / "b", "--style", "twemoji"
    )
    assert (code, json.loads(out)["images"]) == (0, 1)
    items, log = shop(tmp_path / "shop")
    mapping = [f"--item-column={name}={own}" for name, own in SHOP.items()]
    mapping += [f"--interaction-column={name}={own}" for name, own in CLICKS.items()]
    code, out, _ = command("import", items, "--interactions", log, "--out", tmp_path / "c", *mapping)
    assert (code, json.loads(out)["context"]) == (0, {"slot": 3})
    assert command("validate", tmp_path / "c")[1] == out
    with pytest.raises(ConfigError, match="--item-column: expected NAME=COLUMN, got 'sku'"):
        command("import", items, "--out", tmp_path / "d", "--item-column", "sku")
