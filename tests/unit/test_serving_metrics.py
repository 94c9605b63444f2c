"""Metrics of what serves: the table, the counts, the exposition, and what reaches Triton's server."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sightline.errors import ConfigError
from sightline.metrics import FAMILIES, Metrics

ROOT = Path(__file__).parents[2]


def test_names_follow_the_scheme() -> None:
    for name, family in FAMILIES.items():
        unit = "total" if family.kind == "counter" else "(seconds|events|items)"
        assert re.fullmatch(rf"sightline(_[a-z]+)+_{unit}", name), name
        assert (family.kind == "histogram") == bool(family.buckets)
        assert list(family.buckets) == sorted(set(family.buckets))
        assert "model" not in family.labels


def test_the_document_is_the_table() -> None:
    rows = re.findall(r"^\| `(sightline_\w+)` \| (\w+) \| (.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    labels = [(name, kind, tuple(re.findall(r"`(\w+)`", cell))) for name, kind, cell in rows]
    assert labels == [(name, family.kind, family.labels) for name, family in FAMILIES.items()]


def test_every_family_is_used_and_no_other() -> None:
    code = "".join(
        path.read_text()
        for folder in ("sightline", "serving", "backfill", "model_repository") for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "sightline/metrics.py"
    )  # fmt: skip
    assert set(re.findall(r'"(sightline_\w+_(?:total|seconds|events|items))"', code)) == set(FAMILIES)


def test_counts_add_up_from_many_threads() -> None:
    metrics = Metrics(model="caption")

    def count() -> None:
        for _ in range(2000):
            metrics.count("sightline_caption_requests_total", source="store")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics.count("sightline_caption_requests_total", 3, source="model")
    assert metrics.value("sightline_caption_requests_total", source="store") == 8000
    assert metrics.value("sightline_caption_requests_total") == 8003
    assert metrics.value("sightline_caption_requests_total", source="deadline") == 0


def test_exposition_by_hand() -> None:
    metrics = Metrics(model='odd"name\\', instance="caption_0_1")
    for seconds in (1.0, 5.0, 5.1, 1e9):  # a bound belongs to its bucket
        metrics.observe("sightline_nearline_lag_seconds", seconds)
    metrics.set("sightline_caption_queue_items", 7)
    metrics.set("sightline_caption_queue_items", 4)
    text = metrics.text()
    own = 'model="odd\\"name\\\\"'
    assert f'sightline_caption_queue_items{{{own},instance="caption_0_1"}} 4\n' in text
    assert "# TYPE sightline_nearline_lag_seconds histogram\n" in text
    for le, count in (("1", 1), ("5", 2), ("15", 3), ("86400", 3), ("+Inf", 4)):
        assert f'sightline_nearline_lag_seconds_bucket{{{own},le="{le}"}} {count}\n' in text
    assert f"sightline_nearline_lag_seconds_sum{{{own}}} 1000000011.1" in text
    assert f"sightline_nearline_lag_seconds_count{{{own}}} 4\n" in text


@pytest.mark.parametrize(
    ("call", "name", "labels", "message"),
    [
        ("count", "sightline_captions", {}, "expected one of sightline.metrics.FAMILIES"),
        ("count", "sightline_caption_seconds", {"source": "store"}, "a histogram with source; got a counter"),
        ("count", "sightline_caption_requests_total", {}, "with source; got a counter with no labels"),
        ("count", "sightline_caption_requests_total", {"source": "a", "row": "b"}, "got a counter with source, row"),
        ("set", "sightline_nearline_queue_events", {"row": "1"}, "a gauge with no labels; got a gauge with row"),
    ],
)
def test_what_the_table_does_not_have_is_refused(call: str, name: str, labels: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(Metrics(model="caption"), call)(name, 1, **labels)


class TritonMetrics:
    """Triton's custom metrics as far as a model sees them; with `broken`, of a server without metrics."""

    class TritonModelException(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        self.broken, self.messages, self.warnings = broken, [], []
        self.values: dict[tuple[str, ...], float] = {}
        outer = self

        class MetricFamily:
            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, *, name: str, description: str, kind: str) -> None:
                if outer.broken:
                    raise outer.TritonModelException("metrics are off")
                self.name, self.kind = name, kind

            def Metric(self, *, labels: dict[str, str]) -> Any:
                key = (self.name, *labels.values())

                def increment(amount: float) -> None:
                    assert self.kind == "counter"
                    assert amount >= 0
                    outer.messages.append(key)
                    outer.values[key] = outer.values.get(key, 0) + amount

                def put(value: float) -> None:
                    assert self.kind == "gauge"
                    outer.messages.append(key)
                    outer.values[key] = value

                return SimpleNamespace(increment=increment, set=put)

        self.MetricFamily = MetricFamily
        self.Logger = SimpleNamespace(log_warn=self.warnings.append)


def test_a_server_gets_changes_only() -> None:
    triton = TritonMetrics()
    metrics = Metrics(triton, model="caption", flush_seconds=0.01)
    metrics.count("sightline_caption_requests_total", source="store")
    metrics.set("sightline_nearline_queue_events", 3)
    _wait(lambda: len(triton.messages) == 2)
    metrics.count("sightline_caption_requests_total", 4, source="store")
    metrics.observe("sightline_caption_seconds", 20.0, source="model")
    metrics.close()
    assert triton.values["sightline_caption_requests_total", "caption", "store"] == 5
    assert triton.values["sightline_nearline_queue_events", "caption"] == 3
    bucket = "sightline_caption_seconds_bucket", "caption", "model"
    assert [triton.values[*bucket, le] for le in ("10", "60", "+Inf")] == [0, 1, 1]
    assert triton.values["sightline_caption_seconds_sum", "caption", "model"] == 20
    # Every series is declared once and sent again only as it changes.
    assert len(triton.messages) == len(triton.values) + 1


def test_a_server_without_metrics_is_no_reason_to_fail() -> None:
    triton = TritonMetrics(broken=True)
    metrics = Metrics(triton, model="caption", flush_seconds=0.01)
    metrics.count("sightline_caption_requests_total", source="store")
    _wait(lambda: triton.warnings)
    metrics.close()
    assert triton.warnings == ["metrics of caption do not reach the server: metrics are off"]
    assert metrics.value("sightline_caption_requests_total") == 1


def _wait(reached: Any) -> None:
    for _ in range(500):
        if reached():
            return
        threading.Event().wait(0.01)
    raise AssertionError("not within 5 s")
