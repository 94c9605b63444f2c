"""Versions, items and users for tests of feature stores; everything follows from an id."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import redis

from sightline.profile import DENSE, Profile
from sightline.store import Items, ItemSchema, UserRecord, UserSchema, open_store

OLD = ItemSchema(version="v1", captioner="caption-1", token_spec="spec-1", tokens=4)
NEW = ItemSchema(version="v2", captioner="caption-2", token_spec="spec-2", tokens=6, vector=3)
USERS = UserSchema(version="v1", token_spec="spec-1", profile=2, history=3)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sightline.store.transfer", "sightline.store.embedded", "sightline.store.server"])


@contextmanager
def elsewhere(location: str) -> Iterator[Callable[..., Any]]:
    """Call methods of a store that another process has opened, by name: LMDB is opened once per process."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(location, there))
    process.start()
    there.close()

    def call(method: str, *arguments: Any) -> Any:
        here.send((method, arguments))
        return here.recv()

    try:
        yield call
    finally:
        here.close()
        process.join()


def _serve(location: str, calls: Connection) -> None:
    with open_store(location) as store, suppress(EOFError):
        while True:
            method, arguments = calls.recv()
            calls.send(getattr(store, method)(*arguments))


def empty(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        kind = redis.RedisCluster if client.info("cluster")["cluster_enabled"] else redis.Redis
        with kind.from_url(url) as all_of_it:
            all_of_it.flushall()


def items(schema: ItemSchema, ids: list[int], *, generation: int = 0) -> Items:
    """Every second has a vector, every third no media; everything follows from id and generation."""
    numbers = np.array(ids)
    return Items(
        ids=numbers, tokens=(numbers[:, None] * 7 + np.arange(schema.tokens) + generation) % 1000 + 1,
        captions=[f"{schema.version}: Tasse № {one}, {generation}" for one in ids],
        media_hashes=[None if one % 3 == 0 else f"{one * 31 + generation:064x}" for one in ids],
        vectors=np.sin(numbers[:, None] + np.arange(schema.vector)),
        has_vector=(numbers % 2 == 0) & (schema.vector > 0),
    )  # fmt: skip


def user(identity: int, events: int) -> UserRecord:
    return UserRecord(
        id=identity,
        profile=Profile(
            tokens=np.array([identity, 0]), weights=np.array([0.5, 0], np.float32), negative_tokens=np.array([7, 9]),
            negative_weights=np.array([0.25, 0.125], np.float32), dense=np.arange(len(DENSE), dtype=np.float32),
        ),
        items=np.arange(events) + 2**40, strengths=np.linspace(-1, 1, events, dtype=np.float32),
        times=np.arange(events) + 1_700_000_000_000_000, state=bytes(range(identity % 50)),
    )  # fmt: skip
