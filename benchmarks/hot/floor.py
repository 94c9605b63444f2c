"""The floor: the same work in a process of its own with no server, one request after the other.

    python -m benchmarks.hot.floor FOLDER ITEMS USERS CANDIDATES SECONDS

prints JSON: per design p50, p95, p99 in milliseconds and the stages' medians in microseconds.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.hot.data import requests
from benchmarks.hot.load import percentiles
from benchmarks.hot.wire import Request
from benchmarks.hot.work import STORE, Plain, Tricked
from sightline.item_path import STAGES
from sightline.store import open_store

THREADS = (1, 2)


def measure(folder: Path, made: Sequence[Request], seconds: float) -> dict[str, Any]:
    """Floors and stages; `made` are requests for the data of the folder."""
    with open_store(str(folder / STORE)) as store:
        plain = {str(threads): latency(Plain(folder, store, threads), made, seconds) for threads in THREADS}
        threads = min(plain, key=lambda one: plain[one]["p50"])
        tricked = Tricked(folder, store)
        return {
            "plain": {**plain[threads], "threads": int(threads)}, "tricked": latency(tricked, made, seconds),
            "stages": {
                "plain": stages_of_plain(Plain(folder, store, int(threads)), made),
                "tricked": stages_of_tricked(tricked, made),
            },
        }  # fmt: skip


def latency(work: Plain | Tricked, made: Sequence[Request], seconds: float) -> dict[str, float]:
    """Milliseconds per request, after every request was made once."""
    for request in made:
        work(*request)
    gc.collect()
    gc.disable()
    taken, turn, end = list[float](), 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        request = made[turn % len(made)]
        start = time.perf_counter()
        work(*request)
        taken.append(time.perf_counter() - start)
        turn += 1
    gc.enable()
    p50, p95, p99 = percentiles(np.array(taken))
    return {"p50": round(p50, 4), "p95": round(p95, 4), "p99": round(p99, 4)}


def stages_of_plain(plain: Plain, made: Sequence[Request]) -> dict[str, float]:
    """Median microseconds in each part; `rest` is tables of ids, repeating and wrapping."""
    taken: dict[str, list[float]] = defaultdict(list)

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = call(*arguments)
            taken[stage].append(time.perf_counter() - start)
            return found

        return called

    # The work itself knows nothing of clocks.
    for stage, place, method in (("items", "_store", "read_items"), ("user", "_lookup", "profile")):
        part = getattr(plain, place)
        others = {name: getattr(part, name) for name in ("users", "items") if hasattr(part, name)}
        setattr(plain, place, SimpleNamespace(**{method: timed(stage, getattr(part, method))}, **others))
    for stage in ("embed", "score"):
        run = getattr(plain, f"_{stage}").run
        setattr(plain, f"_{stage}", SimpleNamespace(run=timed(stage, run)))
    whole = timed("whole", plain)
    for request in made:
        whole(*request)
    spent = {stage: np.array(times) for stage, times in taken.items()}
    spent["rest"] = spent.pop("whole") - sum(spent[stage] for stage in ("items", "user", "embed", "score"))
    return {stage: round(float(np.median(times)) * 1e6, 1) for stage, times in spent.items()}


def stages_of_tricked(tricked: Tricked, made: Sequence[Request]) -> dict[str, float]:
    """Median microseconds in each of the engine's own stages."""
    found = np.array([tricked.path(*request).seconds for request in made])
    return dict(zip(STAGES, (np.median(found, 0) * 1e6).round(1).tolist(), strict=True))


if __name__ == "__main__":
    items, users, candidates = (int(one) for one in sys.argv[2:5])
    print(json.dumps(measure(Path(sys.argv[1]), requests(items, users, candidates), float(sys.argv[5]))))
