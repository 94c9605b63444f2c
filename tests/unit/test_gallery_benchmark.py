"""The benchmark of merged search, small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import merge
from benchmarks.merge import Bench, MergeOptions, Way, generate, recall
from sightline.errors import ConfigError, GalleryError


def test_report_has_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "KINDS", ("flat", "hnsw"))
    monkeypatch.setattr(merge, "FRACTIONS", (0.5,))
    monkeypatch.setattr(Bench, "_peers", lambda self, *_: self.skipped.append("hnswlib: no compiler") or {})
    threads = merge.faiss.omp_get_max_threads()
    try:
        document = Bench(MergeOptions(items=1500, dimension=8, queries=64, runs=2, out=tmp_path / "bench")).run()
    finally:
        merge.faiss.omp_set_num_threads(threads)
    assert json.loads((tmp_path / "bench" / "report.json").read_text()) == document
    page = (tmp_path / "bench" / "report.md").read_text()
    assert "Left out: hnswlib: no compiler" in page
    for name in merge.AIMS:
        of_points = {point["index"]: point[name] for point in document["points"]}
        assert document["worst_by_index"][name] == of_points
        assert document[name] in of_points.values()
    flat, hnsw = document["points"]
    assert {way["recall"] for way in flat["ways"].values()} == {1.0}
    assert all(way["recall"] >= 0.95 and way["us"] > 0 for way in hnsw["ways"].values())
    assert hnsw["rows"]["old"]["found"] == hnsw["rows"]["new"]["found"] == 750
    assert flat["memory_mb"]["disk"] > flat["memory_before_mb"]["disk"] > 0


def test_smallest_effort_is_found() -> None:
    truth, options = np.arange(100).reshape(10, 10), MergeOptions(queries=10)
    for needed in (1, 2, 37, 64):
        way = Way("some", lambda rows, effort, needed=needed: truth[rows] if effort >= needed else -truth[rows], truth)
        way.tune(options)
        assert (way.effort, way.recall) == (needed, 1.0)
    with pytest.raises(GalleryError, match=r"some: recall 0.0.* with effort 4096; --recall is too high"):
        Way("some", lambda rows, effort: -truth[rows], truth).tune(options)


def test_generated_vectors() -> None:
    options = MergeOptions(items=1000, dimension=5, queries=3)
    spaces, again = generate(options), generate(options)
    for items, queries, same in zip(spaces.items, spaces.queries, again.items, strict=True):
        assert (items.shape, queries.shape, items.dtype) == ((1000, 5), (3, 5), np.float32)
        np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, atol=1e-6)
        assert (items == same).all()
    assert recall(np.array([[1, 2, -1]]), np.array([[2, 3, 4]])) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"--recall: got 2.0, expected 0.1 to 0.999"):
        MergeOptions(recall=2.0)
