"""From the steps' figures to the document's: fixed rates, medians over the rounds, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.hot.load import Window
from benchmarks.hot.servers import OURS, Contender

__all__ = ["CPU_RATE", "finite", "fixed_rates", "medians", "ratios", "summary"]

_SHARES = (0.25, 0.5, 0.75)
CPU_RATE = "50%"
"""The fixed rate at which processor time is taken."""


def finite(window: Window) -> dict[str, float | None]:
    """A window as JSON: rounded, None for what is infinite."""
    return {name: round(value, 3) if math.isfinite(value) else None for name, value in vars(window).items()}


def fixed_rates(contenders: Iterable[Contender], sweeps: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Name of each fixed rate → requests per second: shares of what the best plain peer can do, and the largest share
    of the best tricked peer. Without any plain peer, of the best that there is.
    """

    def best(design: str) -> float:
        found = [sweeps[one.name]["capacity"] for one in contenders if one.peer and one.design == design]
        return max(found, default=0.0)

    base = best("plain") or max((sweep["capacity"] for sweep in sweeps.values()), default=0.0)
    rates = {f"{share:.0%}": base * share for share in _SHARES}
    if tricked := best("tricked"):
        rates[f"{_SHARES[-1]:.0%} tricked"] = tricked * _SHARES[-1]
    return {name: round(rate, 1) for name, rate in rates.items() if rate > 0}


def medians(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every number in documents of one shape; None where the median would be infinite."""
    found: dict[str, Any] = {}
    for name, value in documents[0].items():
        values = [document[name] for document in documents]
        if isinstance(value, dict):
            found[name] = medians(values)
        else:
            middle = statistics.median(math.inf if one is None else one for one in values)
            found[name] = round(middle, 4) if math.isfinite(middle) else None
    return found


def summary(one: Contender, sweep: dict[str, Any], visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One contender's medians over the rounds."""
    apart = ("probes", "difference")
    numbers = [{name: value for name, value in visit.items() if name not in apart} for visit in visits]
    capacities = [visit["capacity"] for visit in visits]
    return {
        "peer": one.peer, "design": one.design, "form": one.form, "setting": sweep["best"], "sweep": sweep["tried"],
        **medians(numbers), "capacity_low": min(capacities), "capacity_high": max(capacities),
        "difference": max(visit["difference"] for visit in visits), "rounds": len(visits),
        "probes": [probe for visit in visits for probe in visit["probes"]],
    }  # fmt: skip


def ratios(document: dict[str, Any]) -> dict[str, Any]:
    """What the issue of being fast comes to; None where a side is missing."""
    contenders, floors = document["contenders"], document["floors"]

    def best(design: str) -> str | None:
        peers = [name for name, found in contenders.items() if found["peer"] and found["design"] == design]
        return max(peers, key=lambda name: contenders[name]["capacity"], default=None)

    def ratio(over: float | None, under: float | None) -> float | None:
        return round(over / under, 3) if over and under else None

    ours = contenders.get(OURS, {})
    plain_peer, tricked_peer = best("plain"), best("tricked")
    alone = ours.get("alone", {}).get("p50")
    return {
        "best_peer": plain_peer, "best_tricked_peer": tricked_peer, "throughput": ours.get("capacity"),
        "throughput_over_best_peer": ratio(ours.get("capacity"), contenders.get(plain_peer, {}).get("capacity")),
        "throughput_over_best_tricked_peer": ratio(
            ours.get("capacity"), contenders.get(tricked_peer, {}).get("capacity")
        ),
        "p50_over_floor": ratio(alone, floors["tricked"]["p50"]),
        "p50_over_plain_floor": ratio(alone, floors["plain"]["p50"]),
    }  # fmt: skip
