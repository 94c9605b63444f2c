"""How much longer does the feature store take to answer than the database under it takes to hand out bytes?

Why: ranking reads some 500 items and one user per request; what the store adds (schemas, checks, versions, arrays)
    must stay small beside the database itself.
Regime: one process, one thread; ids drawn anew for every run from a store that is in memory or in the page cache; items
    with 32 tokens, without a vector and with one of float16; Redis alone, without TLS, on this machine.
Floors: what no store on that database can beat, records of the same bytes under the shortest keys, keys made before
    the clock starts, nothing checked or decoded; each returns bytes.
    LMDB get         one read transaction, a cursor's get per key, each value copied
    LMDB get, views  the same with buffers=True, the views joined at the end
    Redis MGET       one command through a socket and hiredis's packer and parser, no client
    The store returns arrays: `read_items`, or `read_user` for one user, from ids on, with the newest of one version.
Method: ways take turns in turning order on the same ids, the first runs left out; medians and 99th percentiles (below
    100 runs, the slowest); ratios of medians. Garbage collection is on, but passes over what was there before the runs.
    Shared machines are noisy: compare within a report.
"""

from __future__ import annotations

import argparse
import gc
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hiredis
import lmdb
import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import describe
from benchmarks.redis_server import MISSING, PROGRAM, run_redis
from sightline.errors import ConfigError
from sightline.profile import DENSE, Profile
from sightline.store import FeatureStore, Items, ItemSchema, Schema, UserRecord, UserSchema, open_store

GET, VIEWS, MGET = "LMDB get", "LMDB get, views", "Redis MGET"
STORES = {"LMDB store": (GET, VIEWS), "Redis store": (MGET,)}
"""Way → the floors that it stands on."""
TOKENS, PROFILE, HISTORY, BATCH, WARM = 32, 24, 100, 4096, 5
MAP_BYTES, RECEIVE = 1 << 34, 1 << 16

Way = Callable[[NDArray[np.int64]], Callable[[], Any]]
"""Ids int64 [N] → the read to time, its keys made."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """What to measure. The defaults take about half a minute on two cores."""

    items: int = 50_000
    users: int = 5000
    keys: Sequence[int] = (500, 4096)
    vectors: Sequence[int] = (0, 512)
    runs: int = 300
    """Counted ones."""

    def __post_init__(self) -> None:
        for name, low, high in (("items", 1, 10**7), ("users", 1, 10**7), ("runs", 1, 10**6)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected {low} to {high}")
        for name, low, high in (("keys", 1, self.items), ("vectors", 0, 65_536)):
            if any(not low <= value <= high for value in getattr(self, name)):
                raise ConfigError(f"--{name}: got {list(getattr(self, name))}, expected numbers from {low} to {high}")


def generate(schema: ItemSchema, count: int) -> Items:
    """Items 1 to `count`, seeded; every one has a vector where the schema has."""
    rng = np.random.default_rng(0)
    return Items(
        ids=np.arange(1, count + 1), tokens=rng.integers(1, 4096, (count, TOKENS)),
        captions=[f"caption of item {item}" for item in range(1, count + 1)], media_hashes=[None] * count,
        vectors=rng.normal(size=(count, schema.vector)).astype(np.float16) if schema.vector else None,
    )  # fmt: skip


def generate_users(count: int) -> list[UserRecord]:
    """Users 1 to `count`, seeded, with full lists and histories."""
    rng = np.random.default_rng(0)

    def tokens() -> NDArray[np.int64]:
        return rng.integers(1, 4096, PROFILE)

    def weights(length: int) -> NDArray[np.float32]:
        return rng.uniform(size=length).astype(np.float32)

    return [
        UserRecord(
            id=user, items=rng.integers(1, 50_000, HISTORY), times=np.arange(HISTORY), strengths=weights(HISTORY),
            profile=Profile(
                tokens=tokens(), weights=weights(PROFILE), negative_tokens=tokens(),
                negative_weights=weights(PROFILE), dense=weights(len(DENSE)),
            ),
        )
        for user in range(1, count + 1)
    ]  # fmt: skip


def fill(store: FeatureStore, schema: Schema, count: int) -> None:
    """Register the schema and write that many items or users of it."""
    store.register(schema)
    if schema.kind == "user":
        store.write_users(schema.version, generate_users(count))
        return
    items = generate(schema, count)
    for start in range(0, count, BATCH):
        part = {name: None if all_of_it is None else all_of_it[start : start + BATCH]
                for name, all_of_it in vars(items).items()}  # fmt: skip
        store.write_items(schema.version, Items(**part))


def through_store(store: FeatureStore, schema: Schema) -> Way:
    """The store's own read: an ItemBatch, or a UserRead of the first id."""
    accept = [schema.version]
    if schema.kind == "user":
        return lambda ids: lambda user=int(ids[0]): store.read_user(user, accept)
    return lambda ids: lambda: store.read_items(ids, accept)


def bare_lmdb(environment: lmdb.Environment, store: FeatureStore, schema: Schema, *, views: bool) -> Way:
    """LMDB's own get on a copy of the store's records; list of bytes, or all of them joined from views."""
    database = environment.open_db(schema.space.encode())
    with environment.begin(write=True) as txn, txn.cursor(database) as cursor:
        for rows in store.scan(schema):
            cursor.putmulti([(identity.to_bytes(8, "big"), record) for identity, record, _ in rows])

    def way(ids: NDArray[np.int64]) -> Callable[[], Any]:
        keys = ids.astype(">i8").view("V8").tolist()

        def read() -> list[bytes] | bytes:
            with environment.begin(buffers=views) as txn, txn.cursor(database) as cursor:
                values = map(cursor.get, keys)
                return b"".join(values) if views else list(values)

        return read

    return way


def bare_redis(connection: socket.socket, store: FeatureStore, schema: Schema) -> Way:
    """MGET on a copy of the store's records; list of bytes."""
    parser, head = hiredis.Reader(), b"%d:" % schema.checksum

    def ask(*command: bytes) -> Any:
        connection.sendall(hiredis.pack_command(command))
        while (answer := parser.gets()) is False:
            parser.feed(connection.recv(RECEIVE))
        return answer

    for rows in store.scan(schema):
        ask(b"MSET", *(part for identity, record, _ in rows for part in (head + b"%d" % identity, record)))

    def way(ids: NDArray[np.int64]) -> Callable[[], Any]:
        keys = [head + b"%d" % identity for identity in ids.tolist()]
        return lambda: ask(b"MGET", *keys)

    return way


class Contenders:
    """Filled stores, the floors under them, and where they are kept until `close`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.skipped: list[str] = []
        self.versions = {name: version(name) for name in ("lmdb", "redis", "hiredis")}
        self._stores: dict[str, FeatureStore] = {}
        for name in ("store", "floor", "redis"):
            (folder / name).mkdir()
        self._stores["LMDB store"] = stack.enter_context(open_store(str(folder / "store")))
        self._floor = stack.enter_context(closing(lmdb.open(str(folder / "floor"), map_size=MAP_BYTES, max_dbs=64)))
        if PROGRAM is None:
            self.skipped.append(f"Redis: {MISSING}")
            return
        port, _ = stack.enter_context(run_redis(folder / "redis", "--appendonly", "no"))
        redis_store = stack.enter_context(open_store(f"redis://127.0.0.1:{port}"))
        self._stores["Redis store"] = redis_store
        self.versions["redis-server"] = redis_store.describe()["redis_version"]
        self._connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ways(self, schema: Schema, count: int) -> dict[str, Way]:
        """All ways to read records of the schema, which are written first."""
        found: dict[str, Way] = {}
        for name, store in self._stores.items():
            fill(store, schema, count)
            if name == "LMDB store":
                found[GET] = bare_lmdb(self._floor, store, schema, views=False)
                found[VIEWS] = bare_lmdb(self._floor, store, schema, views=True)
            else:
                found[MGET] = bare_redis(self._connection, store, schema)
            found[name] = through_store(store, schema)
        return found


def measure(ways: dict[str, Way], count: int, keys: int, runs: int) -> dict[str, dict[str, float]]:
    """Way → microseconds per read of that many of `count` ids: median, p99."""
    rng = np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    gc.collect()
    gc.freeze()
    for run in range(WARM + runs):
        ids = rng.choice(count, keys, replace=False) + 1
        for name in names[run % len(names) :] + names[: run % len(names)]:
            read = ways[name](ids)
            start = time.perf_counter()
            found = read()
            stop = time.perf_counter()
            del found
            if run >= WARM:
                taken[name].append((stop - start) * 1e6)
    gc.unfreeze()
    return {
        name: {"median": round(float(np.median(times)), 1),
               "p99": round(float(np.percentile(times, 99, method="higher")), 1)}
        for name, times in taken.items()
    }  # fmt: skip


def bench(options: StoreOptions, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """All measurements; the JSON document."""
    began, record = time.monotonic(), describe()
    plans: list[tuple[Schema, int, Sequence[int]]] = [
        (ItemSchema(version=f"v{size}", captioner="none", token_spec="none", tokens=TOKENS, vector=size),
         options.items, options.keys)
        for size in options.vectors
    ]  # fmt: skip
    plans.append((UserSchema(version="v0", token_spec="none", profile=PROFILE, history=HISTORY), options.users, (1,)))
    reads = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contenders = Contenders(Path(folder), stack)
        for schema, count, sizes in plans:
            ways = contenders.ways(schema, count)
            for keys in sizes:
                taken = measure(ways, count, keys, options.runs)
                over = {
                    name: {floor: round(taken[name]["median"] / taken[floor]["median"], 2) for floor in floors}
                    for name, floors in STORES.items() if name in taken
                }  # fmt: skip
                reads.append({
                    "kind": schema.kind, "keys": keys, "vector": schema.vector if schema.kind == "item" else None,
                    "record_bytes": schema.record.itemsize, "us": taken, "store_over": over,
                })  # fmt: skip
                progress(table(reads[-1]))
    for line in contenders.skipped:
        progress(f"left out: {line}")
    record["versions"] |= contenders.versions
    return {
        "benchmark": "store", **record, "items": options.items, "users": options.users, "runs": options.runs,
        "reads": reads, "skipped": contenders.skipped, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(read: dict[str, Any]) -> str:
    """One read's Markdown table."""
    what = f"{read['keys']:,} items, V = {read['vector']}" if read["kind"] == "item" else "1 user"
    lines = [
        f"{what}, {read['record_bytes']:,} bytes each",
        "",
        "| way | median µs | p99 µs | store is × |",
        "|---|--:|--:|--:|",
    ]
    for name, taken in read["us"].items():
        ratios = ", ".join(f"{ratio:.2f} of {floor}" for floor, ratio in read["store_over"].get(name, {}).items())
        lines.append(f"| {name} | {taken['median']:,.1f} | {taken['p99']:,.1f} | {ratios} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """The question and the tables to stderr; the JSON document is the last line of stdout."""
    assert __doc__ is not None
    default = StoreOptions()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__.partition("\n")[0])
    for name in ("items", "users", "runs"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    for name in ("keys", "vectors"):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=getattr(default, name), metavar="N")
    options = StoreOptions(**vars(parser.parse_args(argv)))
    print(__doc__.strip(), end="\n\n", file=sys.stderr)
    document = bench(options, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
