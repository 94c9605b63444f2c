"""The store on a server: Redis, alone or as a cluster, which is found out by asking.

    sightline:{17}:item.v2:81          record of item 81: its bucket, 81 mod 64, is the hash tag
    sightline:{17}:item.v2/text:81     its caption
    sightline:{17}:caption.c1:5fe0…    caption of the captioner c1 by its media's hash, whose first byte mod 64 is 17
    sightline:{meta}:schemas, …:marks  hashes
    sightline:{meta}:changes           stream of the ids of written items, int64 [C], none for a drop
    sightline:{17}:once:8c1f…          a change of a user that has been made; expires
    sightline:lease:name               its holder

The tag puts what belongs to one id, in all versions, into one slot of a cluster, and a large read into at most 64
slots: one MGET each, in one pipeline. A lone server takes it all in one. MSET is atomic, so record and caption of an
id change at once, on a lone server all of a batch. Users are changed by comparing and setting. A write that was
acknowledged is as durable as the server is set to be: `describe` shows that.
"""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from sightline.errors import ConfigError, StoreError
from sightline.location import PASSWORD, without_secrets
from sightline.store.base import NOTHING, REMEMBERED, Change, FeatureStore, Mark, Read
from sightline.store.records import Schema, Value

__all__ = ["RedisStore"]

BUCKETS = 64
_DROPPED = 2048  # ids per pipeline
_PREFIX = b"sightline:"
_META = _PREFIX + b"{meta}:"
_SCHEMAS, _MARKS, _CHANGES = _META + b"schemas", _META + b"marks", _META + b"changes"
_LEASE = _PREFIX + b"lease:"
_SEQUENCE = 20  # bits of a position, for the number within a millisecond
_ATTEMPTS, _LONGEST = 100, 0.05  # of a change, and the longest mean wait between two of them in seconds
_OPTIONS = {  # where the address says nothing else: seconds; one more try for connections that the server closed
    "socket_timeout": 5.0, "socket_connect_timeout": 5.0, "retry": Retry(NoBackoff(), 1),
}  # fmt: skip


_SET_IF_SAME = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 1 end
if redis.call('GET', KEYS[1]) ~= (ARGV[2] or false) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], '', 'EX', 60)
return 1
"""
_CLAIM = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_UNCLAIM = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class RedisStore(FeatureStore):
    """A Redis server or cluster at `redis://[user:password@]host:port/db`, or `rediss://…` for TLS.

    Parameters of redis-py's connections may follow, as `?ssl_ca_certs=ca.pem&ssl_certfile=…&ssl_keyfile=…` or
    `socket_timeout=0.05` (seconds). The server's certificate and host name are checked.
    """

    poll_seconds = 0.1

    def __init__(self, url: str) -> None:
        super().__init__()
        self._where = without_secrets(url)
        options: dict[str, Any] = dict(_OPTIONS)
        if os.environ.get(PASSWORD):
            options["password"] = os.environ[PASSWORD]
        try:
            self._client: Any = redis.Redis.from_url(url, **options)
            with self._errors():
                self._cluster = bool(self._client.info("cluster")["cluster_enabled"])
                if self._cluster:
                    self._client.close()
                    self._client = RedisCluster.from_url(url, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._where}: expected redis://host:port/db or rediss://…, with parameters of redis-py: {error}"
            ) from error

    def close(self) -> None:
        self._client.close()

    def scan(self, schema: Schema, batch: int = 2048) -> Iterator[list[tuple[int, bytes, bytes | None]]]:
        """Ids first, then their records: what is written meanwhile may be in it or not."""
        ids = np.sort(np.fromiter(self._scan_ids(schema), np.int64))
        spaces = [schema.space, schema.texts]
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch]
            rows = zip(part.tolist(), *self._read(part, spaces), strict=True)
            yield [(identity, record, caption) for identity, record, caption in rows if record is not None]

    def count(self, schema: Schema) -> int:
        return sum(1 for _ in self._scan_ids(schema))

    def marks(self) -> dict[str, int]:
        with self._errors():
            return {name.decode(): int(rows) for name, rows in self._client.hgetall(_MARKS).items()}

    def describe(self) -> dict[str, Any]:
        """`appendfsync` always: every acknowledged write survives a crash of the machine; everysec: all but the last
        second's; `appendonly` no: a restart may lose all since the last snapshot. `maxmemory_policy` other than
        noeviction: the server may drop records.
        """
        with self._errors():
            node = {"target_nodes": self._client.get_random_node()} if self._cluster else {}
            info = self._client.info(**node)
            settings: dict[str, str] = {}
            with suppress(redis.ResponseError):  # hosted servers do not tell
                for pattern in ("append*", "maxmemory*"):
                    settings |= self._client.config_get(pattern, **node)
        return {
            "store": "redis", "at": self._where, "cluster": self._cluster, "redis_version": info["redis_version"],
            "used_memory_bytes": info["used_memory"],
            **{name.replace("-", "_"): settings.get(name)
               for name in ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")},
        }  # fmt: skip

    @contextmanager
    def _snapshot(self) -> Iterator[Read]:
        yield self._read

    def _read(self, ids: NDArray[np.int64], spaces: Sequence[str]) -> list[list[Value | None]]:
        found: list[list[Value | None]] = [[None] * len(ids) for _ in spaces]
        groups = self._groups(ids)
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for _, numbers in groups:
                pipeline.execute_command("MGET", *(key for space in spaces for key in _keys(numbers, space)))
            answers = pipeline.execute()
        for (rows, numbers), answer in zip(groups, answers, strict=True):
            for place, column in enumerate(found):
                values = answer[place * len(numbers) : (place + 1) * len(numbers)]
                if len(groups) == 1:
                    found[place] = values
                else:
                    for row, value in zip(rows, values, strict=True):
                        column[row] = value
        return found

    def changes(self, after: int) -> tuple[int, NDArray[np.int64] | None]:
        """Positions are the stream's: milliseconds and a number among them. A server that lost the one at `after`, as
        when a replica takes over, does not remember.
        """
        with self._errors():
            if after > 0:
                entries = self._client.xrange(_CHANGES, _entry(after))
                if entries and _position(entries[0][0]) == after:
                    writes = [fields[b"ids"] for _, fields in entries[1:]]
                    if not all(writes):
                        return _position(entries[-1][0]), None
                    ids = np.unique(np.frombuffer(b"".join(writes), "<i8")).astype(np.int64)
                    return _position(entries[-1][0]), ids
            last = self._client.xrevrange(_CHANGES, count=1)
        position = _position(last[0][0]) if last else 0
        return position, NOTHING if after == position == 0 else None

    def _write(
        self, ids: NDArray[np.int64], values: Mapping[str, Sequence[bytes]], mark: Mark | None, *, logged: bool = False
    ) -> None:
        with self._errors(), self._client.pipeline(transaction=not self._cluster) as pipeline:
            for rows, numbers in self._groups(ids):
                pairs: list[bytes] = []
                for space, column in values.items():
                    for key, row in zip(_keys(numbers, space), rows, strict=True):
                        pairs += (key, column[row])
                pipeline.execute_command("MSET", *pairs)
            self._finish(pipeline, ids if logged else NOTHING, mark)

    def _finish(self, pipeline: Any, changed: NDArray[np.int64], mark: Mark | None) -> None:
        """Execute what is in the pipeline, then log it: who hears of a change shall find it."""
        if self._cluster:
            pipeline.execute()  # on all nodes before the one that logs
        if len(changed):
            _log(pipeline, changed)
        if mark:
            name, rows_done = mark
            if rows_done is None:
                pipeline.hdel(_MARKS, name)
            else:
                pipeline.hset(_MARKS, name, rows_done)
        pipeline.execute()

    def _delete(self, ids: NDArray[np.int64], spaces: Sequence[str], *, logged: bool = False) -> None:
        with self._errors(), self._client.pipeline(transaction=not self._cluster) as pipeline:
            for _, numbers in self._groups(ids):
                pipeline.execute_command("UNLINK", *(key for space in spaces for key in _keys(numbers, space)))
            self._finish(pipeline, ids if logged else NOTHING, None)

    def _drop(self, schema: Schema, marks: Sequence[str]) -> None:
        """Marks first and the schema last: at any interruption no load goes on, and a second drop does."""
        with self._errors():
            if marks:
                self._client.hdel(_MARKS, *marks)
            ids = np.fromiter(self._scan_ids(schema), np.int64)
            for start in range(0, len(ids), _DROPPED):
                self._delete(ids[start : start + _DROPPED], [schema.space, schema.texts])
            if schema.kind == "item":
                _log(self._client, NOTHING)
            self._client.hdel(_SCHEMAS, schema.space)

    def _change(self, space: str, ids: Sequence[int], change: Change) -> None:
        """All users at once, then those again that another changed between our reading and writing."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, min(2e-3 * attempt, 2 * _LONGEST)))
            (before,) = self._read(np.array(ids, np.int64), [space])
            after = [change(identity, value) for identity, value in zip(ids, before, strict=True)]
            todo = [row for row, value in enumerate(after) if value is not None]
            with self._errors(), self._client.pipeline(transaction=False) as pipeline:
                for row in todo:
                    known = [] if before[row] is None else [before[row]]
                    # kept for a minute: redis-py sends a command again whose answer was lost with the connection
                    once = b"%s{%d}:once:%s" % (_PREFIX, ids[row] % BUCKETS, secrets.token_hex(8).encode())
                    key = _keys([ids[row]], space)[0]
                    pipeline.execute_command("EVAL", _SET_IF_SAME, 2, key, once, after[row], *known)
                done = pipeline.execute()
            ids = [ids[row] for row, one in zip(todo, done, strict=True) if not one]
            if not ids:
                return
        raise StoreError(
            f"{self._where}: {space}: user {ids[0]}: expected to change it within {_ATTEMPTS} attempts, but others "
            "changed it each time; let fewer processes update one user, or hand over its events together"
        )

    def _write_captions(self, captioner: str, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for name, value in zip(_caption_keys(captioner, keys), values, strict=True):
                pipeline.set(name, value)
            pipeline.execute()

    def _read_captions(self, captioner: str, keys: Sequence[bytes]) -> Sequence[Value | None]:
        names = _caption_keys(captioner, keys)
        groups = [rows for rows, _ in self._groups(np.array([key[0] for key in keys], np.int64))]
        found: list[Value | None] = [None] * len(keys)
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for rows in groups:
                pipeline.execute_command("MGET", *(names[row] for row in rows))
            for rows, answer in zip(groups, pipeline.execute(), strict=True):
                for row, value in zip(rows, answer, strict=True):
                    found[row] = value
        return found

    def _drop_captions(self, captioner: str) -> None:
        with self._errors():
            pattern = b"%s{*}:caption.%s:*" % (_PREFIX, captioner.encode())
            names = list(self._client.scan_iter(match=pattern, count=1000))
            for start in range(0, len(names), _DROPPED):
                with self._client.pipeline(transaction=False) as pipeline:
                    for name in names[start : start + _DROPPED]:
                        pipeline.unlink(name)
                    pipeline.execute()

    def count_captions(self) -> dict[str, int]:
        with self._errors():
            names = set(self._client.scan_iter(match=_PREFIX + b"{*}:caption.*", count=1000))
        return dict(sorted(Counter(name.split(b":")[2].decode().removeprefix("caption.") for name in names).items()))

    def _claim(self, name: bytes, seconds: float) -> bool:
        with self._errors():
            return bool(self._client.eval(_CLAIM, 1, _LEASE + name, self._holder, round(seconds * 1000)))

    def _unclaim(self, name: bytes) -> None:
        with self._errors():
            self._client.eval(_UNCLAIM, 1, _LEASE + name, self._holder)

    def _groups(self, ids: NDArray[np.int64]) -> list[tuple[Sequence[int], list[int]]]:
        """Rows and ids that one command may name."""
        if not len(ids):
            return []
        if not self._cluster:
            return [(range(len(ids)), ids.tolist())]
        bucket = ids % BUCKETS
        rows = [np.flatnonzero(bucket == one) for one in np.unique(bucket)]
        return [(at.tolist(), ids[at].tolist()) for at in rows]

    def _scan_ids(self, schema: Schema) -> Iterator[int]:
        pattern = b"%s{*}:%s:*" % (_PREFIX, schema.space.encode())
        with self._errors():
            keys = self._client.scan_iter(match=pattern, count=1000)
            yield from {int(key.rpartition(b":")[2]) for key in keys}  # SCAN may name a key twice

    def _put_schema(self, space: str, text: bytes) -> bytes:
        with self._errors():
            self._client.hsetnx(_SCHEMAS, space, text)
            return bytes(self._client.hget(_SCHEMAS, space))

    def _get_schemas(self) -> dict[str, bytes]:
        with self._errors():
            return {space.decode(): text for space, text in self._client.hgetall(_SCHEMAS).items()}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(
                f"{self._where}: expected a Redis server that answers: {error or type(error).__name__}"
            ) from error


def _caption_keys(captioner: str, keys: Sequence[bytes]) -> list[bytes]:
    heads = _heads(f"caption.{captioner}")
    return [heads[key[0] % BUCKETS] + key.hex().encode() for key in keys]


def _log(client: Any, ids: NDArray[np.int64]) -> None:
    client.xadd(_CHANGES, {"ids": ids.astype("<i8").tobytes()}, maxlen=REMEMBERED, approximate=True)


def _position(entry: bytes) -> int:
    milliseconds, number = entry.split(b"-")
    return (int(milliseconds) << _SEQUENCE) + int(number)


def _entry(position: int) -> str:
    return f"{position >> _SEQUENCE}-{position & (1 << _SEQUENCE) - 1}"


@cache
def _heads(space: str) -> list[bytes]:
    return [b"%s{%d}:%s:" % (_PREFIX, bucket, space.encode()) for bucket in range(BUCKETS)]


def _keys(ids: list[int], space: str) -> list[bytes]:
    heads = _heads(space)
    return [heads[identity % BUCKETS] + b"%d" % identity for identity in ids]
