"""The generated catalogue: reproducible, honest about its ceiling, and with combinations really held out."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from catalogue.attributes import SLOTS, Attributes, caption_slots, held_out_pairs
from catalogue.render import FRAMES, SIZE
from catalogue.synthetic import SyntheticConfig, generate
from sightline.errors import ConfigError
from sightline.schema import read_interactions, read_items, read_record, validate
from trainer.splits import Split, micros, training_items

ATTRIBUTES = st.builds(
    Attributes,
    **{slot: st.sampled_from(SLOTS[slot]) for slot in SLOTS if slot != "motion"},
    motion=st.none() | st.sampled_from(SLOTS["motion"]),
)


@given(ATTRIBUTES)
def test_grammar_and_its_inverse(attributes):
    assert caption_slots(attributes.caption()) == set(attributes.slots())


def test_text_outside_the_grammar_has_no_slots():
    assert caption_slots("") == frozenset()
    assert caption_slots("hello, world") == frozenset()


def test_held_out_pairs_leave_every_word_in_training():
    pairs = held_out_pairs(0)
    assert len(pairs) == len(SLOTS["object"])
    assert {o for o, _ in pairs} == set(SLOTS["object"])
    assert all(sum(c == colour for _, c in pairs) < len(SLOTS["object"]) for colour in SLOTS["colour"])


def test_same_seed_same_bytes(catalogue, tmp_path):
    generate(tmp_path / "again", SyntheticConfig(items=240, users=40, sessions_per_user=8))
    for name in ("items.parquet", "interactions.parquet", "dataset.json", "oracle.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (catalogue / name).read_bytes()
    generate(tmp_path / "other", SyntheticConfig(items=240, users=40, sessions_per_user=8, seed=1))
    assert read_items(tmp_path / "other")["media"] != read_items(catalogue)["media"]


def test_media_are_real_and_the_set_is_valid(catalogue):
    assert validate(catalogue)["videos"] > 0
    items = read_items(catalogue).to_pylist()
    image = next(item for item in items if item["media_type"] == "image")
    assert Image.open(io.BytesIO(image["media"])).size == (SIZE, SIZE)
    video = next(item for item in items if item["media_type"] == "video")
    with av.open(io.BytesIO(video["media"])) as container:
        assert len(list(container.decode(video=0))) == FRAMES
    assert "motion" in dict(caption_slots(video["text"]))
    assert "motion" not in dict(caption_slots(image["text"]))


def test_moving_left_moves_left():
    from catalogue.render import render_video

    attributes = Attributes(
        object="ball", colour="red", pattern="plain", size="small", count="single", setting="on snow",
        motion="moving left",
    )  # fmt: skip
    with av.open(io.BytesIO(render_video(attributes, np.random.default_rng(0)))) as container:
        frames = [f.to_ndarray(format="rgb24").astype(int) for f in container.decode(video=0)]
    centres = []
    for frame in frames:
        red = frame[..., 0] - frame[..., 2] > 80
        centres.append(np.nonzero(red)[1].mean())
    assert all(later < earlier for earlier, later in pairwise(centres))


def test_held_out_combinations_only_after_the_cut(catalogue):
    items, record = read_items(catalogue), read_record(catalogue)
    interactions = read_interactions(catalogue)
    split = Split.of(record, micros(interactions["timestamp"]))
    fitted = training_items(items, interactions, record, split, seed=0)
    pairs = {tuple(pair) for pair in record["held_out"]}
    held = np.array([(s := dict(caption_slots(t)))["object"] and (s["object"], s["colour"]) in pairs
                     for t in items["text"].to_pylist()])  # fmt: skip
    assert held.any()
    assert not (held & fitted).any()


def test_no_item_is_shown_before_it_exists(catalogue):
    created = dict(zip(*(read_items(catalogue)[c].to_pylist() for c in ("item_id", "created_at")), strict=True))
    log = read_interactions(catalogue)
    shown = zip(log["item_id"].to_pylist(), log["timestamp"].to_pylist(), strict=True)
    assert all(time >= created[item] for item, time in shown)


def test_bayes_auc_is_the_oracles(catalogue):
    record, log = read_record(catalogue), read_interactions(catalogue)
    probability = pq.read_table(catalogue / "oracle.parquet")["probability"].to_numpy()
    after = micros(log["timestamp"]) >= Split.of(record, micros(log["timestamp"])).test_from
    label = log["label"].to_numpy()
    assert record["auc_bayes"] == pytest.approx(roc_auc_score(label[after], probability[after]))
    assert 0.7 < record["auc_bayes"] < 0.95
    assert abs(label.mean() - probability.mean()) < 0.03  # probabilities, not just an order


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="--items is 3"):
        SyntheticConfig(items=3)
    with pytest.raises(ConfigError, match="--video-share"):
        SyntheticConfig(video_share=1.5)


def test_command(tmp_path):
    from typer.testing import CliRunner

    from sightline.cli import app

    result = CliRunner().invoke(
        app, ["data", "generate", "--out", str(tmp_path / "d"), "--items", "120", "--users", "20",
              "--sessions-per-user", "6"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "best possible AUC" in result.output
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["items"] == 120
