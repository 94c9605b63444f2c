"""Counters, gauges and histograms of everything that serves, under one naming scheme.

    metrics = Metrics(pb_utils, model="caption")                    # in a Triton python model
    metrics.count("sightline_caption_requests_total", source="store")
    metrics.observe("sightline_caption_seconds", 0.031, source="model")
    metrics.set("sightline_nearline_queue_events", 12)
    metrics.close()                                                 # in the model's finalize

Names are `sightline_<stage>_<what>_<unit or total>` (https://prometheus.io/docs/practices/naming), declared once, in
`FAMILIES`; docs/metrics.md says the same to people. Every series carries the label `model`, its owner.

An update is a dictionary operation of less than a microsecond. In Triton a thread hands the changes to the server once
a second, because of three properties of its python backend (2.51): an update there is a message to the server and back,
16 µs on idle cores, and holds up other messages of the model; two threads that update one metric crash the server;
and a metric that one process deletes is gone for all others, which then write to freed memory. So one thread sends, and
what was declared stays. Histograms are counters per bucket there, since the server's own take one observation per
message.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sightline.errors import ConfigError

__all__ = ["FAMILIES", "Family", "Metrics", "Sample"]

# From a tenth of a millisecond, a cached read, to a minute, a queue that grows.
FAST = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)  # seconds
SLOW = (5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)  # seconds
LAG = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)  # seconds


@dataclass(frozen=True)
class Family:
    """One metric with all its series: `labels` beside `model`; `buckets`: upper bounds of a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILIES: dict[str, Family] = {
    "sightline_store_reads_total": Family(
        "counter", "Records asked of the store; kind: item, user, caption; status: fresh, stale_version, missing",
        ("kind", "status"),
    ),
    "sightline_degraded_requests_total": Family(
        "counter", "Requests answered with less than asked; reason: deadline, queue_full, captioner, store", ("reason",)
    ),
    "sightline_caption_requests_total": Family(
        "counter", "Media rows; source: store, model, previous, deadline, rejected", ("source",)
    ),
    "sightline_caption_seconds": Family(
        "histogram", "Time from a media row's arrival to its caption; source as of sightline_caption_requests_total",
        ("source",), SLOW,
    ),
    "sightline_caption_queue_items": Family(
        "gauge", "Media that wait for the captioner in one instance of the model", ("instance",)
    ),
    "sightline_caption_store_failures_total": Family(
        "counter", "Times that the store failed the captioner; operation: read, claim, write", ("operation",)
    ),
    "sightline_caption_nearline_total": Family(
        "counter", "Media that were put off; result: queued, known, full, failed", ("result",)
    ),
    "sightline_tokenize_captions_total": Family(
        "counter", "Captions tokenized; result: encoded, refused", ("result",)
    ),
    "sightline_lookup_rows_total": Family(
        "counter", "Ids looked up; kind: user, item; result: known, unknown", ("kind", "result")
    ),
    "sightline_items_seconds": Family(
        "histogram", "Time of one ranking of stored items; stage: sync, user, items, score, total", ("stage",), FAST
    ),
    "sightline_items_ranked_total": Family(
        "counter", "Items that were ranked by id; status of their features: fresh, stale_version, missing", ("status",)
    ),
    "sightline_items_cache_reads_total": Family(
        "counter", "Items asked of the process's own copy; result: hit, miss", ("result",)
    ),
    "sightline_items_cache_evictions_total": Family("counter", "Items that left the process's own copy"),
    "sightline_events_total": Family(
        "counter", "Interaction events; result: applied, duplicate, late, damaged", ("result",)
    ),
    "sightline_retrieve_seconds": Family(
        "histogram", "Time of one search of the gallery; stage: vector (media to vector), search", ("stage",), FAST
    ),
    "sightline_retrieve_items_total": Family(
        "counter", "Items that searches answered, by the gallery's version in which they were found", ("version",)
    ),
    "sightline_backfill_items_total": Family(
        "counter", "Items that a backfill is done with; result: moved, failed, overtaken (changed meanwhile)",
        ("result",),
    ),
    "sightline_backfill_remaining_items": Family("gauge", "Items that a backfill has still to move"),
    "sightline_backfill_batch_seconds": Family("histogram", "Time of one batch, media to gallery", buckets=SLOW),
    "sightline_nearline_items_total": Family(
        "counter", "Item events that the worker is done with; result: captioned, known, retried, dead", ("result",)
    ),
    "sightline_nearline_queue_events": Family("gauge", "Item events that wait"),
    "sightline_nearline_oldest_seconds": Family("gauge", "Age of the oldest item event that is neither done nor dead"),
    "sightline_nearline_dead_events": Family("gauge", "Item events that were given up, and are kept"),
    "sightline_nearline_batch_seconds": Family("histogram", "Time of one batch, captions to records", buckets=SLOW),
    "sightline_nearline_lag_seconds": Family(
        "histogram", "Time from an item event to its record in the store", buckets=LAG
    ),
    "sightline_supervisor_restarts_total": Family(
        "counter", "Models and servers brought back; target: the model or tritonserver; result: restored, failed",
        ("target", "result"),
    ),
    "sightline_supervisor_recovery_seconds": Family(
        "histogram", "Time from the death of a model's process to its first answer", ("target",), SLOW
    ),
}  # fmt: skip


class Sample(NamedTuple):
    """One line of an exposition; a histogram has one per bucket, its sum and its count."""

    family: str
    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Metrics:
    """The metrics of one process; safe to use from any thread."""

    def __init__(
        self, pb_utils: Any = None, *, model: str, instance: str = "0", flush_seconds: float = 1.0
    ) -> None:
        """Count in this process; with Triton's `triton_python_backend_utils`, send the counts to the server, too.

        Args:
            pb_utils: None: `text` and `value` are the only ways to read.
            model: the label of that name.
            instance: `args["model_instance_name"]` of a model, the label of gauges that each instance sets for itself.
            flush_seconds: between two messages to the server.
        """
        self._fixed = {"model": model, "instance": instance}
        self._lock = threading.Lock()
        # Counter and gauge: [value]. Histogram: [sum, observations per bucket …, observations above the last].
        self._series: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        self._calls: dict[tuple[Any, ...], list[float]] = {}
        self._closed = threading.Event()
        self._sender: threading.Thread | None = None
        if hasattr(pb_utils, "MetricFamily"):
            self._sender = threading.Thread(
                target=self._send, args=(pb_utils, flush_seconds), name="metrics", daemon=True
            )
            self._sender.start()

    def counter(self, name: str, **labels: str) -> Callable[[float], None]:
        """What adds to a counter, for a place that does so often: the series is looked up once, and is there from now
        on, at 0.
        """
        with self._lock:
            series = self._find(name, "counter", labels)

        def add(amount: float) -> None:
            with self._lock:
                series[0] += amount

        return add

    def histogram(self, name: str, **labels: str) -> Callable[[float], None]:
        """What adds an observation to a histogram; as `counter`."""
        with self._lock:
            series = self._find(name, "histogram", labels)
        buckets = FAMILIES[name].buckets

        def add(value: float) -> None:
            with self._lock:
                series[0] += value
                series[1 + bisect_left(buckets, value)] += 1

        return add

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self.counter(name, **labels)(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._find(name, "gauge", labels)[0] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self.histogram(name, **labels)(value)

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples called `name` (of a histogram `…_bucket`, `…_sum` or `…_count`) that have these labels."""
        return sum(s.value for s in self.samples() if s.name == name and labels.items() <= dict(s.labels).items())

    def samples(self) -> list[Sample]:
        """What an exposition of this process holds, families in the order of the table."""
        with self._lock:
            series = {key: list(values) for key, values in self._series.items()}
        order = {name: place for place, name in enumerate(FAMILIES)}
        return [
            sample
            for (name, labels), values in sorted(series.items(), key=lambda item: (order[item[0][0]], item[0][1]))
            for sample in self._expand(name, labels, values)
        ]

    def text(self) -> str:
        """The exposition in Prometheus' text format 0.0.4."""
        lines, last = [], ""
        for sample in self.samples():
            if sample.family != last:
                last, family = sample.family, FAMILIES[sample.family]
                lines += [f"# HELP {last} {family.help}", f"# TYPE {last} {family.kind}"]
            labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in sample.labels)
            lines.append(f"{sample.name}{{{labels}}} {sample.value:.17g}")
        return "".join(f"{line}\n" for line in lines)

    def close(self) -> None:
        """Send what is left and end the thread; counting goes on, in this process."""
        self._closed.set()
        if self._sender:
            self._sender.join(timeout=5)

    def _find(self, name: str, kind: str, labels: dict[str, str]) -> list[float]:
        """The series, under the lock. What was found once is found again by the call's own arguments."""
        call = (name, kind, *labels.items())
        series = self._calls.get(call)
        if series is None:
            series = self._calls[call] = self._make(name, kind, labels)
        return series

    def _make(self, name: str, kind: str, labels: dict[str, str]) -> list[float]:
        family = FAMILIES.get(name)
        given = labels | {"instance": self._fixed["instance"]} if family and "instance" in family.labels else labels
        if family is None or family.kind != kind or given.keys() != set(family.labels):
            raise ConfigError(_refusal(name, kind, labels))
        key = (name, tuple(given[label] for label in family.labels))
        return self._series.setdefault(key, [0.0] * (2 + len(family.buckets) if kind == "histogram" else 1))

    def _expand(self, name: str, values: tuple[str, ...], series: list[float]) -> Iterator[Sample]:
        family = FAMILIES[name]
        labels = (("model", self._fixed["model"]), *zip(family.labels, values, strict=True))
        if family.kind != "histogram":
            yield Sample(name, name, labels, series[0])
            return
        total = 0.0
        for bound, count in zip((*family.buckets, float("inf")), series[1:], strict=True):
            total += count
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield Sample(name, f"{name}_bucket", (*labels, ("le", le)), total)
        yield Sample(name, f"{name}_sum", labels, series[0])
        yield Sample(name, f"{name}_count", labels, total)

    def _send(self, pb_utils: Any, seconds: float) -> None:
        server, failed = _Server(pb_utils), False
        while True:
            last = self._closed.wait(seconds)
            try:
                server.update(self.samples())
            except pb_utils.TritonModelException as error:  # as where the server was started without metrics
                if not failed:
                    pb_utils.Logger.log_warn(f"metrics of {self._fixed['model']} do not reach the server: {error}")
                failed = True
            if last:
                return


class _Server:
    """The metrics that this process has declared in its Triton server."""

    def __init__(self, pb_utils: Any) -> None:
        self._kinds = pb_utils.MetricFamily
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._sent: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def update(self, samples: list[Sample]) -> None:
        """Bring the server's metrics up to `samples`; what did not change is no message."""
        for family, name, labels, value in samples:
            key = (name, labels)
            before = self._sent.get(key)
            if value == before:
                continue
            gauge = FAMILIES[family].kind == "gauge"
            if before is None:
                self._metrics[key] = self._declare(name, FAMILIES[family].help, gauge).Metric(labels=dict(labels))
            if gauge:
                self._metrics[key].set(value)
            else:
                self._metrics[key].increment(value - (before or 0.0))
            self._sent[key] = value

    def _declare(self, name: str, text: str, gauge: bool) -> Any:
        if name not in self._families:
            kind = self._kinds.GAUGE if gauge else self._kinds.COUNTER
            family = self._kinds(name=name, description=text, kind=kind)
            # Never freed: its end would remove the series of other processes that have the same.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(family))
            self._families[name] = family
        return self._families[name]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _refusal(name: str, kind: str, labels: dict[str, str]) -> str:
    if name not in FAMILIES:
        return f"metric {name!r}: expected one of sightline.metrics.FAMILIES; declare it there"
    family = FAMILIES[name]
    wanted = ", ".join(label for label in family.labels if label != "instance") or "no labels"
    return f"metric {name}: a {family.kind} with {wanted}; got a {kind} with {', '.join(labels) or 'no labels'}"
