"""The benchmark's quick mode on a real server, with the real perf_analyzer."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.throughput import MODELS, BenchOptions, measure
from serving.triton import TritonServer
from sightline import schema
from tests.media_files import clip, picture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images and a video, and a log with the context columns of the small release."""
    folder = tmp_path_factory.mktemp("bench")
    media = [picture("PNG"), picture("JPEG"), clip(folder / "a.mp4", [10, 200, 90, 40])]
    days = [datetime(2025, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    items = pa.table({
        "item_id": [5, 9, 11], "media": media, "media_uri": [None] * 3, "created_at": days,
        "media_type": ["image", "image", "video"], "text": [None] * 3}, schema=schema.ITEMS)
    log = pa.table({
        "user_id": [7, 42, 8], "item_id": [5, 9, 11], "timestamp": [day + timedelta(hours=1) for day in days],
        "label": [0.0, 1.0, 0.0]}, schema=schema.INTERACTIONS)
    for name, column in (("context_hour", [1, 13, 23]), ("context_position", [0, 1, 3])):
        log = log.append_column(name, pa.array(column, pa.int32()))
    schema.write_dataset(folder / "data", items, log, {"name": "bench"})
    return folder / "data"


@pytest.fixture(scope="module")
def document(server: TritonServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("reports")
    return measure(server, BenchOptions.quick(data=data, out=out), progress=lambda line: None)


def test_every_model_was_measured(document: dict[str, Any]) -> None:
    assert list(document["models"]) == list(MODELS)
    for name, model in document["models"].items():
        assert [point["concurrency"] for point in model["sweep"]] == [1, 2], name
        for point in model["sweep"]:
            assert point["requests"] >= 15, name  # three windows of five
            assert point["per_s"] > 0, name
            assert 0 < point["p50_ms"] <= point["p95_ms"] <= point["p99_ms"], name


def test_nothing_beats_its_ceiling(document: dict[str, Any]) -> None:
    for name, model in document["models"].items():
        if model["ceiling_per_s"] is None:
            assert name == "lookup"
        else:
            assert math.isfinite(model["ceiling_per_s"])
            assert max(point["per_s"] for point in model["sweep"]) < model["ceiling_per_s"], name


def test_stages_explain_the_unloaded_request(document: dict[str, Any]) -> None:
    parts = document["overhead"]
    assert parts["caption_ms"] > parts["tensorrt_llm_ms"] > 0
    assert parts["path_ms"] == pytest.approx(
        sum(parts[f"{stage}_ms"] for stage in ("caption", "tokenize", "embed", "score")), abs=0.01)
    assert parts["client_ms"] > parts["rank_media_ms"] > parts["caption_ms"], "from outside in"
    assert parts["overhead_ms"] == pytest.approx(parts["client_ms"] - parts["path_ms"], abs=0.01)


def test_report_files(document: dict[str, Any], server: TritonServer) -> None:
    folder = Path(document["report"])
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(document))
    page = (folder / "report.md").read_text()
    assert server.manifest.release in page
    assert "CPU stand-ins" in page
    assert (folder / "report.png").stat().st_size > 10_000
    for model in MODELS:
        assert json.loads((folder / f"{model}.json").read_text())["data"], model


def test_figures_say_where_they_come_from(document: dict[str, Any], server: TritonServer) -> None:
    assert document["inputs"] == {"image": 2, "video": 1}
    assert document["release"] == server.manifest.release
    assert document["stand_ins"] == server.manifest.stand_ins
    assert {"cpu", "cores", "gflops", "gb_per_s"} <= document["hardware"].keys()
    assert {"python", "perf_analyzer", "onnxruntime"} <= document["versions"].keys()
    assert "\n" not in json.dumps(document, separators=(",", ":"))
