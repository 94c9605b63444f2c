"""What soak and chaos conclude from made-up samples."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import chaos, soak
from benchmarks.chaos import Impact, Outcome, Seen
from benchmarks.hot.load import Window
from benchmarks.soak import Minute, SoakOptions
from sightline.errors import ConfigError

WINDOW = Window(rate=300, requests=18_000, failed=0, per_s=300, p50=2.0, p95=3.0, p99=4.0, client_cpu_us=50, lag_us=9)
MINUTE = Minute(window=WINDOW, memory_mb={"tritonserver": 100.0, "rank_items": 400.0}, updates=12_000)


def minute(memory: dict[str, float] | None = None, updates: int = 12_000, **window: Any) -> Minute:
    return Minute(window=replace(WINDOW, **window), memory_mb=memory or MINUTE.memory_mb, updates=updates)


@pytest.mark.parametrize(
    ("second", "broken"),
    [
        (minute(p99=6.0), []),
        (minute(p99=6.1), [r"minute 2: p99 is 6\.10 ms, 1\.5. of the first"]),
        (minute(p99=math.inf), ["minute 2: p99 is inf ms"]),
        (minute(failed=1), ["minute 2: 1 of 18000 requests failed"]),
        (minute(updates=0), ["minute 2: the store was not updated"]),
        (minute({"tritonserver": 115.9, "rank_items": 419.9}), []),  # 16 MB, 5 %
        (minute({"tritonserver": 116.1, "rank_items": 400.0}), [r"tritonserver: grew by 16\.1 MB from 100\.0 MB"]),
        (minute({"tritonserver": 100.0, "rank_items": 420.1}), [r"rank_items: grew by 20\.1 MB"]),
        (minute({"tritonserver": 100.0}), ["rank_items: grew by inf MB"]),  # it is gone
    ],
)
def test_a_minute_is_held_against_the_first(second: Minute, broken: list[str]) -> None:
    found = soak.judge([MINUTE, second], restarts=0, difference=0)
    assert len(found) == len(broken)
    for line, wanted in zip(found, broken, strict=True):
        assert re.match(wanted, line)


def test_every_minute_counts_and_the_rest_too() -> None:
    found = soak.judge([MINUTE, minute(p99=9), MINUTE], restarts=2, difference=math.nan)
    assert [line.partition(":")[0] for line in found] == ["minute 2", "2 models had to be restarted",
        "scores differ by nan from the plain work's, expected at most 0.0001"]  # fmt: skip
    first = minute(p99=math.inf)
    assert any("minute 1" in line for line in soak.judge([first, first], restarts=0, difference=0))


def test_soak_table_and_options() -> None:
    rows = soak.table([MINUTE, minute(p99=6)]).splitlines()
    assert rows[-1] == "| 2 | 300 | 0 | 2.00 | 3.00 | 6.00 | 1.50 | 100 | 400 | 12000 |"
    assert soak.parse(["--minutes", "3", "--share", "0.5"]) == SoakOptions(minutes=3, share=0.5)
    with pytest.raises(ConfigError, match=r"--minutes: got 1, expected 2 to"):
        soak.parse(["--minutes", "1"])


def seen() -> list[Seen]:
    """A request each 0.1 s from 0 to 3 s, 10 ms each; the kill at 1 s, the recovery at 2 s."""
    found = [Seen(0.1 * row, 0.01, None) for row in range(30)]
    found[9] = Seen(0.9, 0.5, "INTERNAL: dead")  # on the way when the kill came
    found[15] = Seen(1.5, 0.2, "INTERNAL: dead")
    found[16] = Seen(1.6, 0.3, None)
    return found


def test_requests_are_sorted_by_the_kill_and_the_recovery() -> None:
    impact = Impact.of(seen(), killed=1.0, recovered=1.95)
    assert [part.requests for part in (impact.before, impact.during, impact.after)] == [9, 11, 10]
    assert [part.failed for part in (impact.before, impact.during, impact.after)] == [0, 2, 0]
    assert (impact.during.p50, impact.during.p99) == (10, 300)
    assert impact.errors == {"INTERNAL: dead": 2}
    assert impact.last_error_s == 0.7
    never = Impact.of(seen(), killed=1.0, recovered=math.inf)
    assert never.after.requests == 0
    assert math.isnan(never.after.p50)


def outcome(fault: str, recovery: float = 2.0, failed: bool = False, late: bool = False) -> Outcome:
    good = Impact.of([one for one in seen() if one.error is None], 1.0, 1.95)
    bad = Impact.of([*seen(), *([Seen(2.5, 0.1, "UNAVAILABLE")] if late else [])], 1.0, 1.95)
    return Outcome(fault=fault, recovery_s=recovery, rank_items=bad if failed or late else good, rank_media=good)


@pytest.mark.parametrize(
    ("one", "broken"),
    [
        (outcome("captioner"), ""),
        (outcome("captioner", failed=True), "captioner: 2 requests of rank_items failed"),
        (outcome("decoder", failed=True), "decoder: 2 requests of rank_items failed"),
        (outcome("rank_items", failed=True), ""),  # its own death may be seen
        (outcome("rank_items", late=True), "rank_items: 1 requests of rank_items failed after the recovery"),
        (outcome("triton", recovery=30, late=True), ""),
        (outcome("lookup", recovery=5.1), "lookup: back after 5.1 s, expected 5 s at most"),
        (outcome("redis", recovery=30), ""),
        (outcome("redis", recovery=math.inf), "redis: not back within"),
    ],
)
def test_claims(one: Outcome, broken: str) -> None:
    found = chaos.judge([one], within=5)
    assert found[0].startswith(broken) if broken else found == []
    assert len(found) <= 1


def test_errors_are_told_apart_by_kind_alone() -> None:
    def error(details: str) -> Any:
        return SimpleNamespace(code=lambda: SimpleNamespace(name="INTERNAL"), details=lambda: details)

    first = chaos.kind(error("in ensemble 'rank_media', [request id: <id_unknown>] Stub process 'caption_0_1' died"))
    assert first == chaos.kind(error("Stub process 'caption_0_0' died")) == "INTERNAL: Stub process 'caption' died"
    refused = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:8501: refused"
    assert chaos.kind(error(refused)) == "INTERNAL: failed to connect to all addresses"


def test_chaos_table_and_options() -> None:
    rows = chaos.table([outcome("lookup", failed=True)]).splitlines()
    assert rows[2] == (
        "| lookup | 2.0 s | rank_items | 2 of 30 | 0.7 s | 10.0 / 10.0 | 10.0 / 300.0 | 10.0 / 10.0 | "
        "2 × INTERNAL: dead |"
    )
    assert chaos.parse(["--faults", "redis", "lookup"]).faults == ("redis", "lookup")
    with pytest.raises(ConfigError, match="--faults: got disk, expected some of captioner"):
        chaos.parse(["--faults", "disk"])
