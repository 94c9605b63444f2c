"""The queue on a server: a Redis stream with a consumer group, on a lone server or in one slot of a cluster.

    sightline:{nearline}:events    stream: key, media; taken ones are pending in the group `workers`
    sightline:{nearline}:known     hash, key → entry: equal events collapse
    sightline:{nearline}:later     sorted set, entry → ms since 1970 before which it is not tried again
    sightline:{nearline}:notes     hash, entry → history (`Note`) as JSON
    sightline:{nearline}:bytes     of the media in the stream
    sightline:{nearline}:dead, …:dead_media, …:marks     hashes

Every change is one script, so nothing is half done at any crash; all times are the server's. An entry leaves the
stream when it is done, so the stream's length is the bound's count (MAXLEN would throw away the oldest events, which
the bound refuses to). Needs Redis 6.2 or later. What was accepted is as durable as the server is set to be.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from sightline.errors import StoreError
from sightline.queue.base import Bounds, DeadLetter, ItemEvent, ItemQueue, Note, Offer, Stats, Taken, parse_key
from sightline.store.server import RedisStore

__all__ = ["RedisQueue"]

_KEYS = [f"sightline:{{nearline}}:{name}"
         for name in ("events", "known", "later", "notes", "bytes", "dead", "dead_media", "marks")]  # fmt: skip
EVENTS, _, _, NOTES, _, DEAD, _, MARKS = _KEYS
GROUP = "workers"
R = TypeVar("R")
_BLOCK = 0.25  # seconds that a read waits at the server, after which retries and silent takers are looked at again

_NAMES = """
local events, known, later, notes, bytes, dead, dead_media = unpack(KEYS)
local function now() local t = redis.call('TIME'); return t[1] * 1000 + math.floor(t[2] / 1000) end
local function add(key, media)
  redis.call('HSET', known, key, redis.call('XADD', events, '*', 'key', key, 'media', media))
  redis.call('INCRBY', bytes, #media)
end
local function held(id, taker)
  local found = redis.call('XPENDING', events, 'workers', id, id, 1)
  return found[1] and found[1][2] == taker
end
local function forget(id)
  local entry = redis.call('XRANGE', events, id, id)[1]
  if not entry then return end
  redis.call('XACK', events, 'workers', id)
  redis.call('XDEL', events, id)
  redis.call('ZREM', later, id)
  redis.call('HDEL', notes, id)
  redis.call('HDEL', known, entry[2][2])
  redis.call('DECRBY', bytes, #entry[2][4])
  return entry[2]
end
local function exhume(key)
  local media = redis.call('HGET', dead_media, key)
  redis.call('HDEL', dead, key)
  redis.call('HDEL', dead_media, key)
  return media
end
"""
_OFFER = """
local key, media, most, most_bytes = unpack(ARGV)
if redis.call('HEXISTS', known, key) == 1 then return 'known' end
local full = redis.call('XLEN', events) + 1 > tonumber(most)
if full or (redis.call('GET', bytes) or 0) + #media > tonumber(most_bytes) then return 'full' end
add(key, media)
return 'queued'
"""
_DUE = """
local ids = redis.call('ZRANGEBYSCORE', later, '-inf', now(), 'LIMIT', 0, ARGV[2])
if #ids == 0 then return {} end
redis.call('ZREM', later, unpack(ids))
local claim = {'XCLAIM', events, 'workers', ARGV[1], 0, unpack(ids)}
claim[#claim + 1] = 'FORCE'
return redis.call(unpack(claim))
"""
_LATER = """
local id, taker, note, delay = unpack(ARGV)
if not held(id, taker) then return end
redis.call('XACK', events, 'workers', id)
redis.call('HSET', notes, id, note)
redis.call('ZADD', later, now() + delay, id)
"""
_DONE = "forget(ARGV[1])"
_DIE = """
local id, taker, note = unpack(ARGV)
if not held(id, taker) then return end
local entry = forget(id)
if not entry then return end
redis.call('HSET', dead, entry[2], note)
redis.call('HSET', dead_media, entry[2], entry[4])
"""
_REVIVE = """
local media = exhume(ARGV[1])
if media and redis.call('HEXISTS', known, ARGV[1]) == 0 then add(ARGV[1], media) end
"""
_DROP = "exhume(ARGV[1])"
_STATS = """
local first = redis.call('XRANGE', events, '-', '+', 'COUNT', 1)[1]
return {redis.call('XLEN', events), redis.call('XPENDING', events, 'workers')[1], redis.call('HLEN', dead),
        redis.call('GET', bytes) or '0', first and now() - string.match(first[1], '%d+') or 0}
"""


class RedisQueue(ItemQueue):
    """A queue at `redis://[user:password@]host:port/db`; addresses and options are those of `RedisStore`."""

    def __init__(self, url: str, bounds: Bounds | None = None) -> None:
        super().__init__(bounds)
        self._server = RedisStore(url)  # which knows how to reach a server, and says what is wrong with it
        self._client, self._errors = self._server._client, self._server._errors
        self._taker = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._cursor: bytes | str = "0-0"
        self._make_group()

    def close(self) -> None:
        self._server.close()

    def offer(self, event: ItemEvent) -> Offer:
        answer = self._run(_OFFER, event.key, event.media, self.bounds.events, self.bounds.media_bytes)
        return Offer(answer.decode())

    def take(self, count: int, wait_seconds: float = 0.0) -> list[Taken]:
        until = time.monotonic() + wait_seconds
        while True:
            left = until - time.monotonic()
            found = self._with_group(partial(self._take, count, min(left, _BLOCK)))
            if found or left <= _BLOCK:
                return found

    def _take(self, count: int, wait_seconds: float) -> list[Taken]:
        with self._errors():
            rows = [(entry, dict(zip(row[::2], row[1::2], strict=True)))
                    for entry, row in self._run(_DUE, self._taker, count)]  # fmt: skip
            if len(rows) < count:
                idle = int(self.bounds.lease_seconds * 1000)
                self._cursor, silent, *_ = self._client.xautoclaim(
                    EVENTS, GROUP, self._taker, idle, self._cursor, count - len(rows)
                )
                rows += [row for row in silent if row[1]]  # without those that are done
            if len(rows) < count:
                block = max(int(wait_seconds * 1000), 1) if not rows and wait_seconds > 0 else None
                answer = self._client.xreadgroup(GROUP, self._taker, {EVENTS: ">"}, count - len(rows), block)
                rows += [row for _, entries in answer or [] for row in entries]
            return self._noted(rows)

    def _noted(self, rows: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Taken]:
        if not rows:
            return []
        ids = [entry for entry, _ in rows]
        notes = [Note.parse(text, NOTES) if text else Note() for text in self._client.hmget(NOTES, ids)]
        notes = [note.and_(takes=note.takes + 1) for note in notes]
        self._client.hset(NOTES, mapping=dict(zip(ids, (note.model_dump_json() for note in notes), strict=True)))
        found = []
        for (entry, row), note in zip(rows, notes, strict=True):
            digest, item, _ = parse_key(row[b"key"].decode())
            event = ItemEvent(item_id=item, media=row[b"media"], media_hash=digest)
            found.append(Taken(event=event, note=note, put_at=int(entry.split(b"-")[0]) / 1000, handle=entry))
        return found

    def renew(self, taken: Sequence[Taken]) -> None:
        if taken:
            with self._errors():
                self._client.xclaim(EVENTS, GROUP, self._taker, 0, [one.handle for one in taken], justid=True)

    def done(self, taken: Taken) -> None:
        self._run(_DONE, taken.handle)

    def retry(self, taken: Taken, reason: str, *, delay: float = 0.0) -> None:
        note = taken.note.and_(attempts=taken.note.attempts + 1, reason=reason, at=time.time())
        self._run(_LATER, taken.handle, self._taker, note.model_dump_json(), int(delay * 1000))

    def put_back(self, taken: Taken) -> None:
        note = taken.note.and_(takes=taken.note.takes - 1)
        self._run(_LATER, taken.handle, self._taker, note.model_dump_json(), 0)

    def dead(self, taken: Taken, reason: str) -> None:
        note = taken.note.and_(attempts=taken.note.attempts + 1, reason=reason, at=time.time())
        self._run(_DIE, taken.handle, self._taker, note.model_dump_json())

    def stats(self) -> Stats:
        events, taken, dead, size, age = map(int, self._run(_STATS))
        return Stats(
            waiting=events - taken, taken=taken, dead=dead, media_bytes=size, oldest_seconds=max(age, 0) / 1000
        )

    def dead_letters(self) -> list[DeadLetter]:
        with self._errors():
            found = self._client.hgetall(DEAD)
        letters = [DeadLetter.of(key.decode(), Note.parse(note, DEAD)) for key, note in found.items()]
        return sorted(letters, key=lambda letter: letter.note.at)

    def revive(self, letter: DeadLetter) -> None:
        self._run(_REVIVE, letter.key)

    def drop(self, letter: DeadLetter) -> None:
        self._run(_DROP, letter.key)

    def mark(self, name: str) -> int:
        with self._errors():
            return int(self._client.hget(MARKS, name) or 0)

    def set_mark(self, name: str, rows: int | None) -> None:
        with self._errors():
            if rows is None:
                self._client.hdel(MARKS, name)
            else:
                self._client.hset(MARKS, name, rows)

    def _make_group(self) -> None:
        try:
            with self._errors():
                self._client.xgroup_create(EVENTS, GROUP, id="0", mkstream=True)
        except StoreError as error:
            if not str(error.__cause__).startswith("BUSYGROUP"):  # it is there already
                raise

    def _with_group(self, act: Callable[[], R]) -> R:
        """Makes the group where a server came back empty."""
        try:
            return act()
        except StoreError as error:
            if "NOGROUP" not in str(error.__cause__):
                raise
        self._make_group()
        return act()

    def _run(self, script: str, *arguments: Any) -> Any:
        def run() -> Any:
            with self._errors():
                return self._client.eval(_NAMES + script, len(_KEYS), *_KEYS, *arguments)

        return self._with_group(run)
