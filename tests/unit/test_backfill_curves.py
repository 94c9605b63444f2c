"""What is said about curves: gains, flips, drops, their intervals, the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.backfilling.curves import Method, evaluate, flips, summarise
from evaluation.backfilling.orders import descending, random_orders, spread
from evaluation.backfilling.ranks import POINTS, Outcomes, Relevance, Side
from evaluation.backfilling.report import write_report
from sightline.errors import ConfigError


def made(curve: np.ndarray, noise: float, queries: int = 400, seed: int = 0) -> Outcomes:
    """Queries whose average precision is `curve` plus noise of their own; a first hit where that is above ½."""
    own = np.random.default_rng(seed).normal(0, noise, (queries, 1))
    precision = (curve + own).astype(np.float32)
    return Outcomes(
        precision=precision, before=np.where(precision > 0.5, 0, 3).astype(np.int32), queries=np.arange(queries)
    )


def test_relative_gain_is_the_share_of_the_way_from_old_to_new() -> None:
    curve = np.linspace(0.2, 0.6, POINTS)
    found = summarise([made(curve, 0.1)], [made(np.array([0.2]), 0.1)], [made(np.array([0.6]), 0.1)])["mAP"]
    assert found["relative_gain"]["value"] == pytest.approx(0.5, abs=1e-5)
    assert found["auc"]["value"] == pytest.approx(found["old"] + 0.2, abs=1e-5)
    assert found["old"] == pytest.approx(0.2, abs=0.02)
    low, high = found["auc"]["ci95"]
    assert low < found["auc"]["value"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)  # 1.96 standard errors to both sides
    assert found["drop"] == {"steps": 0, "most": 0.0, "significant": 0, "significant_most": 0.0}


def test_own_gain_leaves_out_what_the_end_adds() -> None:
    curve = np.linspace(0.2, 1.0, POINTS)
    found = summarise([made(curve, 0.1)], [made(np.array([0.2]), 0.1)], [made(np.array([0.6]), 0.1)])["mAP"]
    assert found["relative_gain"]["value"] == pytest.approx(1.0, abs=1e-5)
    assert found["own_gain"]["value"] == pytest.approx(0.5, abs=1e-5)
    old, new = made(np.array([0.2 + 1e-12]), 0.1), made(np.array([0.6]), 0.1)
    flat = summarise([made(0 * curve + 0.2, 0.1)], [old], [new])["mAP"]
    assert flat["own_gain"] == {"value": None, "ci95": None}


def test_a_drop_counts_if_the_queries_agree_on_it() -> None:
    curve = np.linspace(0.3, 0.5, POINTS)
    curve[12:15] = 0.35
    sure = summarise([made(curve, 0.2)], [made(curve[:1], 0.2)], [made(curve[-1:], 0.2)])["mAP"]["drop"]
    assert (sure["steps"], sure["significant"]) == (1, 3)
    assert sure["most"] == pytest.approx(curve[11] - 0.35, abs=1e-5)
    noisy = made(curve, 0.0)
    shaken = np.random.default_rng(1).normal(0, 0.9, noisy.precision.shape)
    shaken -= shaken.mean(0)
    noise = Outcomes(
        precision=(noisy.precision + shaken).astype(np.float32), before=noisy.before, queries=noisy.queries
    )
    unsure = summarise([noise], [made(curve[:1], 0.2)], [made(curve[-1:], 0.2)])["mAP"]["drop"]
    assert unsure["steps"] > 0
    assert unsure["significant"] == 0


def test_flips_are_against_the_best_so_far() -> None:
    before = np.array([[0, 1, 1, 0], [1, 0, 2, 3], [5, 4, 3, 2], [0, 0, 0, 0]], np.int32)
    one = Outcomes(precision=np.ones((4, 4), np.float32), before=before, queries=np.arange(4))
    assert flips(one).tolist() == [0, 0.25, 0.5, 0.25]


def test_runs_over_different_queries_are_refused() -> None:
    one, two = made(np.ones(POINTS), 0.1), made(np.ones(POINTS), 0.1, queries=300)
    with pytest.raises(ConfigError, match="the same queries"):
        summarise([one, two], [one, two], [one, two])


def test_spread_takes_the_worst_of_every_cluster_first() -> None:
    scores, clusters = np.array([9, 8, 7, 6, 5, 1.0]), np.array([0, 0, 0, 0, 1, 1])
    assert descending(scores).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread(scores, clusters).tolist() == [0, 4, 1, 2, 5, 3]


def test_the_own_order_backfills_the_uncertain_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 6
    centres = np.eye(6, dtype=np.float32)[labels]
    lost = np.arange(60) < 20  # these the old model cannot tell apart
    old = np.where(lost[:, None], rng.normal(size=(60, 6)), centres + 0.1 * rng.normal(size=(60, 6)))
    old_side = Side(queries=centres, gallery=old.astype(np.float32))
    method = Method(
        old=old_side, new=Side(queries=centres, gallery=centres),
        orders={"uncertainty": descending(lost + 0.01 * rng.random(60))},
    )
    relevance = Relevance(query_labels=labels, gallery_labels=labels, itself=np.arange(60))
    found = evaluate({"one": method}, relevance, random_orders(60, [0, 1]))["one"]
    assert list(found) == ["random 0", "random 1", "uncertainty"]
    assert found["uncertainty"].precision.mean() > found["random 0"].precision.mean()

    single = [Outcomes(precision=one.precision[:, [at]], before=one.before[:, [at]], queries=one.queries)
              for one, at in ((found["uncertainty"], 0), (found["uncertainty"], -1))]  # fmt: skip
    summaries = {name: summarise([one], [single[0]], [single[1]]) for name, one in found.items()}
    methods = {"one": {"random": summaries["random 0"], "uncertainty": summaries["uncertainty"]}}
    paths = write_report({"set": "made", "command": "none", "methods": methods}, tmp_path)
    assert json.loads(paths[0].read_text())["methods"]["one"]["uncertainty"]["mAP"]["relative_gain"]["value"] > 0.5
    table = [line for line in paths[1].read_text().splitlines() if line.startswith("| one |")]
    assert len(table) == 2
    assert paths[2].read_bytes().startswith(b"\x89PNG")
