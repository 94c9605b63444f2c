"""What both feature stores are: versions side by side, batched reads, sealed records. See docs/store.md."""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightline.errors import DataError, StoreError
from sightline.store.records import (
    Items,
    ItemSchema,
    Schema,
    Status,
    UserRecord,
    UserSchema,
    Value,
    decode_caption,
    decode_items,
    decode_user,
    encode_caption,
    encode_items,
    encode_user,
    fault,
    has_vector,
    intact,
    parse_captioner,
    parse_hash,
    parse_schema,
)

__all__ = ["NOTHING", "REMEMBERED", "Change", "FeatureStore", "ItemBatch", "ItemDetails", "Mark", "Read", "UserRead"]

S = TypeVar("S", bound=Schema)
REMEMBERED = 4096
"""Writes of items that `changes` looks back on, at least."""
NOTHING: NDArray[np.int64] = np.zeros(0, np.int64)
NOTHING.flags.writeable = False
Read = Callable[[NDArray[np.int64], Sequence[str]], list[list[Value | None]]]
"""Ids and spaces → per space one value or None per id. The values live as long as the snapshot."""
Mark = tuple[str, int | None]
"""Name and number of rows; None removes it."""
Change = Callable[[int, Value | None], bytes | None]
"""Id and what is kept under it → what shall be, or None to leave it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemBatch:
    """Items as they were asked for, row by row; L and V are the largest of the accepted versions.

    tokens int64 [N, L] and vectors [N, V], 0 where there is nothing; has_vector bool [N]; status uint8 [N] (`Status`);
    version int8 [N], place in the list of accepted versions, −1 where missing.
    """

    tokens: NDArray[np.int64]
    vectors: NDArray[Any]
    has_vector: NDArray[np.bool_]
    status: NDArray[np.uint8]
    version: NDArray[np.int8]


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemDetails:
    """All of one item, for people and jobs; tokens [L] without the padding, vector [V]."""

    schema: ItemSchema
    status: Status
    tokens: list[int]
    caption: str
    media_hash: str | None
    vector: NDArray[Any] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class UserRead:
    """One user as it was asked for; `version` as in `ItemBatch`."""

    record: UserRecord | None
    status: Status
    version: int


class FeatureStore(ABC):
    """Items and users by id and feature version.

    A read names the versions that it accepts, the newest first, and learns which one it got. A write that returned
    is there after any crash of the writer; before that, readers see all of a record or nothing of it.

    Raises StoreError where the store cannot be reached, or a version was never registered; DataError for features
    that do not fit the version's schema.
    """

    poll_seconds = 0.0
    """How often `changes` is worth asking: 0, before every read."""

    def __init__(self) -> None:
        self._schemas: dict[str, Schema] = {}
        self._holder = secrets.token_bytes(16)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release the connection or the mapping."""

    # --- versions ---------------------------------------------------------------------------------------

    def register(self, schema: Schema) -> None:
        """Make a version known; again with an equal schema is nothing. Raises StoreError if it has another one."""
        known = parse_schema(self._put_schema(schema.space, schema.model_dump_json().encode()), schema.space)
        if known != schema:
            raise StoreError(
                f"{schema.space} is registered with another schema: expected {known.model_dump_json()}, "
                f"got {schema.model_dump_json()}; give the new one a version of its own"
            )

    def schemas(self) -> list[Schema]:
        """Of all registered versions, by kind and name."""
        return [parse_schema(text, space) for space, text in sorted(self._get_schemas().items())]

    def schema(self, kind: type[S], version: str) -> S:
        """Raises StoreError for a version that is not registered."""
        space = f"{kind.model_fields['kind'].default}.{version}"
        if space not in self._schemas:
            self._schemas = {schema.space: schema for schema in self.schemas()}
        found = self._schemas.get(space)
        if not isinstance(found, kind):
            raise StoreError(
                f"{space}: expected a registered version, one of {', '.join(self._schemas) or 'none so far'}"
            )
        return found

    # --- items ------------------------------------------------------------------------------------------

    def write_items(self, version: str, items: Items, *, mark: Mark | None = None) -> None:
        """Write or replace items of a version, on return durably; `mark` is kept with them (`marks`)."""
        schema = self.schema(ItemSchema, version)
        records, captions = encode_items(schema, items)
        ids = np.asarray(items.ids, np.int64)
        self._write(ids, {schema.space: records, schema.texts: captions}, mark, logged=True)

    def read_items(self, ids: ArrayLike, accept: Sequence[str]) -> ItemBatch:
        """Features of items, one row per id. Unknown ids are missing, and so are damaged records (`verify`).

        Args:
            ids: int64 [N], in any order, repeated or not.
            accept: versions, the newest first.
        """
        ids, schemas = _ids(ids), [self.schema(ItemSchema, version) for version in _some(accept)]
        tokens = np.zeros((len(ids), max(schema.tokens for schema in schemas)), np.int64)
        vectors = np.zeros(
            (len(ids), max(schema.vector for schema in schemas)),
            np.result_type(*(schema.vector_dtype for schema in schemas)),
        )
        with_vector = np.zeros(len(ids), bool)
        version = np.full(len(ids), -1, np.int8)
        todo = np.arange(len(ids))
        with self._snapshot() as read:
            for place, schema in enumerate(schemas):
                rows, records = self._item_records(read, schema, ids, todo)
                tokens[rows, : schema.tokens] = records["tokens"]
                if schema.vector:
                    vectors[rows, : schema.vector] = records["vector"]
                    with_vector[rows] = has_vector(records)
                version[rows] = place
                todo = np.flatnonzero(version < 0)
                if not len(todo):
                    break
        status = np.where(version > 0, Status.stale_version, Status.fresh).astype(np.uint8)
        status[todo] = Status.missing
        return ItemBatch(tokens=tokens, vectors=vectors, has_vector=with_vector, status=status, version=version)

    @staticmethod
    def _item_records(
        read: Read, schema: ItemSchema, ids: NDArray[np.int64], todo: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64] | slice, NDArray[Any]]:
        """Rows of `ids` that are found among those to do, and their records."""
        whole = len(todo) == len(ids)
        wanted = ids if whole else ids[todo]
        (values,) = read(wanted, [schema.space])
        size = schema.record.itemsize
        try:
            joined = b"".join(values)  # type: ignore[arg-type]
            complete = len(joined) == size * len(values)
        except TypeError:  # None: an id that is not there
            complete = False
        if not complete:
            at = [row for row, value in enumerate(values) if value is not None and len(value) == size]
            todo, wanted, whole = todo[at], wanted[at], False
            joined = b"".join(values[row] for row in at)  # type: ignore[misc]
        records = np.frombuffer(joined, schema.record)
        good = intact(schema, records, wanted)
        if not good.all():
            _log.warning(
                "%s: damaged records, among them that of item %d; run `sightline store verify`",
                schema.space, wanted[~good][0],
            )  # fmt: skip
            todo, records, whole = todo[good], records[good], False
        return slice(None) if whole else todo, records

    def read_details(self, ids: ArrayLike, accept: Sequence[str]) -> list[ItemDetails | None]:
        """Everything of some items, captions included; None where missing or damaged."""
        ids, schemas = _ids(ids), [self.schema(ItemSchema, version) for version in _some(accept)]
        found: list[ItemDetails | None] = [None] * len(ids)
        with self._snapshot() as read:
            for place, schema in enumerate(schemas):
                todo = [row for row, details in enumerate(found) if details is None]
                values = read(ids[todo], [schema.space, schema.texts])
                for row, value, caption in zip(todo, *values, strict=True):
                    if value is None or fault(schema, ids[row], bytes(value), caption and bytes(caption)):
                        continue
                    items = decode_items(np.frombuffer(value, schema.record).copy(), [bytes(caption or b"").decode()])
                    has = items.has_vector is not None and items.has_vector[0]
                    found[row] = ItemDetails(
                        schema=schema, status=Status.stale_version if place else Status.fresh,
                        tokens=[token for token in items.tokens[0].tolist() if token], caption=items.captions[0],
                        media_hash=items.media_hashes[0],
                        vector=items.vectors[0] if has and items.vectors is not None else None,
                    )  # fmt: skip
        return found

    @abstractmethod
    def changes(self, after: int) -> tuple[int, NDArray[np.int64] | None]:
        """What happened to items since: for whoever keeps some of them in memory.

        Returns the position of the last change, and the ids int64 [C] of items that were written or deleted in any
        version after the position `after`, each once, ascending; None where the store does not remember, so that all
        may have changed: at least the last 4 096 writes are remembered, a drop and positions below 0 never. Take a
        first position before the first read; read the items of ids that were named after they were.

        In LMDB the answer that nothing changed costs a microsecond; in Redis every answer is a round trip.
        """

    # --- users ------------------------------------------------------------------------------------------

    def write_users(self, version: str, users: Sequence[UserRecord], *, mark: Mark | None = None) -> None:
        """Write or replace users of a version, on return durably."""
        schema = self.schema(UserSchema, version)
        ids = np.array([user.id for user in users], np.int64)
        self._write(ids, {schema.space: [encode_user(schema, user) for user in users]}, mark)

    def read_user(self, user: int, accept: Sequence[str]) -> UserRead:
        """One user; a damaged record is as missing."""
        schemas = [self.schema(UserSchema, version) for version in _some(accept)]
        with self._snapshot() as read:
            for place, schema in enumerate(schemas):
                ((value,),) = read(np.array([user]), [schema.space])
                if record := _user(schema, user, value):
                    status = Status.stale_version if place else Status.fresh
                    return UserRead(record=record, status=status, version=place)
        return UserRead(record=None, status=Status.missing, version=-1)

    def update_users(
        self, version: str, ids: Sequence[int], update: Callable[[int, UserRecord | None], UserRecord | None]
    ) -> None:
        """Read, change and write users, each atomically, also against other processes; on return durably.

        Args:
            version: of users.
            ids: each once.
            update: gets an id and its record, None where there is none or a damaged one; returns the new record, or
                None to leave it. It may be asked again about a user that somebody else changed meanwhile, and must not
                use the store. Where it raises, LMDB has changed no user, Redis possibly those before.

        Raises StoreError also where others change a user so often that it cannot be written.
        """
        schema, numbers = self.schema(UserSchema, version), [int(one) for one in ids]
        if len(set(numbers)) < len(numbers):
            raise StoreError(f"{schema.space}: expected ids, each once; got {numbers[:8]} …")

        def change(identity: int, value: Value | None) -> bytes | None:
            user = update(identity, _user(schema, identity, value))
            if user is not None and user.id != identity:
                raise DataError(f"{schema.space}: expected user {identity} from its update, got {user.id}")
            return None if user is None else encode_user(schema, user)

        self._change(schema.space, numbers, change)

    # --- captions by media ------------------------------------------------------------------------------

    def write_captions(self, captioner: str, captions: Mapping[str, str]) -> None:
        """Keep what a captioner said about media, on return durably.

        Args:
            captioner: its version.
            captions: media hash, SHA-256 in hexadecimal → annotated caption, which may be empty.
        """
        keys = [parse_hash(text, "media hash") for text in captions]
        values = [encode_caption(key, caption) for key, caption in zip(keys, captions.values(), strict=True)]
        self._write_captions(parse_captioner(captioner), keys, values)

    def read_captions(self, captioner: str, hashes: Sequence[str]) -> list[str | None]:
        """Captions of media by their hashes, as in `write_captions`; None where missing or damaged."""
        keys = [parse_hash(text, "media hash") for text in hashes]
        values = self._read_captions(parse_captioner(captioner), keys)
        found = [None if value is None else decode_caption(key, value) for key, value in zip(keys, values, strict=True)]
        for text, value, caption in zip(hashes, values, found, strict=True):
            if value is not None and caption is None:
                _log.warning("captions of %s: that of %s is damaged and counts as missing", captioner, text)
        return found

    def drop_captions(self, captioner: str) -> None:
        """Remove all captions of a captioner; one without any is nothing."""
        self._drop_captions(parse_captioner(captioner))

    @abstractmethod
    def count_captions(self) -> dict[str, int]:
        """Number of captions by captioner, of those that have some."""

    # --- leases -----------------------------------------------------------------------------------------

    def claim(self, name: str, seconds: float) -> bool:
        """Take a lease that all users of the store agree on; False while another holds it.

        It ends with `unclaim`, or after that many seconds if the holder was killed or stalled; claiming it again
        renews it. The holder is this object: threads that share it share its leases. LMDB goes by the machine's clock.
        """
        if not 1e-3 <= seconds < 1e9:
            raise StoreError(f"seconds: expected a lease of 0.001 to 10^9 seconds, got {seconds}")
        return self._claim(_lease(name), seconds)

    def unclaim(self, name: str) -> None:
        """End a lease; one that another holds, or nobody, stays as it is."""
        self._unclaim(_lease(name))

    # --- removal ----------------------------------------------------------------------------------------

    def delete(self, schema: Schema, ids: ArrayLike) -> None:
        """Remove items or users of one version, on return durably; ids int64 [N], unknown ones among them or not."""
        known = self.schema(type(schema), schema.version)
        self._delete(_ids(ids), [known.space, known.texts], logged=known.kind == "item")

    def drop(self, schema: Schema) -> None:
        """Remove a whole version: its records, its unfinished loads, at last its schema.

        Readers that know the version miss its items from now on, and get the next one that they accept. Whoever writes
        it has to stop before. Redis takes a command per batch; after an interruption, drop again.
        """
        known = self.schema(type(schema), schema.version)
        self._drop(known, [name for name in self.marks() if name.startswith(f"{known.space}:")])
        self._schemas = {}

    # --- the whole store --------------------------------------------------------------------------------

    @abstractmethod
    def scan(self, schema: Schema, batch: int = 2048) -> Iterator[list[tuple[int, bytes, bytes | None]]]:
        """Everything of one version in the order of ids, in batches: id, record, caption (items only)."""

    @abstractmethod
    def count(self, schema: Schema) -> int:
        """Records of a version."""

    @abstractmethod
    def marks(self) -> Mapping[str, int]:
        """What `mark` of the writes left: rows by name."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Where and how the data is kept: what an operator checks."""

    # --- what a store brings ----------------------------------------------------------------------------

    @abstractmethod
    def _snapshot(self) -> AbstractContextManager[Read]: ...

    @abstractmethod
    def _write(
        self, ids: NDArray[np.int64], values: Mapping[str, Sequence[bytes]], mark: Mark | None, *, logged: bool = False
    ) -> None:
        """Per space one value per id; what belongs to one id becomes visible at once. Logged ones are `changes`."""

    @abstractmethod
    def _delete(self, ids: NDArray[np.int64], spaces: Sequence[str], *, logged: bool = False) -> None:
        """Remove what these spaces have under the ids; what belongs to one id disappears at once."""

    @abstractmethod
    def _drop(self, schema: Schema, marks: Sequence[str]) -> None:
        """Remove all records and captions, these marks, and the schema; of items, `changes` forgets what was."""

    @abstractmethod
    def _change(self, space: str, ids: Sequence[int], change: Change) -> None:
        """Replace values by what `change` makes of them, atomically per id."""

    @abstractmethod
    def _write_captions(self, captioner: str, keys: Sequence[bytes], values: Sequence[bytes]) -> None: ...

    @abstractmethod
    def _read_captions(self, captioner: str, keys: Sequence[bytes]) -> Sequence[Value | None]: ...

    @abstractmethod
    def _drop_captions(self, captioner: str) -> None: ...

    @abstractmethod
    def _claim(self, name: bytes, seconds: float) -> bool:
        """For `self._holder`, which differs from object to object."""

    @abstractmethod
    def _unclaim(self, name: bytes) -> None: ...

    @abstractmethod
    def _put_schema(self, space: str, text: bytes) -> bytes:
        """Keep it unless there is one; returns the one that is kept."""

    @abstractmethod
    def _get_schemas(self) -> dict[str, bytes]: ...


def _ids(ids: ArrayLike) -> NDArray[np.int64]:
    found = np.asarray(ids)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
        raise StoreError(f"ids: expected int64 [N], got {found.dtype} of shape {list(found.shape)}")
    return found.astype(np.int64)


def _user(schema: UserSchema, identity: int, value: Value | None) -> UserRecord | None:
    """None also for a damaged record."""
    if value is None:
        return None
    record = bytes(value)
    if wrong := fault(schema, identity, record, None):
        _log.warning("%s: user %d: %s; run `sightline store verify`", schema.space, identity, wrong)
        return None
    return decode_user(schema, record)


def _lease(name: str) -> bytes:
    found = name.encode()
    if not 0 < len(found) <= 256:
        raise StoreError(f"lease: expected a name of 1 to 256 bytes, got {len(found)}: {name[:64]!r}")
    return found


def _some(accept: Sequence[str]) -> Sequence[str]:
    if isinstance(accept, str) or not accept:
        raise StoreError(f"accept: expected a list of versions, the newest first, got {accept!r}")
    return accept
