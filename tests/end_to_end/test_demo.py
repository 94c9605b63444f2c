"""The whole job in small, and the chain's parity: eager = ONNX = served, from pixels to score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from serving.triton import TritonServer
from sightline import release
from sightline.annotation import plain
from sightline.schema import MediaReader, read_items
from sightline.tokens import TokenSpec
from trainer.captioning import caption_items
from trainer.ranker_model import EmbedGraph, RankerShape, ScoreGraph, new_ranker


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("artifacts")
    done = subprocess.run(
        [sys.executable, "-m", "sightline.cli", "demo", "--small", "--root", str(root)],
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root, done.stdout


def test_last_line_is_the_figures(demo):
    root, out = demo
    figures = json.loads(out.strip().splitlines()[-1])
    for key in ("caption_attribute_f1", "caption_attribute_f1_items", "auc_ids", "auc_tokens", "lift_ci95",
                "auc_bayes", "latency_ms", "seconds"):  # fmt: skip
        assert figures[key] is not None, key
    assert set(figures["seconds"]) == {"data", "captioner", "captions", "ranker", "build", "serve", "total"}
    assert {"caption", "vision_encoder", "tensorrt_llm", "tokenize", "lookup", "embed", "score"} <= set(
        figures["latency_ms"]["stages"]
    )
    for path in ("rank_media", "rank_media_stored", "rank_items"):
        assert figures["latency_ms"][path]["p50"] > 0
    assert len(figures["stand_ins"]) == 2
    assert (root / "demo" / "synthetic-small" / "ranking.png").stat().st_size > 10_000
    assert "held-out images and videos for user" in out


def test_served_equals_eager_from_pixels_to_score(demo, tmp_path):
    from sightline_client import RankClient

    root, _ = demo
    run, data = root / "demo" / "synthetic-small", root / "data" / "synthetic-small"
    items = read_items(data)
    chosen = items["item_id"].to_pylist()[-8:]
    reader = MediaReader(data, items)
    captions = caption_items(run / "captioner", data, chosen)

    document = json.loads((run / "ranker" / "ranker.json").read_text())
    shape = RankerShape.from_json(document["shape"])
    model = new_ranker(shape, 0)
    model.load_state_dict(torch.load(run / "ranker" / "model.pt"))
    tokens = TokenSpec.load(run / "ranker" / "token_spec.json").encode_batch([captions[i] for i in chosen])
    indices = dict(zip(*pq.read_table(run / "ranker" / "users.parquet").to_pydict().values(), strict=True))
    users = pq.read_table(run / "ranker" / "features" / "users.parquet").to_pylist()
    user = max(users, key=lambda row: row["dense"][0])
    known = {row["item_id"]: row["item_index"] for row in pq.read_table(run / "ranker" / "items.parquet").to_pylist()}
    context = [min(3, c["cardinality"] - 1) for c in document["context"]]

    def rows(value: object, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.tile(np.array(value, dtype=dtype), (len(chosen), 1)))

    with torch.no_grad():
        features = EmbedGraph(model)(
            rows([indices[user["id"]]], np.int64),
            torch.tensor([[known.get(item, 0)] for item in chosen]),
            rows(context, np.int64), torch.from_numpy(tokens),
            rows(user["tokens"], np.int64), rows(user["weights"], np.float32),
            rows(user["negative_tokens"], np.int64), rows(user["negative_weights"], np.float32),
        )  # fmt: skip
        eager = ScoreGraph(model)(features, rows(user["dense"], np.float32))[:, 0].numpy()

    media = [reader[item] for item in chosen]
    named = {c["name"]: value for c, value in zip(document["context"], context, strict=True)}
    with (
        TritonServer(release.current(root / "releases"), log_path=tmp_path / "log") as server,
        RankClient(server.url, timeout=60) as client,
    ):
        by_id = client.rank_items(user["id"], chosen, context=named)
        together = client.rank(user["id"], media, item_ids=chosen, context=named)
        alone = [
            client.rank(user["id"], [one], item_ids=[item], context=named)[0]
            for one, item in zip(media, chosen, strict=True)
        ]
        stranger = client.rank(10**9, media[:1])[0]
    for one in together:
        assert one.caption == plain(captions[chosen[one.index]]) == alone[one.index].caption
        assert one.score == pytest.approx(eager[one.index], abs=1e-4)
        assert one.score == pytest.approx(alone[one.index].score, abs=1e-4)
    assert 0 <= stranger.score <= 1
    np.testing.assert_allclose(by_id.scores, eager, atol=1e-4)
    assert not by_id.status.any(), "the release brought the features of all items"


def test_finished_phases_are_not_repeated(demo):
    root, _ = demo
    before = (root / "demo" / "synthetic-small" / "captioner" / "model.safetensors").stat().st_mtime_ns
    from sightline.demo import run_demo

    again = run_demo(None, root, small=True)
    after = (root / "demo" / "synthetic-small" / "captioner" / "model.safetensors").stat().st_mtime_ns
    assert before == after
    assert again["caption_attribute_f1_items"] is not None


def test_folder_of_unknown_layout_is_refused(tmp_path):
    command = [sys.executable, "-m", "sightline.cli", "demo", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ratings.csv" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranking_while_the_captioner_is_exchanged(demo, tmp_path):
    """The ends are the ranker on all old and all new captions; each point in between has its share of both."""
    from benchmarks import migration
    from evaluation.migration import scores_of
    from trainer.captioning import read_captions

    root, _ = demo
    run, data = root / "demo" / "synthetic-small", root / "data" / "synthetic-small"
    options = migration.MigrationOptions(
        run=run, data=data, out=tmp_path / "out", tower_steps=2, steps=2, points=3, draws=10
    )
    report = migration.measure(options)
    assert [point["fraction"] for point in report["points"]] == [0, 0.5, 1]
    new = read_captions(next(run.glob("captions-*.parquet")))[0]
    old = read_captions(next((tmp_path / "out").glob("captions-*.parquet")))[0]
    without = report["without_carry_over"]
    assert [point["fraction"] for point in without] == [0, 0.5]
    none = dict.fromkeys(new, "")
    for captions, point in ((old, report["points"][0]), (new, report["points"][-1]), (none, without[0])):
        found = scores_of(data, run / "ranker", captions, tmp_path / "examples.parquet")
        assert roc_auc_score(found["label"], found["score"]) == pytest.approx(point["all"]["auc"])
    worse = min((report["points"][0], report["points"][-1]), key=lambda point: point["all"]["auc"])
    assert worse["all"]["lift_ci95"] == [0, 0]
    assert (tmp_path / "out" / "auc.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "report.json").read_text())["points"] == report["points"]
