"""benchmarks/: what goes into perf_analyzer and what comes out as a report; the real runs are end to end."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import perf_analyzer, report
from benchmarks.inputs import held_out_requests, write_json
from benchmarks.perf_analyzer import Measurement, parse
from benchmarks.throughput import MODELS, BenchOptions, _median, _profile
from sightline import schema
from sightline.errors import ConfigError, DataError, ServingError

CSV = """\
Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
4,93.5595,11,993,19915,78,20767,253,2,42006,42591,42912,43939
"""


def test_perf_analyzer_table_is_read_in_milliseconds() -> None:
    measured = parse(CSV, "Request concurrency: 4\n  Client: \n    Request count: 281\n")
    assert measured == Measurement(
        concurrency=4, requests=281, per_second=93.5595, p50=42.006, p95=42.912, p99=43.939)


def test_perf_analyzer_without_a_count_is_an_error() -> None:
    with pytest.raises(ServingError, match="Request count"):
        parse(CSV, "nothing")


@pytest.mark.parametrize(("script", "message"), [
    ("echo 'failed to connect' >&2; exit 7", "m: .* at concurrency 2 with code 7: failed to connect"),
    ("exec sleep 60", "m: no measurement at concurrency 2 within 2 s"),
])
def test_a_failed_or_endless_measurement_is_an_error(
        script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "perf_analyzer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(perf_analyzer, "TOOL", tool)
    monkeypatch.setattr(perf_analyzer, "LIMIT_SECONDS", 2)
    with pytest.raises(ServingError, match=message):
        perf_analyzer.measure("m", url="x", inputs=tmp_path / "in.json", concurrency=2, window_requests=5)


def test_input_file_holds_the_wire_format(tmp_path: Path) -> None:
    media, features = b"\x89PNG\0\x01", np.arange(6, dtype=np.float32).reshape(2, 3)
    write_json(tmp_path / "in.json", [{"MEDIA": np.array([media], dtype=object), "FEATURES": features}])
    (row,) = json.loads((tmp_path / "in.json").read_text())["data"]
    assert base64.b64decode(row["MEDIA"]["content"]["b64"]) == b"\x06\0\0\0" + media
    assert row["MEDIA"]["shape"] == [1]
    assert base64.b64decode(row["FEATURES"]["content"]["b64"]) == features.tobytes()
    assert row["FEATURES"]["shape"] == [2, 3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six items a day apart: images 1 to 4, a video 5, and 6 without media; three impressions."""
    start = datetime(2025, 1, 1, tzinfo=UTC)
    days = [start + timedelta(days=day) for day in range(6)]
    items = pa.table({
        "item_id": range(1, 7), "media": [b"m%d" % i for i in range(1, 6)] + [None], "media_uri": [None] * 6,
        "media_type": ["image"] * 4 + ["video", None], "created_at": days, "text": [None] * 6,
    }, schema=schema.ITEMS)
    log = pa.table({
        "user_id": [10, 11, 12], "item_id": [1, 2, 3], "timestamp": days[:3], "label": [0.0, 1.0, 1.0]},
        schema=schema.INTERACTIONS)
    for name, column in (("context_hour", [7, 8, 9]), ("context_position", [1, 2, 3])):
        log = log.append_column(name, pa.array(column, pa.int32()))
    schema.write_dataset(tmp_path / "data", items, log, {"name": "test"})
    return tmp_path / "data"


def test_newest_media_meets_newest_users(data: Path) -> None:
    requests = held_out_requests(data, ["position", "hour"], images=2, videos=2)
    assert [(r.item_id, r.media, r.media_type) for r in requests] == [
        (4, b"m4", "image"), (3, b"m3", "image"), (5, b"m5", "video")]
    assert [(r.user_id, r.context.tolist()) for r in requests] == [(12, [3, 9]), (11, [2, 8]), (10, [1, 7])]


def test_missing_context_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"expects \['context_device'\].*--data"):
        held_out_requests(data, ["hour", "device"], images=1, videos=0)


def test_nothing_to_caption_is_an_error(data: Path) -> None:
    with pytest.raises(DataError, match="expected items with media"):
        held_out_requests(data, ["hour"], images=0, videos=0)


@pytest.mark.parametrize(("options", "message"), [
    ({"concurrency": (2, 4)}, r"--concurrency: got \(2, 4\)"),
    ({"concurrency": (1, 4, 2)}, "--concurrency"),
    ({"concurrency": ()}, "--concurrency"),
    ({"runs": 0}, "--runs: got 0, expected 1 or more"),
    ({"window_requests": 1}, "--window-requests: got 1, expected 5 or more"),
    ({"images": 0, "videos": 0}, "at least one item"),
])
def test_impossible_options_name_the_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**options)


def test_a_figure_is_the_median_of_its_runs() -> None:
    runs = [Measurement(concurrency=2, requests=60, per_second=rate, p50=p50, p95=2 * p50, p99=p99)
            for rate, p50, p99 in ((90.0, 11.0, 40.0), (100.0, 10.0, 15.0), (50.0, 20.0, 30.0))]
    assert _median(runs) == {"concurrency": 2, "per_s": 90.0, "per_s_low": 50.0, "per_s_high": 100.0,
                             "p50_ms": 11.0, "p95_ms": 22.0, "p99_ms": 30.0, "requests": 180}


def test_overhead_is_what_the_path_does_not_explain() -> None:
    spent = {"rank_media": 10.0, "caption": 7.0, "vision_encoder": 2.0, "tensorrt_llm": 4.0,
             "tokenize": 0.5, "lookup": 0.4, "embed": 0.6, "score": 0.3}  # ms per request, two requests
    before = dict.fromkeys(MODELS, (10_000_000, 5_000))
    after = {model: (10_000_000 + int(2e6 * ms), 5_000 + int(2e5)) for model, ms in spent.items()}
    profile = _profile(22.0, 2, before, after)
    assert profile["client_ms"] == pytest.approx(11.0)
    assert profile["path_ms"] == pytest.approx(7.0 + 0.5 + 0.6 + 0.3)
    assert profile["overhead_ms"] == pytest.approx(11.0 - 8.4)
    assert profile["wire_ms"] == pytest.approx(11.0 - 10.0)
    assert profile["queue_ms"] == pytest.approx(0.4)
    assert profile["vision_encoder_ms"] == pytest.approx(2.0)


@pytest.fixture
def document() -> dict[str, Any]:
    """What `measure` returns, with figures that are easy to follow."""
    backends = dict.fromkeys(MODELS, "python") | {"tensorrt_llm": "tensorrtllm", "rank_media": "ensemble"}
    backends |= dict.fromkeys(("embed", "score", "vision_encoder"), "onnxruntime")
    sweep = [{"concurrency": c, "per_s": 10.0 * c, "per_s_low": 9.0 * c, "per_s_high": 11.0 * c,
              "p50_ms": 20.0, "p95_ms": 30.0, "p99_ms": 40.0 * c, "requests": 60} for c in (1, 2)]
    parts = ("client_ms", "path_ms", "overhead_ms", "wire_ms", "queue_ms")
    return {
        "at": "2026-01-01", "commit": "abc", "command": "sightline bench", "release": "cpu-0123",
        "hardware": {"cpu": "A CPU", "cores": 2, "load_before": 0.1, "gflops": 90.0, "gb_per_s": 12.0},
        "versions": {"python": "3.11", "perf_analyzer": "2.51.0"}, "runs": 3,
        "stand_ins": ["onnxruntime (python, CPU)", "tensorrtllm (python, CPU)"],
        "inputs": {"image": 2, "video": 1},
        "models": {
            model: {"backend": backend, "stand_in": backend in ("onnxruntime", "tensorrtllm"), "sweep": sweep,
                    "ceiling_per_s": None if model == "lookup" else 200.0}
            for model, backend in backends.items()
        },
        "overhead": dict.fromkeys(parts, 1.5) | {f"{model}_ms": 0.25 for model in MODELS},
    }


def test_report_says_what_stands_in_and_how_far_the_ceiling_is(
        document: dict[str, Any], tmp_path: Path) -> None:
    report.write_report(tmp_path, document)
    page = (tmp_path / "report.md").read_text()
    assert "Taken with CPU stand-ins: onnxruntime (python, CPU), tensorrtllm (python, CPU)" in page
    figures = "20.0 | 18.0–22.0 | 2 | 80.00 | 20.00 / 30.00 / 40.00"
    assert f"| rank_media† | ensemble | {figures} | 200 | 10.0% |" in page
    assert f"| lookup | python | {figures} | – | – |" in page
    assert "| tokenize | python |" in page, "no dagger: nothing stands in for a python model"
    assert all(word in page for word in ("**Question.**", "**Regime.**", "**Ceiling.**"))
    assert json.loads((tmp_path / "report.json").read_text()) == document
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_real_backends_carries_no_caveat(document: dict[str, Any]) -> None:
    document["stand_ins"] = []
    for model in document["models"].values():
        model["stand_in"] = False
    page = report.markdown(document)
    assert "stand-in" not in page
    assert "†" not in page
