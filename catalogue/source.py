"""A foreign table (CSV or Parquet), read so that every error names its file, line and column."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from sightline.errors import DataError
from sightline.schema import TIMESTAMP

__all__ = ["Source"]


class Source:
    """Columns of a foreign table under our names.

    Args:
        path: `*.csv` (UTF-8, comma, header line; empty fields are missing values) or `*.parquet`.
        required, optional: our names of the columns. Others are not read.
        names: our name → the file's, where they differ.

    Raises DataError for a file that cannot be read and for a column that is not there.
    """

    def __init__(
        self, path: Path, required: Sequence[str], optional: Sequence[str] = (), names: Mapping[str, str] = {}
    ) -> None:
        self.path = path
        wanted = (*required, *optional)
        if unknown := names.keys() - set(wanted):
            raise DataError(f"{path}: cannot map a column to {min(unknown)!r}, only to {', '.join(wanted)}")
        self._names = {name: names.get(name, name) for name in wanted}
        self._first_line = 2 if path.suffix == ".csv" else 0
        found = columns_of(path)
        for name in (*required, *names):
            if self._names[name] not in found:
                raise DataError(
                    f"{path}: expected a column {self._names[name]!r} for {name}, "
                    f"the columns are {', '.join(found)}"
                )
        present = {name: own for name, own in self._names.items() if own in found}
        table = _read(path, list(present.values()))
        self._columns = {name: table[own] for name, own in present.items()}
        self.rows: int = table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def strings(self, name: str) -> list[str | None]:
        values: list[str | None] = self._columns[name].cast(pa.string()).to_pylist()
        return values

    def convert(self, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        """The column as `kind`; every value must be there and convertible."""
        values = self._columns[name]
        try:
            converted = values.cast(kind)
        except pa.ArrowInvalid:
            converted = pa.chunked_array([[_cast_or_null(value, kind) for value in values]], kind)
        self.require(pc.is_valid(converted), name, f"a value of type {kind}")
        return converted

    def times(self, name: str, *, gaps: bool = False) -> pa.ChunkedArray:
        """The column as UTC timestamps: ISO 8601 (UTC where no zone is given), Unix seconds, or timestamps;
        with `gaps`, missing values stay null."""
        values = self._columns[name]
        if pa.types.is_timestamp(values.type):
            converted = values.cast(pa.timestamp("us", tz=values.type.tz)).cast(TIMESTAMP)
        else:
            converted = pa.chunked_array([[_time(value) for value in values.to_pylist()]], TIMESTAMP)
        there = pc.is_valid(converted)
        if gaps:
            there = pc.or_(there, pc.equal(pc.fill_null(values.cast(pa.string()), ""), ""))
        self.require(there, name, "an ISO 8601 time or Unix seconds")
        past = pc.less_equal(converted, pa.scalar(datetime.now(UTC), TIMESTAMP))
        self.require(pc.fill_null(past, True), name, "a time that is not in the future")
        return converted

    def ids(self, name: str) -> tuple[pa.ChunkedArray, dict[str, int] | None]:
        """The column as int64 ids above 0. If all values are such numbers, themselves and None; otherwise
        numbered from 1 by first appearance, and the numbers by the source's id."""
        values = self._columns[name].cast(pa.string())
        self.require(pc.not_equal(values, ""), name, "an id")
        if pc.all(pc.match_substring_regex(values, r"^[1-9][0-9]{0,17}$")).as_py():
            return values.cast(pa.int64()), None
        known = pc.unique(values)
        numbers = pc.add(pc.index_in(values, known).cast(pa.int64()), 1)
        return numbers, {own: index + 1 for index, own in enumerate(known.to_pylist())}

    def require_unique(self, name: str) -> None:
        first: dict[object, int] = {}
        for row, value in enumerate(self._columns[name].to_pylist()):
            if first.setdefault(value, row) != row:
                place = self._place(first[value])
                raise self.fault(name, row, f"a value used once ({place} has it too)")

    def require(self, ok: pa.ChunkedArray, name: str, expectation: str) -> None:
        """Raise DataError for the first row that is not true; null is not true."""
        row = pc.index(pc.fill_null(ok, False), pa.scalar(False)).as_py()
        if row >= 0:
            raise self.fault(name, row, expectation)

    def fault(self, name: str, row: int, expectation: str) -> DataError:
        value = self._columns[name][row].as_py()
        got = "nothing" if value is None or value == "" else repr(value)
        where = f"{self.path}, {self._place(row)}, column {self._names[name]!r}"
        return DataError(f"{where}: expected {expectation}, got {got}")

    def _place(self, row: int) -> str:
        return f"{'line' if self._first_line else 'row'} {row + self._first_line}"


def columns_of(path: Path) -> list[str]:
    """Column names of a CSV or Parquet file."""
    try:
        if path.suffix == ".parquet":
            names: list[str] = pq.read_schema(path).names
            return names
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return next(csv.reader(file), [])
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file, there is none") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not Parquet
        raise DataError(f"{path}: expected a {path.suffix[1:]} file: {error}") from error
    raise DataError(f"{path}: expected a file name that ends in .csv or .parquet")


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path, columns=columns)
        return pa_csv.read_csv(
            path,
            # One thread: only then do pyarrow's messages name the row.
            read_options=pa_csv.ReadOptions(use_threads=False),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                include_columns=columns, column_types={name: pa.string() for name in columns}
            ),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: {error}") from error


def _cast_or_null(value: pa.Scalar, kind: pa.DataType) -> object:
    try:
        return value.cast(kind).as_py()
    except pa.ArrowInvalid:
        return None


def _time(value: object) -> datetime | None:
    if value is None:
        return None
    text = str(value)
    try:
        if text.isdecimal():
            return datetime.fromtimestamp(int(text), UTC)
        time = datetime.fromisoformat(text)
    except (ValueError, OverflowError, OSError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
