"""Users that are read, changed and written back, by several processes at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import redis

from sightline.errors import DataError, StoreError
from sightline.store import UserRecord, open_store, server
from tests.feature_stores import PROCESSES, USERS, user


def increment(identity: int, record: UserRecord | None) -> UserRecord:
    """The state is a number, 0 where there is no user."""
    count = int.from_bytes(record.state, "little") if record else 0
    return dataclasses.replace(record or user(identity, 0), state=(count + 1).to_bytes(4, "little"))


def count(location: str, identity: int) -> int:
    with open_store(location) as store:
        record = store.read_user(identity, ["v1"]).record
    return int.from_bytes(record.state, "little") if record else 0


def test_update(location: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[int, UserRecord | None] = {}

    def update(identity: int, record: UserRecord | None) -> UserRecord | None:
        seen[identity] = record
        return None if identity == 3 else user(identity, 2)

    with open_store(location) as store:
        store.register(USERS)
        store.write_users("v1", [user(one, 1) for one in (1, 3, 70)])
        store._write(np.array([4]), {USERS.space: [b"short"]}, None)
        store.update_users("v1", [70, 2, 3, 4, 1], update)
        assert [len(record.items) if record else None for record in map(seen.get, (1, 2, 3, 4, 70))] == [
            1, None, 1, None, 1,
        ]  # fmt: skip
        assert "user.v1: user 4: expected" in caplog.text
        found = [store.read_user(identity, ["v1"]).record for identity in (1, 2, 3, 4, 70)]
        assert [len(record.items) if record else None for record in found] == [2, 2, 1, 2, 2]
        store.update_users("v1", [], update)
        with pytest.raises(StoreError, match=r"user\.v1: expected ids, each once; got \[1, 2, 1\]"):
            store.update_users("v1", [1, 2, 1], update)
        with pytest.raises(StoreError, match=r"user\.v7: expected a registered version"):
            store.update_users("v7", [1], update)
        with pytest.raises(DataError, match=r"user\.v1: expected user 1 from its update, got 2"):
            store.update_users("v1", [1], lambda identity, record: user(2, 0))
        with pytest.raises(DataError, match=r"user\.v1, user 2: expected at most 3 events"):
            store.update_users("v1", [1, 2], lambda identity, record: user(identity, 2 * identity))
        assert len(store.read_user(1, ["v1"]).record.items) == 2, "changed with another that could not be"


def _increment(location: str, times: int) -> None:
    with open_store(location) as store:
        for _ in range(times):
            store.update_users("v1", [1, 2], increment)


def test_processes_lose_no_update_of_each_other(location: str) -> None:
    with open_store(location) as store:
        store.register(USERS)
    processes = [PROCESSES.Process(target=_increment, args=(location, 200)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [count(location, identity) for identity in (1, 2)] == [400, 400]


def test_user_that_is_always_changed_by_others(lone_redis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_ATTEMPTS", 4)
    with open_store(lone_redis) as store, open_store(lone_redis) as other:
        store.register(USERS)
        store.write_users("v1", [user(1, 0), user(2, 0)])

        def beaten(identity: int, record: UserRecord | None) -> UserRecord:
            if identity == 2:
                other.update_users("v1", [2], increment)
            return increment(identity, record)

        before = [count(lone_redis, identity) for identity in (1, 2)]
        with pytest.raises(StoreError, match=r"user\.v1: user 2: expected to change it within 4 attempts"):
            store.update_users("v1", [1, 2], beaten)
    assert [count(lone_redis, identity) for identity in (1, 2)] == [before[0] + 1, before[1] + 4]


@pytest.mark.parametrize("location", ["lone_redis", "redis_nodes"], indirect=True)
def test_lost_answer_does_not_repeat_the_update(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks after the server did as told; redis-py sends the command again."""
    read, lost = redis.connection.Connection.read_response, []

    def read_response(connection: redis.connection.Connection, *arguments: Any, **options: Any) -> Any:
        answer = read(connection, *arguments, **options)
        if answer == 1 and not lost:
            lost.append(answer)
            connection.disconnect()
            raise redis.ConnectionError("reset")
        return answer

    with open_store(location) as store:
        store.register(USERS)
        store.write_users("v1", [user(1, 0)])
        before = count(location, 1)
        with monkeypatch.context() as patch:
            patch.setattr(redis.connection.Connection, "read_response", read_response)
            store.update_users("v1", [1], increment)
    assert lost
    assert count(location, 1) == before + 1
