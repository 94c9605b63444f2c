"""The whole measurement: data, sweep of the peers' settings, rounds over all contenders, medians.

Every step leaves its figures in `<out>/unfinished` as soon as it is done: an interrupted run goes on from there, if
nothing that it depends on has changed. A contender that fails is left out, with the reason, and tried again by the
next run.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.hot import data, install
from benchmarks.hot.grpc_load import GrpcLoad
from benchmarks.hot.load import Load, Window
from benchmarks.hot.processes import Tree
from benchmarks.hot.search import capacity
from benchmarks.hot.servers import CONTENDERS, Contender, Running, Setting, serve, trivial
from benchmarks.hot.summary import CPU_RATE, finite, fixed_rates, medians, ratios, summary
from benchmarks.hot.wire import Answer, Request
from benchmarks.hot.work import STORE, Plain
from sightline.errors import ConfigError, SightlineError
from sightline.store import open_store

DECIDED = 0.5
"""A peer with less than this share of the best sweep of its design has one round: it decides no ratio."""
HOPELESS = 1000.0
"""p99 in milliseconds at which a fixed rate counts as too much."""
COMPARED = 8
"""Requests whose answers are held against the plain work's."""
_BETTER = 1.05  # what a setting must bring to be preferred to the one before


@dataclass(frozen=True, kw_only=True)
class HotOptions:
    """What to measure. The defaults take up to twenty minutes on two cores, the peers' installation not counted."""

    items: int = 10_000
    users: int = 2000
    candidates: int = 500
    """Items per request."""
    limit: float = 10.0
    """Milliseconds that the 99th percentile may have."""
    rounds: int = 3
    seconds: float = 1.5
    """Length of a measurement."""
    only: tuple[str, ...] = tuple(one.name for one in CONTENDERS)
    """Contenders."""
    precision: float = 1.04
    """Ratio to which the highest rate is found; its square in the sweep."""
    sweep: bool = True
    """Try the peers' settings; else one worker with one thread."""
    out: Path = Path("artifacts/bench/hot")

    def __post_init__(self) -> None:
        for name, low, high in (("items", 10, 10**7), ("users", 1, 10**7), ("candidates", 1, 4096), ("rounds", 1, 100),
                                ("limit", 0.1, 10_000), ("seconds", 0.1, 600)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected {low} to {high}")
        if 2 * self.candidates > self.items:
            raise ConfigError(f"--candidates: got {self.candidates}, expected at most half of --items {self.items}")
        if unknown := set(self.only) - {one.name for one in CONTENDERS}:
            raise ConfigError(f"--only: got {', '.join(sorted(unknown))}, expected some of "
                              f"{', '.join(one.name for one in CONTENDERS)}")  # fmt: skip

    @classmethod
    def quick(cls, **options: Any) -> HotOptions:
        """One short round on a small catalogue that shows that everything works; its figures mean little."""
        small = {"items": 1000, "users": 100, "rounds": 1, "seconds": 0.3, "limit": 100.0, "precision": 1.5}
        return cls(**small | {"sweep": False} | options)


@dataclass
class Notebook:
    """Results by name, each written when it is there and read when it is asked for again."""

    folder: Path
    key: str

    def __post_init__(self) -> None:
        stamp = self.folder / "key"
        if not stamp.exists() or stamp.read_text() != self.key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            stamp.write_text(self.key)

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was written under the name, else what `make` makes."""
        path = self._path(name)
        if not path.exists():
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(make()))
            fresh.rename(path)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_')}.json"


@dataclass
class Bench:
    """One run."""

    options: HotOptions
    progress: Callable[[str], None]
    problems: dict[str, str] = field(default_factory=dict)
    """Contender → why it has no figures, or not all."""

    def run(self) -> dict[str, Any]:
        """Everything; the JSON document."""
        o, began, record = self.options, time.monotonic(), describe()
        # Whatever an earlier run that was killed has left would measure itself beside us.
        self.tree = Tree(sha256(str(o.out.resolve()).encode()).hexdigest())
        self.tree.end()
        self.folder = o.out / "data" / f"{o.items}-{o.users}"
        contenders = self._installed([one for one in CONTENDERS if one.name in o.only])
        with_release = any(one.peer is None for one in contenders)
        prepared = data.prepare(self.folder, o.items, o.users, self.progress, with_release=with_release)
        self.requests = data.requests(o.items, o.users, o.candidates)
        self.expected = self._expect()
        basis = (
            asdict(o) | {"out": ""}, data.key(o.items, o.users), record["commit"],
            record["hardware"]["cpu"], record["hardware"]["cores"],
        )  # fmt: skip
        self.notes = Notebook(o.out / "unfinished", sha256(json.dumps(basis).encode()).hexdigest())
        resumed = "client" in self.notes
        if resumed:
            self.progress(f"going on with {self.notes.folder}")

        client = self.notes.get("client", self._client)
        sweeps = {one.name: found for one in contenders if (found := self._try(one.name, "sweep", self._sweep, one))}
        contenders = [one for one in contenders if one.name in sweeps]
        rates = self.notes.get("rates", lambda: fixed_rates(contenders, sweeps))
        peers = [one for one in contenders if one.peer]
        best = {
            one.design: max(sweeps[other.name]["capacity"] for other in peers if other.design == one.design)
            for one in peers
        }
        floors, visits = [], {one.name: list[dict[str, Any]]() for one in contenders}
        for turn in range(o.rounds):
            floors.append(self.notes.get(f"floor {turn}", self._floor))
            self.progress(f"round {turn + 1}/{o.rounds}  in process: plain {floors[-1]['plain']['p50']:.2f} ms, "
                          f"tricked {floors[-1]['tricked']['p50']:.2f} ms")  # fmt: skip
            for one in rotated(contenders, turn):
                if turn and one.peer and sweeps[one.name]["capacity"] < DECIDED * best[one.design]:
                    continue
                found = self._try(one.name, f"round {turn}", self._visit, one, sweeps[one.name], rates)
                if found:
                    visits[one.name].append(found)
                    self.progress(f"round {turn + 1}/{o.rounds}  {one.name:<18} {found['capacity']:>7,.0f} /s   "
                                  f"alone p50 {found['alone']['p50']:.2f} ms")  # fmt: skip
        record["command"] = shlex.join(["python", "-m", "benchmarks.hot", *sys.argv[1:]])
        record["versions"] |= {name: version(name) for name in ("lmdb", "grpcio")} | _peer_versions()
        document = {
            "benchmark": "hot", "at": datetime.now().astimezone().isoformat(timespec="seconds"), **record,
            "items": o.items, "users": o.users, "candidates": o.candidates, "limit_ms": o.limit, "rounds": o.rounds,
            "window_s": o.seconds, "resumed": resumed, "prepare_s": prepared, "client": client, "rates": rates,
            "floors": {name: medians([floor[name] for floor in floors]) for name in ("plain", "tricked")},
            "stages": {name: medians([floor["stages"][name] for floor in floors]) for name in ("plain", "tricked")},
            "contenders": {
                one.name: summary(one, sweeps[one.name], visits[one.name]) for one in contenders if visits[one.name]
            },
            "problems": self.problems, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        return document | ratios(document)

    def finish(self) -> None:
        """Forget the steps: the next run measures anew."""
        shutil.rmtree(self.notes.folder)

    # --- steps ------------------------------------------------------------------------------------------

    def _installed(self, contenders: list[Contender]) -> list[Contender]:
        if not any(one.peer for one in contenders):
            return contenders
        failed = install.install(self.progress)
        self.problems |= {one.name: failed[one.peer] for one in contenders if one.peer in failed}
        return [one for one in contenders if one.name not in self.problems]

    def _expect(self) -> list[Answer]:
        """The plain work's answers; the last request is a stranger's, with items that nobody knows."""
        o = self.options
        _, items, context = self.requests[COMPARED - 1]
        strange = Request(o.users + 1, items.copy(), context)
        strange.items[:: max(1, len(items) // 3)] = o.items + 1
        self.compared = [*self.requests[: COMPARED - 1], strange]
        with open_store(str(self.folder / STORE)) as store:
            work = Plain(self.folder, store)
            return [work(*request) for request in self.compared]

    def _try(self, name: str, step: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any] | None:
        """The step's figures; None where the contender fails, which is noted."""
        try:
            found = self.notes.get(f"{step} {name}", lambda: make(*arguments))
        except (SightlineError, OSError) as error:
            self.problems[name] = f"{step}: {error}"
            self.progress(f"{name}: left out of {step}: {error}")
            return None
        return found

    def _client(self) -> dict[str, Any]:
        """The generator alone: what it can do, and what it costs."""
        with trivial(self.tree) as load:
            alone = load.alone(self.options.seconds)
            windows, meets = self._probe(load, self.options.seconds)
            best = capacity(meets, 0.6 * load.saturate(min(0.6, self.options.seconds)), self.options.precision**2)
            cost = statistics.median([window.client_cpu_us for window in windows])
        self.progress(f"load generator: {best:,.0f} requests/s from a server that does nothing, {cost:.0f} µs each")
        return {"capacity": best, "alone_ms": alone.p50, "cpu_us": round(cost, 1)}

    def _floor(self) -> dict[str, Any]:
        o = self.options
        numbers = (o.items, o.users, o.candidates, o.seconds)
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.hot.floor", self.folder.resolve(), *map(str, numbers)],
            cwd=Path(__file__).parents[2], env=os.environ | {"OMP_WAIT_POLICY": "passive"} | self.tree.environment,
            text=True, check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def _sweep(self, one: Contender) -> dict[str, Any]:
        """The setting with the most requests per second within the limit."""
        tried: dict[str, float | str] = {}
        best, most = None, 0.0
        settings = one.settings if self.options.sweep or one.peer is None else (Setting(1, 1),)
        for setting in settings:
            try:
                with self._serve(one, setting) as running:
                    _, meets = self._probe(running.load, 0.6 * self.options.seconds)
                    if most and not meets(most * _BETTER):
                        tried[str(setting)] = f"at most {most * _BETTER:.0f}"
                        continue
                    guess = most * _BETTER or 0.6 * running.load.saturate(min(0.6, self.options.seconds))
                    found = capacity(meets, guess, self.options.precision**2)
                if setting:
                    tried[str(setting)] = round(found, 1)
            except (SightlineError, OSError) as error:
                if setting == settings[-1] and best is None:
                    raise
                tried[str(setting)] = f"failed: {error}"
                continue
            if best is None or found > most:
                best, most = setting, found
        self.progress(f"sweep  {one.name:<18} {most:>7,.0f} /s" + (f"   workers × threads: {best}" if best else ""))
        return {"tried": tried, "best": asdict(best) if best else None, "capacity": most}

    def _visit(self, one: Contender, sweep: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
        """Start the contender once and measure everything of it."""
        o = self.options
        with self._serve(one, Setting(**sweep["best"]) if sweep["best"] else None) as running:
            load, seeds = running.load, count(1)
            served = _served(running)
            alone = load.alone(o.seconds)
            inside = _inside(served, _served(running))
            windows, meets = self._probe(load, o.seconds)
            found = capacity(meets, sweep["capacity"] or 0.1 * load.saturate(o.seconds), o.precision)
            fixed: dict[str, Any] = {}
            cost = math.nan
            for name, rate in rates.items():
                before, sent = running.tree.cpu(), load.sent
                fixed[name] = finite(load.run(rate, o.seconds, seed=next(seeds), limit=HOPELESS))
                if name == CPU_RATE:
                    cost = running.tree.cpu_since(before) / (load.sent - sent) * 1e3
            memory = running.tree.memory_mb()
            result = {
                "capacity": round(found, 1), "alone": finite(alone), "fixed": fixed, "cpu_s_per_1000": round(cost, 3),
                "memory_mb": memory, "difference": running.difference, "start_s": running.start_seconds,
                "probes": [finite(window) for window in windows],
            }  # fmt: skip
            if running.triton:
                result["server_us"] = inside
                result["grpc"] = self._grpc(running, rates)
        return result

    def _grpc(self, running: Running, rates: dict[str, float]) -> dict[str, Any]:
        assert running.triton is not None
        load = GrpcLoad(running.triton.url, self.requests)
        try:
            return {
                "alone": finite(load.alone(self.options.seconds)),
                "fixed": {name: finite(load.run(rate, self.options.seconds)) for name, rate in rates.items()},
            }
        finally:
            load.close()

    def _serve(self, one: Contender, setting: Setting | None) -> Any:
        log = self.options.out / "logs" / f"{one.name.replace(' ', '_')}.log"
        return serve(one, setting, self.folder, self.requests, (self.compared, self.expected), self.tree, log)

    def _probe(self, load: Load, seconds: float) -> tuple[list[Window], Callable[[float], bool]]:
        """A condition for `capacity`, and the list that the windows go to which it looks at.

        A rate that fails gets a second chance, unless it failed by far: a stall of the machine is not the server's.
        """
        windows, seeds, limit = list[Window](), count(100), self.options.limit

        def meets(rate: float) -> bool:
            for _ in range(2):
                window = load.run(rate, seconds, seed=next(seeds), limit=limit)
                windows.append(window)
                if window.p99 <= limit and not window.failed:
                    return True
                if window.p50 > limit:
                    break
            return False

        return windows, meets


def rotated(contenders: Sequence[Contender], turn: int) -> list[Contender]:
    """Another order in every round."""
    at = turn * max(1, len(contenders) // 3) % max(1, len(contenders))
    return [*contenders[at:], *contenders[:at]]


def _served(running: Running) -> dict[str, float]:
    """Triton's totals of rank_items: requests, and milliseconds by part."""
    if running.triton is None:
        return {}
    found = running.triton.statistics()["rank_items"]
    requests = found["inferences"]
    return {"requests": requests} | {part: requests * found[f"{part}_ms"] for part in ("queue", "compute", "total")}


def _inside(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Mean microseconds per request in each part of the server."""
    return {part: round((after[part] - before[part]) / (after["requests"] - before["requests"]) * 1e3, 1)
            for part in after if part != "requests"}  # fmt: skip


def _peer_versions() -> dict[str, str]:
    """Of the servers, as locked."""
    pins = (line.split("==") for text in install.sections(install.LOCK.read_text()).values()
            for line in text.splitlines() if "==" in line)  # fmt: skip
    return {name: number for name, number in pins if name in ("fastapi", "uvicorn", "litserve", "bentoml", "ray")}
