"""FP16 and INT8 are let in by what they cost on held-out inputs, and refused above a stated tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from build import precision
from build.precision import AUC_TOLERANCE, SCORE_TOLERANCE, VISION_TOLERANCE
from build.steps import run
from sightline.errors import ReleaseError
from tests.factories import tiny_captioner, tiny_ranker
from trainer.ranker_model import RankerShape


def held_out(folder: Path, rows: int = 400) -> None:
    """check.npz of a ranker folder: random rows, labels drawn from its own scores."""
    from build.ranker_onnx import export_ranker

    document = json.loads((folder / "ranker.json").read_text())
    shape = RankerShape.from_json(document["shape"])
    rng = np.random.default_rng(5)
    feed = {
        "USER_INDEX": rng.integers(0, shape.users, (rows, 1)),
        "ITEM_INDEX": rng.integers(0, shape.items, (rows, 1)),
        "CONTEXT": np.stack([rng.integers(0, n, rows) for n in shape.context.values()], 1),
        "ITEM_TOKENS": rng.integers(0, shape.token_rows, (rows, document["token_length"])),
        "PROFILE_TOKENS": rng.integers(0, shape.token_rows, (rows, document["profile"]["length"])),
        "PROFILE_WEIGHTS": rng.dirichlet(np.ones(document["profile"]["length"]), rows).astype(np.float32),
        "PROFILE_NEGATIVE_TOKENS": rng.integers(0, shape.token_rows, (rows, document["profile"]["length"])),
        "PROFILE_NEGATIVE_WEIGHTS": rng.dirichlet(np.ones(document["profile"]["length"]), rows).astype(np.float32),
        "DENSE": rng.normal(size=(rows, shape.dense)).astype(np.float32),
    }
    export_ranker(folder, folder / "onnx")
    embed, score = (onnxruntime.InferenceSession(folder / "onnx" / f"{m}.onnx") for m in ("embed", "score"))
    features = embed.run(None, {k: v for k, v in feed.items() if k != "DENSE"})[0]
    scores = score.run(None, {"FEATURES": features, "DENSE": feed["DENSE"]})[0][:, 0]
    label = (scores + rng.normal(scale=scores.std(), size=rows) > np.median(scores)).astype(np.float32)
    np.savez(folder / "check.npz", label=label, **feed)


@pytest.fixture
def ranker(tmp_path: Path) -> Path:
    folder = tiny_ranker(tmp_path / "ranker")
    held_out(folder)
    return folder


def test_vision_in_fp16_is_measured_on_held_out_frames(tmp_path: Path) -> None:
    captioner = tiny_captioner(tmp_path / "captioner")
    run(["vision", str(captioner), str(tmp_path / "noise"), "--precision", "fp16"])
    check = json.loads((tmp_path / "noise" / "vision.json").read_text())["check"]
    assert check["inputs"].startswith("seeded noise")
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(captioner / "check.npz", frames=frames)
    run(["vision", str(captioner), str(tmp_path / "frames"), "--precision", "fp16"])
    check = json.loads((tmp_path / "frames" / "vision.json").read_text())["check"]
    assert (check["inputs"], check["rows"]) == ("held-out frames", 5)
    assert set(check["relative_rms"]) == {"image_features", "pooled_features"}
    assert all(0 < error <= VISION_TOLERANCE for error in check["relative_rms"].values())
    assert "levels_changed" not in check  # the folder has no words.npz
    assert "CPU" in check["how"]  # a figure of this machine does not pass for TensorRT's


def test_word_levels_that_change_in_fp16_are_counted(tmp_path: Path) -> None:
    """Of some hundred levels the few that lie near a step."""
    captioner, words = tiny_captioner(tmp_path / "captioner"), 60
    weight = np.random.default_rng(0).normal(0, 0.1, (words, 32)).astype(np.float32)
    np.savez(
        captioner / "words.npz", words=np.array([f"w{n}" for n in range(words)]), frames=1,
        weight=weight - weight.mean(1, keepdims=True), rate=np.full(words, 0.2, np.float32),
        bias=np.zeros(words, np.float32),
    )  # fmt: skip
    run(["vision", str(captioner), str(tmp_path / "out"), "--precision", "fp16"])
    check = json.loads((tmp_path / "out" / "vision.json").read_text())["check"]
    assert 0 < check["levels_changed"] < 0.1


def test_vision_that_needs_more_than_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = tiny_captioner(tmp_path / "captioner")
    monkeypatch.setattr(precision, "VISION_TOLERANCE", 1e-6)
    with pytest.raises(ReleaseError, match=r"in FP16 are off by .*%.*; build with --precision fp32"):
        run(["vision", str(captioner), str(tmp_path / "out"), "--precision", "fp16"])
    run(["vision", str(captioner), str(tmp_path / "out"), "--precision", "fp32"])


def test_the_ranker_in_fp16(ranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(["ranker", str(ranker), str(tmp_path / "out"), "--precision", "fp16"])
    check = json.loads((tmp_path / "out" / "checks.json").read_text())["gpu"]
    assert (check["inputs"], check["rows"]) == ("held-out rows", 400)
    assert 0 < check["largest_change"] <= SCORE_TOLERANCE
    assert abs(check["auc_loss"]) <= AUC_TOLERANCE
    monkeypatch.setattr(precision, "SCORE_TOLERANCE", 1e-9)
    with pytest.raises(ReleaseError, match=r"a score changes by .* in FP16, expected at most 1e-09"):
        run(["ranker", str(ranker), str(tmp_path / "out"), "--precision", "fp16"])


def test_int8_scores_cost_little_auc_or_are_refused(
    ranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["ranker", str(ranker), str(tmp_path / "plain")])
    run(["ranker", str(ranker), str(tmp_path / "int8"), "--score-int8"])
    check = json.loads((tmp_path / "int8" / "checks.json").read_text())["score_int8"]
    assert check["auc_loss"] <= AUC_TOLERANCE
    assert check["largest_change"] > 0
    plain, quantised = ((tmp_path / name / "score.onnx").read_bytes() for name in ("plain", "int8"))
    assert plain != quantised
    assert b"MatMulInteger" in quantised or b"DynamicQuantizeLinear" in quantised
    monkeypatch.setattr(precision, "AUC_TOLERANCE", -1.0)
    with pytest.raises(ReleaseError, match=r"INT8 loses .* of AUC on 400 held-out rows"):
        run(["ranker", str(ranker), str(tmp_path / "again"), "--score-int8"])
    assert (tmp_path / "again" / "score.onnx").read_bytes() == plain


def test_int8_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    folder = tiny_ranker(tmp_path / "ranker")
    with pytest.raises(ReleaseError, match=r"--score-int8 needs held-out rows with labels \(check\.npz"):
        run(["ranker", str(folder), str(tmp_path / "out"), "--score-int8"])
