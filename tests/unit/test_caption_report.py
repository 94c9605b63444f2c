"""The caption report: every figure on cases by hand, and all of it from the command on a captioner."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from sightline.annotation import Annotated, plain
from sightline.cli import app
from sightline.errors import ConfigError
from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt
from sightline.schema import MediaReader, read_items
from trainer.caption_report import calibration, coverage, reliability, slot_scores
from trainer.captioner import CaptionerConfig, train_captioner
from trainer.captioner_data import Pixels
from trainer.captioning import (
    caption_calibration,
    caption_items,
    caption_quality,
    read_captions,
    sample_items,
    sample_pixels,
    with_samples,
)
from trainer.metrics import GRAMMARS


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioner")
    train_captioner(catalogue, out, CaptionerConfig(tower_steps=6, steps=15, batch=8, eval_every=5))
    return out


def test_slot_scores_by_hand():
    movie = GRAMMARS["movie"]
    ours = ["a comedy and drama film from the 1990s", "a drama film", "a war film"]
    theirs = ["a comedy film from the 1990s", "a drama film from the 1980s", "no film at all"]
    assert slot_scores(ours, theirs, movie) == {
        "decade": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "wanted": 2},
        "genre": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "wanted": 2},
    }
    found = slot_scores(["a drama film"], ["a film from the 1980s"], movie)
    assert [found[slot]["f1"] for slot in ("decade", "genre")] == [0, 0]
    assert (found["genre"]["wanted"], found["genre"]["precision"]) == (0, 0)


def test_coverage_by_hand():
    found = coverage(["a red mug", "a red, red cup"], ["a blue mug", "a mug", "a vase"])
    assert found == {
        "words_covered": 2 / 4,  # a, mug of a, blue, mug, vase
        "words_invented": 2 / 4,  # red, cup of a, red, mug, cup
        "tokens_covered": 5 / 7,
        "tokens_invented": 4 / 7,
    }
    assert coverage(["", ""], ["a", "b"])["tokens_invented"] == 0


def test_reliability_by_hand():
    found = reliability(np.array([0.05, 0.05, 0.85, 0.85, 1.0]), np.array([False, True, True, True, False]))
    assert found["events"] == 5
    assert [row["from"] for row in found["bins"]] == pytest.approx([0, 0.8, 0.9])
    assert [row["events"] for row in found["bins"]] == [2, 2, 1]
    assert [row["predicted"] for row in found["bins"]] == pytest.approx([0.05, 0.85, 1])
    assert [row["observed"] for row in found["bins"]] == [0.5, 1, 0]
    assert found["ece"] == pytest.approx((2 * 0.45 + 2 * 0.15 + 1) / 5)
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    assert reliability(p, rng.uniform(size=len(p)) < p)["ece"] < 0.02
    assert reliability(p, rng.uniform(size=len(p)) < p**2)["ece"] == pytest.approx(1 / 6, abs=0.02)


def test_calibration_is_that_of_the_captioner(catalogue, trained):
    """Token events are the reference's tokens; one item's are right where the decoder, asked after each prefix, is."""
    items = read_items(catalogue)
    ids = items["item_id"].to_pylist()[:20]
    pixels = Pixels(MediaReader(catalogue, items), ids, MediaSpec.from_pretrained(trained))
    text = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    prompt = CaptionPrompt.from_pretrained(trained)
    tokenizer = prompt.tokenizer
    found = calibration(trained, pixels, text)
    tokens = sum(len(tokenizer.encode(text[item], add_special_tokens=False).ids) for item in ids)
    assert found["tokens"]["events"] == tokens
    with np.load(trained / "words.npz") as words:
        assert found["words"]["events"] == len(ids) * len(words["words"])
    one = Pixels(MediaReader(catalogue, items), ids[:1], MediaSpec.from_pretrained(trained))
    model = LlavaForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval()
    wanted = tokenizer.encode(text[ids[0]], add_special_tokens=False).ids
    head = prompt.token_ids(36 * int(one.counts[0])).tolist()
    pixel_values, likeliest, right = one.normalised(one.batch(np.array([0]))), [], []
    for at, token in enumerate(wanted):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([head + wanted[:at]]), pixel_values=pixel_values).logits[0, -1]
        likeliest.append(float(logits.softmax(-1).max()))
        right.append(int(logits.argmax()) == token)
    alone = calibration(trained, one, text)["tokens"]
    by_hand = reliability(np.array(likeliest), np.array(right))
    assert alone["ece"] == pytest.approx(by_hand["ece"], abs=1e-5)
    assert [row["observed"] for row in alone["bins"]] == [row["observed"] for row in by_hand["bins"]]
    whole = caption_calibration(catalogue, trained, seed=0)
    assert whole["tokens"]["events"] != tokens


def test_taste_words_are_not_held_against_captions(catalogue):
    items = read_items(catalogue)
    text = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    tasteful = {item: f"{caption} liked with taste2 and well liked" for item, caption in text.items()}
    assert caption_quality(catalogue, tasteful, seed=0) == caption_quality(catalogue, text, seed=0)


def test_samples_are_drawn_from_the_captioner(catalogue, trained):
    items = read_items(catalogue)
    ids = items["item_id"].to_pylist()[:6]
    pixels = Pixels(MediaReader(catalogue, items), ids, MediaSpec.from_pretrained(trained))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    drawn = sample_pixels(trained, pixels, samples=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(drawn) == set(ids)
    assert {len(one) for one in drawn.values()} == {4}
    assert drawn == sample_pixels(trained, pixels, samples=4, seed=1)
    assert drawn != sample_pixels(trained, pixels, samples=4, seed=2)
    assert len({text for one in drawn.values() for text in one}) > 6
    greedy = caption_items(trained, catalogue, ids)
    cold = sample_items(trained, catalogue, ids, samples=2, temperature=1e-4)
    assert cold == {item: [plain(text)] * 2 for item, text in greedy.items()}
    for bad in ({"samples": 0}, {"samples": 1, "temperature": 0.0}):
        with pytest.raises(ConfigError, match="temperature above 0"):
            sample_pixels(trained, pixels, **bad)


def test_samples_follow_what_is_known_already():
    kept = with_samples({1: "a mug\x1fc red 7\x1fx old", 2: "a cup"}, {1: ["a red mug", ""]})
    assert Annotated.parse(kept[1]) == Annotated("a mug", confidences={"red": 7}, samples=["a red mug", ""])
    assert kept[2] == "a cup"


def test_command_reports_and_samples(catalogue, trained, tmp_path):
    out = tmp_path / "captions.parquet"
    options = ["--data", catalogue, "--captioner", trained, "--out", out, "--samples", 3, "--temperature", 0.7]
    result = CliRunner().invoke(app, ["caption", *map(str, options)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["items"]["slots"]["object"]) == {"precision", "recall", "f1", "wanted"}
    assert report["items"]["recall"]["object"] == report["items"]["slots"]["object"]["recall"]
    assert 0 < report["items"]["coverage"]["words_covered"] <= 1
    assert {"tokens", "words"} == set(report["calibration"])
    for title in ("Per slot", "covered", "Calibration", "expected error"):
        assert title in result.stderr
    annotations, _ = read_captions(out)
    assert all(len(Annotated.parse(text).samples) == 3 for text in annotations.values())
    greedy = {item: plain(text) for item, text in annotations.items()}
    assert greedy == {item: plain(text) for item, text in caption_items(trained, catalogue).items()}
