"""Ten minutes of the item path near its limit, while the store changes under it.

Question: at 70 % of the rate that `rank_items` can sustain, does every request get its answer, does the last minute's
    99th percentile look like the first one's, and does no process grow?
Regime: one machine, shared by server and clients; the catalogue, the ranker and the open-loop generator of `make
    bench-hot`, one user and 500 items per request; a real server of all models, watched as `sightline serve` does it; a
    process beside it that rewrites items and applies interaction events, 100 of each per second.
Method: the capacity by bisection (99 % within 10 ms) with the updates going on; then minutes at 70 % of it, latencies
    from the time that a request was due. Memory is what a process has for itself (RssAnon of proc(5)): pages of the
    store's file, which come and go with the page cache, are not counted. At the end, served scores are held against
    the plain work on the store as the updates left it.

    python -m benchmarks.soak [--minutes 10]      the last line of stdout is JSON; exit code 1: a bound was broken
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import count
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import describe
from benchmarks.hot import data, wire
from benchmarks.hot.load import Line, Load, Window
from benchmarks.hot.search import capacity
from benchmarks.hot.servers import TOLERANCE
from benchmarks.hot.work import Plain
from benchmarks.program import add_options, run, say
from serving.supervisor import Supervision, model_processes
from serving.triton import TritonServer
from sightline.errors import ConfigError, ServingError
from sightline.events import Event, EventRules, Outcome, apply
from sightline.store import FeatureStore, Items, open_store

P99_RATIO, GROWTH, GROWTH_MB = 1.5, 0.05, 16.0
"""Bounds: of a minute's p99 over the first one's; of a process's growth, whichever of the two is more."""
_BATCHES = 10  # of updates per second
_COMPARED = 16  # requests at the end
_EVENTS = 16  # of each user before the start


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    minutes: int = 10
    share: float = 0.7
    """Of the capacity."""
    limit: float = 10.0
    """Milliseconds that the 99th percentile may have where the capacity is measured."""
    items: int = 10_000
    users: int = 2000
    candidates: int = 500
    updates: int = 100
    """Items per second that are rewritten, and events per second that are applied."""
    seconds: float = 60.0
    """Length of a minute; less only to try this out."""
    out: Path = Path("artifacts/bench/soak")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("minutes", 2, 10_000), ("share", 0.01, 1.0), ("limit", 0.1, 10_000), ("seconds", 1, 60),
            ("items", 10, 10**7), ("users", 1, 10**7), ("candidates", 1, 4096), ("updates", _BATCHES, 100_000),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class Minute:
    """What one minute came to."""

    window: Window
    memory_mb: dict[str, float]
    """At its end, of the server and of each model's processes together."""
    updates: int
    """Items and events together."""


def judge(minutes: Sequence[Minute], *, restarts: float, difference: float) -> list[str]:
    """The bounds that were broken, one line each.

    Args:
        restarts: models that the supervisor had to bring back.
        difference: of served scores to the plain work's, after the updates.
    """
    broken = []
    first, last = minutes[0], minutes[-1]
    for number, minute in enumerate(minutes, 1):
        window = minute.window
        if window.failed:
            broken.append(f"minute {number}: {window.failed} of {window.requests} requests failed")
        if not window.p99 <= P99_RATIO * first.window.p99:
            broken.append(f"minute {number}: p99 is {window.p99:.2f} ms, {window.p99 / first.window.p99:.2f} of the "
                          f"first minute's; expected at most {P99_RATIO}")  # fmt: skip
        if not minute.updates:
            broken.append(f"minute {number}: the store was not updated")
    if not math.isfinite(first.window.p99):
        broken.append("minute 1: more than one request in a hundred was not answered in time")
    for name, before in first.memory_mb.items():
        grown = last.memory_mb.get(name, math.inf) - before
        if grown > max(GROWTH * before, GROWTH_MB):
            broken.append(f"{name}: grew by {grown:.1f} MB from {before:.1f} MB")
    if restarts:
        broken.append(f"{restarts:.0f} models had to be restarted")
    if not difference <= TOLERANCE:
        broken.append(f"scores differ by {difference:.1e} from the plain work's, expected at most {TOLERANCE:g}")
    return broken


def memory_mb(server: TritonServer) -> dict[str, float]:
    """Anonymous memory of the server, and of the processes of each model together, in MB (10^6 bytes)."""
    sums: Counter[str] = Counter({"tritonserver": _anonymous(server.pid)})
    for model, process in model_processes(server.pid):
        sums[model] += _anonymous(process.pid)
    return {name: round(size / 1e6, 1) for name, size in sorted(sums.items())}


def _anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ServingError(f"process {pid} has ended")


@contextmanager
def updates(server: TritonServer, options: SoakOptions) -> Iterator[Synchronized[int]]:
    """A process that keeps changing the server's store; yields the number of items and events that it has written.

    Raises ServingError at the end if the process failed.
    """
    spawn = multiprocessing.get_context("spawn")
    stop, written = spawn.Event(), spawn.Value("q", 0)
    arguments = (server.store, server.release_dir, options.items, options.users, options.updates, stop, written)
    process = spawn.Process(target=_update, args=arguments, name="updates", daemon=True)
    process.start()
    try:
        yield written
    finally:
        stop.set()
        process.join(30)
        process.kill()
        process.join()
    if process.exitcode:
        raise ServingError(f"the updates ended with code {process.exitcode}; its traceback is above")


def _update(
    location: str, release: Path, items: int, users: int, per_second: int, stop: Flag, written: Synchronized[int]
) -> None:
    rng, size = np.random.default_rng(7), per_second // _BATCHES
    with open_store(location) as store:
        rules, accept = _rules(release, store)
        version, due = rules.versions.items.version, time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            due += 1 / _BATCHES
            ids = rng.choice(items, size, replace=False) + 1
            looks = store.read_items(rng.permutation(ids), [version]).tokens  # each gets another one's look
            store.write_items(
                version, Items(ids=ids, tokens=looks, captions=["changed"] * size, media_hashes=[None] * size)
            )
            _meet(store, rules, accept, rng.integers(1, users + 1, size), ids, rng)
            with written.get_lock():
                written.value += 2 * size


def _rules(release: Path, store: FeatureStore) -> tuple[EventRules, list[str]]:
    """How the release takes events, and the item versions that it accepts."""
    rules = EventRules.read(release / "model_repository" / "events" / "1")
    return rules, rules.versions.accept(store)


def _meet(
    store: FeatureStore, rules: EventRules, accept: list[str], users: NDArray[np.int64], items: NDArray[np.int64],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Apply an event per user and item [N], now."""
    now = time.time_ns() // 1000
    strengths = rng.uniform(-1, 1, len(users)).astype(np.float32)
    events = [
        Event(user_id=int(user), item_id=int(item), strength=float(strength), time=now + row)
        for row, (user, item, strength) in enumerate(zip(users, items, strengths, strict=True))
    ]
    outcomes = apply(store, events, items=accept, users=rules.versions.users.version, affinities=rules.affinities)
    if Outcome.damaged in outcomes:
        raise ServingError(f"{outcomes.count(Outcome.damaged)} of {len(events)} events were not applied")


def populate(location: str, release: Path, items: int, users: int) -> None:
    """Users whose profiles can go on: the generated ones have no history behind them."""
    rng, ids = np.random.default_rng(8), np.arange(1, users + 1)
    with open_store(location) as store:
        rules, accept = _rules(release, store)
        store.delete(rules.versions.users, ids.tolist())
        for _ in range(_EVENTS):
            _meet(store, rules, accept, ids, rng.integers(1, items + 1, users), rng)


class Soak:
    """One run."""

    def __init__(self, options: SoakOptions) -> None:
        self.options = options

    def run(self) -> dict[str, Any]:
        o, record = self.options, describe()
        self.folder = o.out / "data" / f"{o.items}-{o.users}"
        data.prepare(self.folder, o.items, o.users, say)
        self.requests = data.requests(o.items, o.users, o.candidates)
        # Its own store, since it changes; the release's features are loaded into it.
        store = o.out / "store"
        shutil.rmtree(store, ignore_errors=True)
        supervision = Supervision()
        with TritonServer(
            data.release(self.folder), store=str(store), supervision=supervision, log_path=o.out / "triton.log",
            progress=say,
        ) as server:  # fmt: skip
            host, _, port = server.http_url.partition(":")
            contents = [wire.http("kserve", wire.KSERVE_PATH, request) for request in self.requests]
            self.load = Load((host, int(port)), contents)
            say(f"{o.users:,} users meet items")
            populate(server.store, server.release_dir, o.items, o.users)
            self.load.warm_up()
            with updates(server, o) as written:
                highest = self._capacity()
                rate = o.share * highest
                say(f"capacity {highest:,.0f} requests/s with p99 within {o.limit:g} ms; soaking at {rate:,.0f}")
                minutes = [self._minute(server, rate, number, written) for number in range(o.minutes)]
            difference = self._difference(server)
            restarts = supervision.metrics.value("sightline_supervisor_restarts_total")
        broken = judge(minutes, restarts=restarts, difference=difference)
        say("\n" + table(minutes))
        growth = {
            name: round(minutes[-1].memory_mb.get(name, math.nan) - size, 1)
            for name, size in minutes[0].memory_mb.items()
        }
        worst = max(minute.window.p99 for minute in minutes)
        return {
            "benchmark": "soak", "at": datetime.now().astimezone().isoformat(timespec="seconds"), **record,
            **asdict(o) | {"out": str(o.out)}, "capacity": round(highest, 1), "rate": round(rate, 1),
            "requests": sum(minute.window.requests for minute in minutes),
            "failed": sum(minute.window.failed for minute in minutes),
            "p99_first_ms": minutes[0].window.p99, "p99_worst_ms": worst, "p99_last_ms": minutes[-1].window.p99,
            "p99_worst_over_first": round(worst / minutes[0].window.p99, 2),
            "updated": sum(minute.updates for minute in minutes), "memory_mb": minutes[-1].memory_mb,
            "growth_mb": growth, "restarts": restarts, "difference": difference, "broken": broken,
        }  # fmt: skip

    def _capacity(self) -> float:
        seeds = count(1000)

        def meets(rate: float) -> bool:
            """A rate gets a second chance: a stall of the machine is not the server's."""
            for _ in range(2):
                try:
                    window = self.load.run(rate, 2.5, seed=next(seeds), limit=self.options.limit)
                except ServingError:  # still busy with what came before
                    continue
                if window.p99 <= self.options.limit and not window.failed:
                    return True
            return False

        found = capacity(meets, 0.6 * self.load.saturate(1.0))
        if not found:
            raise ServingError(
                f"no rate has a 99th percentile within {self.options.limit:g} ms; run this on a machine with nothing "
                "else to do, or give --limit"
            )
        return found

    def _minute(self, server: TritonServer, rate: float, number: int, written: Synchronized[int]) -> Minute:
        before = written.value
        window = self.load.run(rate, self.options.seconds, seed=number)
        minute = Minute(window=window, memory_mb=memory_mb(server), updates=written.value - before)
        say(f"minute {number + 1}: {window.per_s:,.0f} requests/s, {window.failed} failed, p99 {window.p99:.2f} ms, "
            f"{sum(minute.memory_mb.values()):,.0f} MB, {minute.updates} updates")  # fmt: skip
        return minute

    def _difference(self, server: TritonServer) -> float:
        """Largest one of served scores to those of the plain work on the same store, which nobody changes now."""
        compared = self.requests[:_COMPARED]
        with open_store(server.store) as store, closing(Line(self.load.address)) as line:
            work = Plain(self.folder, store)
            return max(
                float(np.abs(
                    wire.answer("kserve", line.ask(wire.http("kserve", wire.KSERVE_PATH, one))).scores
                    - work(*one).scores
                ).max())
                for one in compared
            )  # fmt: skip


def table(minutes: Sequence[Minute]) -> str:
    """Markdown: a row per minute."""
    lines = [
        "| minute | requests/s | failed | p50 ms | p95 ms | p99 ms | of minute 1 | server MB | models MB | updates |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for number, minute in enumerate(minutes, 1):
        window, server = minute.window, minute.memory_mb["tritonserver"]
        lines.append(
            f"| {number} | {window.per_s:,.0f} | {window.failed} | {window.p50:.2f} | {window.p95:.2f} | "
            f"{window.p99:.2f} | {window.p99 / minutes[0].window.p99:.2f} | {server:,.0f} | "
            f"{sum(minute.memory_mb.values()) - server:,.0f} | {minute.updates} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> SoakOptions:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").partition("\n")[0])
    defaults = SoakOptions()
    add_options(parser, defaults, {
        "minutes": "how long",
        "share": "of the capacity that is offered",
        "seconds": "length of a minute",
        "limit": "ms that the 99th percentile may have where the capacity is measured",
        "items": "in the catalogue",
        "users": "in the catalogue",
        "candidates": "items per request",
        "updates": "items, and events, per second that are written",
        "out": "folder for data, store and log",
    })  # fmt: skip
    return replace(defaults, **vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    return run("soak", __doc__, Soak(parse(argv)).run)


if __name__ == "__main__":
    sys.exit(main())
