"""Packed records: one value per item or user and feature version, little-endian, of a layout fixed by its schema.

    header   magic u32 · layout u32 · schema u32 · size u32 · crc u32 · flags u32 · id i64
    item     media hash 32 bytes · caption crc u32 · tokens i32 [L] · vector f16|f32 [V]
    user     history: items i64 [H], times i64 [H], strengths f32 [H] · history length u32 · profile: tokens i32 [K],
             weights f32 [K], negative tokens i32 [K], negative weights f32 [K], dense f32 · state, the rest

`schema` is the CRC-32 of the version's schema, `size` the bytes of the whole record, `crc` the CRC-32 of everything
behind itself. All item records of a version have one size, so that a batch of them joined is a NumPy array as it is.
An item's caption is a value of its own, UTF-8: ranking reads items by the thousand and never needs it.

A caption that is kept by its media's hash, before there is an item or without one, is the CRC-32 of hash and text, u32,
and the text.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sightline.errors import DataError, StoreError
from sightline.profile import DENSE, Profile

__all__ = [
    "ItemSchema",
    "Items",
    "Schema",
    "Status",
    "UserRecord",
    "UserSchema",
    "decode_caption",
    "decode_items",
    "decode_user",
    "encode_caption",
    "encode_items",
    "encode_user",
    "fault",
    "parse_captioner",
    "parse_hash",
    "parse_schema",
]

MAGIC = int.from_bytes(b"SLfr", "little")
LAYOUT = 1
_HAS_VECTOR = 1
_HEADER = [
    ("magic", "<u4"), ("layout", "<u4"), ("schema", "<u4"), ("size", "<u4"), ("crc", "<u4"), ("flags", "<u4"),
    ("id", "<i8"),
]  # fmt: skip
_PROTECTED = 20  # first byte that the CRC covers
_NO_HASH = bytes(32)

Value = bytes | memoryview

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Length = Annotated[int, Field(ge=0, le=65_536)]


class Status(IntEnum):
    """How a read was answered."""

    fresh = 0
    """By the first of the accepted versions."""
    stale_version = 1
    """By a later one."""
    missing = 2
    """Not at all."""


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Name
    """Of the features: names this schema among those of its kind."""
    token_spec: str

    @property
    def space(self) -> str:
        return f"{self.kind}.{self.version}"  # type: ignore[attr-defined]

    @property
    def texts(self) -> str:
        """Where the captions are."""
        return f"{self.space}/text"

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the schema, which every record of it carries; what is at its default does not count."""
        return zlib.crc32(f"{self.space} {json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)}".encode())

    def _array(self, ids: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Records with their headers filled, all else 0."""
        ids = np.asarray(ids, np.int64)
        if ids.ndim != 1 or (ids <= 0).any() or len(np.unique(ids)) < len(ids):
            raise DataError(f"{self.space}: expected ids above 0, each once; got {ids.tolist()[:8]} …")
        records = np.zeros(len(ids), dtype)
        records["magic"], records["layout"], records["schema"] = MAGIC, LAYOUT, self.checksum
        records["size"], records["id"] = dtype.itemsize, ids
        return records


class ItemSchema(_Schema):
    """An item version: what made its features, and their shapes."""

    kind: Literal["item"] = "item"
    captioner: str
    tokens: Annotated[Length, Field(ge=1)]
    """L, token ids per item."""
    vector: Length = 0
    """V, numbers of the content vector; 0: no place for one."""
    vector_dtype: Literal["float16", "float32"] = "float16"

    @cached_property
    def record(self) -> np.dtype[Any]:
        number = np.dtype(self.vector_dtype).newbyteorder("<")
        return np.dtype([
            *_HEADER, ("media_hash", "u1", (32,)), ("caption_crc", "<u4"), ("tokens", "<i4", (self.tokens,)),
            ("vector", number, (self.vector,)),
        ])  # fmt: skip


class UserSchema(_Schema):
    """A user version: the token spec of its profile, and its shapes."""

    kind: Literal["user"] = "user"
    profile: Annotated[Length, Field(ge=1)]
    """K, tokens per list of the profile."""
    history: Length
    """H, events that are kept."""

    @cached_property
    def record(self) -> np.dtype[Any]:
        """Without the state."""
        events, tokens = (self.history,), (self.profile,)
        return np.dtype([
            *_HEADER, ("items", "<i8", events), ("times", "<i8", events), ("strengths", "<f4", events),
            ("events", "<u4"), ("tokens", "<i4", tokens), ("weights", "<f4", tokens),
            ("negative_tokens", "<i4", tokens), ("negative_weights", "<f4", tokens), ("dense", "<f4", (len(DENSE),)),
        ])  # fmt: skip


Schema = ItemSchema | UserSchema
_SCHEMAS: TypeAdapter[Schema] = TypeAdapter(Annotated[Schema, Field(discriminator="kind")])


def parse_schema(text: bytes, origin: str) -> Schema:
    """Raises StoreError, which names `origin`, for what is not the JSON of a schema."""
    try:
        return _SCHEMAS.validate_json(text)
    except ValidationError as error:
        raise StoreError(f"{origin}: expected the JSON of an item or user schema: {error}") from error


_NAME: TypeAdapter[str] = TypeAdapter(Name)


def parse_captioner(name: str) -> str:
    """The name, where a captioner's captions can be kept under it. Raises StoreError."""
    try:
        return _NAME.validate_python(name)
    except ValidationError as error:
        raise StoreError(
            f"captioner: expected a version of at most 64 letters, digits and ._-, got {name!r}"
        ) from error


def parse_hash(text: str, origin: str) -> bytes:
    """The 32 bytes of a SHA-256 in hexadecimal. Raises DataError, which names `origin`."""
    try:
        found = bytes.fromhex(text) if len(text) == 64 else b""
    except ValueError:
        found = b""
    if len(found) != 32:
        raise DataError(f"{origin}: expected 64 hexadecimal digits (SHA-256), got {text!r}")
    return found


def encode_caption(digest: bytes, caption: str) -> bytes:
    """The value that is kept under a media's hash."""
    text = caption.encode()
    return zlib.crc32(digest + text).to_bytes(4, "little") + text


def decode_caption(digest: bytes, value: Value) -> str | None:
    """Inverse of `encode_caption`; None for what is damaged or belongs to other media."""
    seal, text = bytes(value[:4]), bytes(value[4:])
    return text.decode() if seal == zlib.crc32(digest + text).to_bytes(4, "little") else None


@dataclass(frozen=True, kw_only=True)
class Items:
    """Items of one version.

    ids int64 [N]; tokens int [N, L], padded with 0; captions [N]; media_hashes [N], SHA-256 in hexadecimal, None
    where an item has no media; vectors float [N, V] and has_vector bool [N], which may be None where nothing has one.
    """

    ids: NDArray[np.int64]
    tokens: NDArray[Any]
    captions: Sequence[str]
    media_hashes: Sequence[str | None]
    vectors: NDArray[Any] | None = None
    has_vector: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def encode_items(schema: ItemSchema, items: Items) -> tuple[list[bytes], list[bytes]]:
    """Records and captions. Raises DataError for what does not fit the schema."""
    records = schema._array(items.ids, schema.record)
    captions = [caption.encode() for caption in items.captions]
    records["tokens"] = _tokens(schema.space, "tokens", items.tokens, (len(items), schema.tokens))
    if not len(items) == len(captions) == len(items.media_hashes):
        raise DataError(
            f"{schema.space}: expected {len(items)} captions and media hashes, one per id; "
            f"got {len(captions)} and {len(items.media_hashes)}"
        )
    records["media_hash"] = np.frombuffer(
        b"".join(
            _NO_HASH if text is None else parse_hash(text, f"{schema.space}: media hash {row}")
            for row, text in enumerate(items.media_hashes)
        ),
        np.uint8,
    ).reshape(-1, 32)
    records["caption_crc"] = [zlib.crc32(caption) for caption in captions]
    if items.vectors is not None:
        _floats(schema.space, "vectors", items.vectors, (len(items), schema.vector))
        has = np.ones(len(items), bool) if items.has_vector is None else items.has_vector
        with np.errstate(over="ignore"):  # looked for in the next line
            records["vector"] = np.where(has[:, None], items.vectors, 0)
        _floats(schema.space, f"vectors as {schema.vector_dtype}", records["vector"], (len(items), schema.vector))
        records["flags"] = has * _HAS_VECTOR
    return _seal(records), captions


def decode_items(records: NDArray[Any], captions: Sequence[str]) -> Items:
    """Inverse of `encode_items`, of records as an array."""
    hashes = [None if row == _NO_HASH else row.hex() for row in map(bytes, records["media_hash"])]
    has = (records["flags"] & _HAS_VECTOR).astype(bool)
    return Items(
        ids=records["id"], tokens=records["tokens"], captions=captions, media_hashes=hashes,
        vectors=records["vector"], has_vector=has,
    )  # fmt: skip


def intact(schema: ItemSchema, records: NDArray[Any], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [N]: the record is one of this schema and of this id. The cheap half of `fault`, for every read."""
    found: NDArray[np.bool_] = (
        (records["magic"] == MAGIC) & (records["schema"] == schema.checksum) & (records["id"] == ids)
    )
    return found


def has_vector(records: NDArray[Any]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (records["flags"] & _HAS_VECTOR) != 0
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class UserRecord:
    """A user's profile, last events and whatever state the profile is continued from.

    items int64 [h], strengths FP32 [h], times int64 [h] (µs since 1970, UTC), oldest first, h ≤ H of the schema.
    """

    id: int
    profile: Profile
    items: NDArray[np.int64]
    strengths: NDArray[np.float32]
    times: NDArray[np.int64]
    state: bytes = b""


def encode_user(schema: UserSchema, user: UserRecord) -> bytes:
    """Raises DataError for what does not fit the schema."""
    record = schema._array([user.id], schema.record)
    where, events, length = f"{schema.space}, user {user.id}", len(user.items), (schema.profile,)
    if events > schema.history or not events == len(user.strengths) == len(user.times):
        raise DataError(
            f"{where}: expected at most {schema.history} events, as many strengths and times as items; "
            f"got {events} items, {len(user.strengths)} strengths, {len(user.times)} times"
        )
    record["events"] = events
    record["items"][0, :events], record["times"][0, :events] = user.items, user.times
    record["strengths"][0, :events] = _floats(where, "strengths", user.strengths, (events,))
    profile = user.profile
    for name in ("tokens", "negative_tokens"):
        record[name] = _tokens(where, name, getattr(profile, name), length)
    for name, shape in (("weights", length), ("negative_weights", length), ("dense", (len(DENSE),))):
        record[name] = _floats(where, name, getattr(profile, name), shape)
    record["size"] += len(user.state)
    return _seal(record, user.state)[0]


def decode_user(schema: UserSchema, value: bytes) -> UserRecord:
    """Inverse of `encode_user`; the value is one without a `fault`."""
    record = np.frombuffer(value, schema.record, count=1)[0]
    events = int(record["events"])
    return UserRecord(
        id=int(record["id"]),
        profile=Profile(
            tokens=record["tokens"].astype(np.int64), weights=record["weights"].astype(np.float32),
            negative_tokens=record["negative_tokens"].astype(np.int64),
            negative_weights=record["negative_weights"].astype(np.float32), dense=record["dense"].astype(np.float32),
        ),
        items=record["items"][:events], strengths=record["strengths"][:events], times=record["times"][:events],
        state=value[schema.record.itemsize :],
    )  # fmt: skip


def fault(schema: Schema, identity: int, value: bytes, caption: bytes | None) -> str | None:
    """What is wrong with a record read under this id: everything is checked; None where all is well."""
    least = schema.record.itemsize
    if len(value) < least or (schema.kind == "item" and len(value) > least):
        return f"expected {least} bytes, got {len(value)}"
    record = np.frombuffer(value, schema.record, count=1)[0]
    expected = {"magic": MAGIC, "layout": LAYOUT, "schema": schema.checksum, "size": len(value), "id": identity}
    for name, number in expected.items():
        if record[name] != number:
            return f"{name}: expected {number}, got {record[name]}"
    if record["crc"] != zlib.crc32(memoryview(value)[_PROTECTED:]):
        return "checksum: the record is damaged"
    if schema.kind == "item":
        if caption is None:
            return "caption: missing"
        if record["caption_crc"] != zlib.crc32(caption):
            return "caption: not the one that the record was written with"
    return None


def _seal(records: NDArray[Any], tail: bytes = b"") -> list[bytes]:
    """Fill in the CRC; one value per record."""
    size = records.dtype.itemsize
    whole = memoryview(records.tobytes())
    rows = [whole[start : start + size] for start in range(0, len(whole), size)]
    records["crc"] = [zlib.crc32(tail, zlib.crc32(row[_PROTECTED:])) for row in rows]
    sealed = records.tobytes()
    return [sealed[start : start + size] + tail for start in range(0, len(sealed), size)]


def _tokens(where: str, name: str, tokens: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if tokens.shape != shape or tokens.dtype.kind not in "iu" or (tokens < 0).any() or (tokens >= 2**31).any():
        raise DataError(
            f"{where}: {name}: expected ids from 0 to 2**31 - 1 of shape {list(shape)}, "
            f"got {tokens.dtype} of shape {list(tokens.shape)}"
        )
    return tokens


def _floats(where: str, name: str, numbers: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise DataError(
            f"{where}: {name}: expected finite numbers of shape {list(shape)}, got shape {list(numbers.shape)}"
            + (" with others among them" if numbers.shape == shape else "")
        )
    return numbers
