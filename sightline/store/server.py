"""The store on a server: Redis, alone or as a cluster, which is found out by asking.

    sightline:{17}:item.v2:81          record of item 81: its bucket, 81 mod 64, is the hash tag
    sightline:{17}:item.v2/text:81     its caption
    sightline:{meta}:schemas, …:marks  hashes

The tag puts what belongs to one id, in all versions, into one slot of a cluster, and a large read into at most 64
slots: one MGET each, in one pipeline. A lone server takes it all in one. MSET is atomic, so record and caption of an
id change at once. A write that was acknowledged is as durable as the server is set to be: `describe` shows that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from sightline.errors import ConfigError, StoreError
from sightline.store.base import FeatureStore, Mark, Read, Value
from sightline.store.records import Schema

__all__ = ["PASSWORD", "RedisStore"]

PASSWORD = "SIGHTLINE_STORE_PASSWORD"
"""Environment variable with the server's password, for those who keep it out of the address."""
BUCKETS = 64
_DROPPED = 2048  # ids per pipeline
_PREFIX = b"sightline:"
_META = _PREFIX + b"{meta}:"
_SCHEMAS, _MARKS = _META + b"schemas", _META + b"marks"
_OPTIONS = {  # where the address says nothing else: seconds; one more try for connections that the server closed
    "socket_timeout": 5.0, "socket_connect_timeout": 5.0, "retry": Retry(NoBackoff(), 1),
}  # fmt: skip


class RedisStore(FeatureStore):
    """A Redis server or cluster at `redis://[user:password@]host:port/db`, or `rediss://…` for TLS.

    Parameters of redis-py's connections may follow, as `?ssl_ca_certs=ca.pem&ssl_certfile=…&ssl_keyfile=…` or
    `socket_timeout=0.05` (seconds). The server's certificate and host name are checked.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._where = _without_secrets(url)
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

    def _write(self, ids: NDArray[np.int64], values: Mapping[str, Sequence[bytes]], mark: Mark | None) -> None:
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for rows, numbers in self._groups(ids):
                pairs: list[bytes] = []
                for space, column in values.items():
                    for key, row in zip(_keys(numbers, space), rows, strict=True):
                        pairs += (key, column[row])
                pipeline.execute_command("MSET", *pairs)
            pipeline.execute()
            if mark:  # only when all of it is there
                name, rows_done = mark
                if rows_done is None:
                    self._client.hdel(_MARKS, name)
                else:
                    self._client.hset(_MARKS, name, rows_done)

    def _delete(self, ids: NDArray[np.int64], spaces: Sequence[str]) -> None:
        with self._errors(), self._client.pipeline(transaction=False) as pipeline:
            for _, numbers in self._groups(ids):
                pipeline.execute_command("UNLINK", *(key for space in spaces for key in _keys(numbers, space)))
            pipeline.execute()

    def _drop(self, schema: Schema, marks: Sequence[str]) -> None:
        """Marks first and the schema last: at any interruption no load goes on, and a second drop does."""
        with self._errors():
            if marks:
                self._client.hdel(_MARKS, *marks)
            ids = np.fromiter(self._scan_ids(schema), np.int64)
            for start in range(0, len(ids), _DROPPED):
                self._delete(ids[start : start + _DROPPED], [schema.space, schema.texts])
            self._client.hdel(_SCHEMAS, schema.space)

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


@cache
def _heads(space: str) -> list[bytes]:
    return [b"%s{%d}:%s:" % (_PREFIX, bucket, space.encode()) for bucket in range(BUCKETS)]


def _keys(ids: list[int], space: str) -> list[bytes]:
    heads = _heads(space)
    return [heads[identity % BUCKETS] + b"%d" % identity for identity in ids]


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"
