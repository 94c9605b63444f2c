"""The Redis store against what only a server has: passwords, TLS, a cluster's slots, a server that dies."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.crc import key_slot

from benchmarks.redis_server import free_port
from sightline.errors import ConfigError, StoreError
from sightline.store import Items, ItemSchema, open_store, transfer
from sightline.store.server import BUCKETS, PASSWORD
from tests.feature_stores import USERS, user
from tests.redis_server import redis_cluster, redis_server

TLS = Path(__file__).parents[1] / "unit" / "tls"
SCHEMA = ItemSchema(version="v1", captioner="c", token_spec="t", tokens=4)


def items(first: int, last: int) -> Items:
    ids = np.arange(first, last)
    return Items(
        ids=ids, tokens=ids[:, None] + np.arange(4), captions=[f"item {one}" for one in ids],
        media_hashes=[None] * len(ids),
    )  # fmt: skip


def use(location: str) -> None:
    """Write and read something."""
    with open_store(location) as store:
        store.register(SCHEMA)
        store.write_items("v1", items(1, 100))
        assert store.read_items([5, 6], ["v1"]).tokens.tolist() == [[5, 6, 7, 8], [6, 7, 8, 9]]


def test_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server(tmp_path, password="s3cret") as (port, _):
        use(f"redis://:s3cret@127.0.0.1:{port}/0")
        with pytest.raises(StoreError, match=rf"redis://127\.0\.0\.1:{port}/0: .*authenticated"):
            use(f"redis://127.0.0.1:{port}/0")
        with pytest.raises(StoreError) as caught:
            use(f"redis://:wr0ng@127.0.0.1:{port}/0")
        assert "wr0ng" not in str(caught.value)
        monkeypatch.setenv(PASSWORD, "s3cret")
        use(f"redis://127.0.0.1:{port}/0")
        with redis.Redis(port=port, password="s3cret") as client:
            client.execute_command("ACL SETUSER", "ranker", "on", ">other", "~sightline:*", "+@all")
        use(f"redis://ranker:other@127.0.0.1:{port}/0")


@contextmanager
def tls_in_front_of(port: int) -> Iterator[int]:
    """Terminates TLS before a server, for clients with a certificate: Redis of wheels and of Debian 11 is without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem", TLS / "server.key")
    context.load_verify_locations(TLS / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve(plain: socket.socket) -> None:
        with plain, socket.create_connection(("127.0.0.1", port)) as server, suppress(OSError):
            plain.settimeout(20)
            with context.wrap_socket(plain, server_side=True) as client:
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("0.0.0.0", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for thread in (accepting, *threads):
        thread.join()


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority = f"ssl_ca_certs={TLS}/ca.pem"
    certificate = f"ssl_certfile={TLS}/client.pem&ssl_keyfile={TLS}/client.key"
    with redis_server(tmp_path, password="s3cret") as (plain, _), tls_in_front_of(plain) as port:
        use(f"rediss://:s3cret@127.0.0.1:{port}?{authority}&{certificate}")
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):  # of an authority that nobody knows
            use(f"rediss://:s3cret@127.0.0.1:{port}?{certificate}")
        with pytest.raises(StoreError, match="IP address mismatch"):
            use(f"rediss://:s3cret@127.0.0.2:{port}?{authority}&{certificate}")
        with pytest.raises(StoreError):  # the server asks for the client's certificate
            use(f"rediss://:s3cret@127.0.0.1:{port}?{authority}")
        with pytest.raises(StoreError):
            use(f"redis://:s3cret@127.0.0.1:{port}")


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"with parameters of redis-py: .*no_such_option"):
        open_store("redis://127.0.0.1:1?no_such_option=1")
    with pytest.raises(ConfigError, match=r"redis://127\.0\.0\.1:no/: expected redis://host:port/db"):
        open_store("redis://127.0.0.1:no/")
    with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1: expected a Redis server that answers: .*refused"):
        open_store("redis://:s3cret@127.0.0.1:1")


def test_keys_of_one_id_share_a_slot_and_nodes_share_the_work(tmp_path: Path) -> None:
    newer = SCHEMA.model_copy(update={"version": "v2"})
    with redis_cluster(tmp_path) as port, open_store(f"redis://127.0.0.1:{port}") as store:
        for schema in (SCHEMA, newer):
            store.register(schema)
            store.write_items(schema.version, items(1, 1001))
        store.write_captions("c", {f"{one * 2**246:064x}": "Tasse" for one in range(1000)})
        store.register(USERS)
        store.update_users("v1", range(1, 200), lambda identity, record: user(identity, 1))
        with redis.RedisCluster("127.0.0.1", port) as client:
            keys = [key for key in client.keys(target_nodes="primaries") if b":item." in key]
            others = [key for key in client.keys(target_nodes="primaries") if b":caption." in key or b":user." in key]
            sizes = [client.dbsize(target_nodes=node) for node in client.get_primaries()]
    slots: dict[bytes, set[int]] = {}
    for key in keys:
        slots.setdefault(key.rpartition(b":")[2], set()).add(key_slot(key))
    assert len(keys) == 4 * 1000  # record and caption, two versions
    assert all(len(of_one_id) == 1 for of_one_id in slots.values())
    assert len(set.union(*slots.values())) == BUCKETS
    assert min(sizes) > 0.3 * sum(sizes)
    assert len(others) == 1000 + 199
    assert {key_slot(key) for key in others} == set.union(*slots.values())


def test_nobody_hears_of_a_change_before_it_is_on_all_nodes(tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as port, open_store(f"redis://127.0.0.1:{port}") as store:
        store.register(SCHEMA)
        store.write_items("v1", items(1, 101))  # connects to both nodes
        position, _ = store.changes(-1)
        with redis.RedisCluster("127.0.0.1", port) as client:
            (slow,) = {one.port for one in client.get_primaries()} - {client.get_node_from_key("{meta}").port}
        writer = threading.Thread(target=store.write_items, args=("v1", items(1, 1001)))
        with redis.Redis(port=slow) as node:
            node.client_pause(400)
            writer.start()
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                assert store.changes(position)[1].tolist() == []
        writer.join()
        assert len(store.changes(position)[1]) == 1000


def test_killed_server_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Nor does the log of changes."""
    port, acknowledged, position = free_port(), 0, None
    for _ in range(3):
        with redis_server(tmp_path, port=port) as (_, process), open_store(f"redis://127.0.0.1:{port}") as store:
            store.register(SCHEMA)
            assert store.count(SCHEMA) >= acknowledged
            if position is None:
                store.delete(SCHEMA, [1])
                position, _ = store.changes(-1)
            killer = threading.Timer(0.15, os.kill, (process, signal.SIGKILL))
            killer.start()
            with suppress(StoreError):
                while True:
                    store.write_items("v1", items(acknowledged + 1, acknowledged + 101))
                    acknowledged += 100
            killer.join()
    with redis_server(tmp_path, port=port), open_store(f"redis://127.0.0.1:{port}") as store:
        report = transfer.verify(store, SCHEMA, lambda rows: None)
        assert report.damaged == {}
        assert report.records >= acknowledged > 300
        assert not store.read_items(np.arange(1, acknowledged + 1), ["v1"]).status.any()
        _, changed = store.changes(position)
        assert np.array_equal(changed, np.arange(1, report.records + 1))


def test_durability_is_shown(tmp_path: Path) -> None:
    with redis_server(tmp_path) as (port, _), open_store(f"redis://127.0.0.1:{port}") as store:
        shown = store.describe()
        assert (shown["appendonly"], shown["appendfsync"], shown["maxmemory_policy"]) == ("yes", "always", "noeviction")
        assert not shown["cluster"]
