"""Training the captioner: resume, layout, a checkpoint from elsewhere; small sizes, real code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from sightline.annotation import Annotated
from sightline.errors import ConfigError, DataError
from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt, captioner_version
from sightline.schema import MediaReader, read_items, write_dataset
from sightline.words import WordHead
from tests.factories import tiny_captioner
from tests.levels import agree
from trainer import captioner
from trainer.captioner import CaptionerConfig, train_captioner
from trainer.captioner_data import IGNORE, Augmentation, Pixels, Targets
from trainer.captioner_model import EOS, train_tokenizer
from trainer.captioning import (
    caption_baselines,
    caption_items,
    caption_quality,
    describe_pixels,
    read_captions,
    write_captions,
)
from trainer.tower import Patches

SMALL = {"tower_steps": 6, "steps": 6, "batch": 8, "eval_every": 3, "checkpoint_seconds": 0.0}


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioner")
    return out, train_captioner(catalogue, out, CaptionerConfig(**SMALL))


def test_record_and_layout(trained):
    out, record = trained
    assert record["history"]["caption"][-1]["train_loss"] == record["final_loss"]
    assert record["history"]["tower"][-1]["valid_loss"] < record["history"]["tower"][0]["valid_loss"]
    assert json.loads((out / "sightline.json").read_text())["version"] == record["version"] == captioner_version(out)
    model = LlavaForConditionalGeneration.from_pretrained(out)
    assert model.config.text_config.num_key_value_heads == model.config.text_config.num_attention_heads
    prompt = CaptionPrompt.from_pretrained(out)
    auto = AutoTokenizer.from_pretrained(out)
    assert auto("<image> item:")["input_ids"] == prompt.token_ids(1).tolist()
    assert prompt.ids(3).tolist()[1:4] == [prompt.vocab_size + i for i in range(3)]


def test_killed_run_continues_to_the_same_loss(catalogue, trained, tmp_path):
    out, record = tmp_path / "killed", trained[1]
    code = (
        "import sys; from pathlib import Path; from trainer.captioner import *;"
        f"train_captioner(Path(sys.argv[1]), Path(sys.argv[2]), CaptionerConfig(**{SMALL!r}))"
    )
    for _ in range(2):  # killed once in each phase or close to it; then left alone
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(catalogue), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
        while process.poll() is None:
            if (out / "checkpoint.pt").exists() and (out / "checkpoint.pt").stat().st_mtime_ns > before:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
    again = train_captioner(catalogue, out, CaptionerConfig(**SMALL))
    assert again["final_loss"] == pytest.approx(record["final_loss"], rel=1e-6)
    assert again["version"] == record["version"]


def test_a_taught_tower_continues_to_the_same_loss(catalogue, tmp_path, monkeypatch):
    """Stopped while the tower learns from its teacher: the teacher is what it was, running averages included."""
    config = CaptionerConfig(**SMALL, teacher_steps=4)
    whole = train_captioner(catalogue, tmp_path / "whole", config)
    assert list(whole["history"]) == ["teacher", "tower", "caption"]
    keep = captioner._Run._checkpoint

    def stopped(run, **state):
        keep(run, **state)
        if state["phase"] == "tower" and state["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(captioner._Run, "_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_captioner(catalogue, tmp_path / "stopped", config)
    again = train_captioner(catalogue, tmp_path / "stopped", config)
    assert again["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-6)
    assert again["version"] == whole["version"]


def test_items_are_described(trained, catalogue):
    """Vectors and word levels are those of the features that the word classifier was trained on."""
    out, _ = trained
    items = read_items(catalogue)
    ids = items["item_id"].to_pylist()[:12]
    pixels = Pixels(MediaReader(catalogue, items), ids, MediaSpec.from_pretrained(out))
    found = describe_pixels(out, pixels)
    assert found.ids.tolist() == ids
    tower = Patches(LlavaForConditionalGeneration.from_pretrained(out).eval())
    head = WordHead.from_pretrained(out)
    with torch.inference_mode():
        pooled = [tower(pixels.normalised(pixels.batch(np.array([row])))).numpy() for row in range(len(ids))]
    np.testing.assert_allclose(found.vectors, [one.mean(0) for one in pooled], atol=1e-4)
    assert agree(found.confidences, head(pooled))
    assert len(np.unique(found.vectors.round(4), axis=0)) == len(ids)
    levels = [level for one in found.confidences for level in one.values()]
    assert len(set(levels)) > 2
    assert 1 <= min(levels) <= max(levels) <= 9
    annotations = caption_items(out, catalogue, ids)
    assert list(annotations) == ids
    for item, caption, levels in zip(ids, found.captions, found.confidences, strict=True):
        assert Annotated.parse(annotations[item]) == Annotated(caption, confidences=levels)


def test_pictures_are_mirrored_where_no_caption_says_left():
    tokenizer = train_tokenizer(["mug moving left"] * 5)
    assert Targets(["mug moving left"] * 5, tokenizer, EOS).sides
    assert not Targets(["a film"] * 5, tokenizer, EOS).sides
    x = torch.rand(4, 1, 3, 8, 8)
    seen = [Augmentation(shift=0, colour_mix=0.0, flip=True)(x, np.random.default_rng(n))[0] for n in range(8)]
    assert {torch.equal(one, x) for one in seen} == {True, False}
    assert all(torch.equal(one, x) or torch.equal(one, x.flip(-1)) for one in seen)


def test_finished_run_is_not_repeated_and_other_settings_are_refused(catalogue, trained):
    out, record = trained
    assert train_captioner(catalogue, out, CaptionerConfig(**SMALL)) == record
    with pytest.raises(ConfigError, match="other settings"):
        train_captioner(catalogue, out, CaptionerConfig(**SMALL | {"steps": 7}))


def test_other_checkpoint_goes_through_the_same_path(catalogue, tmp_path):
    start = tiny_captioner(tmp_path / "start")
    (start / "sightline.json").unlink()  # as a LLaVA folder from elsewhere
    config = CaptionerConfig(**SMALL, start=start, lr=1e-4)
    record = train_captioner(catalogue, tmp_path / "out", config)
    assert "tower" not in record["history"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    captions = caption_items(tmp_path / "out", catalogue, [1, 2, 3])
    assert set(captions) == {1, 2, 3}


def test_batch_of_captions_equals_single_ones(catalogue, trained):
    out = trained[0]
    ids = read_items(catalogue)["item_id"].to_pylist()[:12]
    together = {i: Annotated.parse(text) for i, text in caption_items(out, catalogue, ids).items()}
    single = {i: Annotated.parse(text) for one in ids for i, text in caption_items(out, catalogue, [one]).items()}
    assert {i: note.caption for i, note in together.items()} == {i: note.caption for i, note in single.items()}
    assert agree([note.confidences for note in together.values()], [note.confidences for note in single.values()])


def test_captions_keep_their_captioner(trained, catalogue, tmp_path):
    captions = {3: Annotated("a, b", confidences={"a": 3}).to_text(), 1: ""}
    write_captions(tmp_path / "c.parquet", captions, "v1")
    assert read_captions(tmp_path / "c.parquet") == (captions, "v1")
    table = pq.read_table(tmp_path / "c.parquet")
    assert table["caption"].to_pylist() == ["a, b", ""], "for people"
    pq.write_table(table.drop_columns("annotation"), tmp_path / "older.parquet")
    with pytest.raises(DataError, match=r"expected item_id, annotation .*found item_id, caption; remove the file"):
        read_captions(tmp_path / "older.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no more")
    for name in ("none.parquet", "damaged.parquet", "."):
        with pytest.raises(DataError, match="sightline caption"):
            read_captions(tmp_path / name)
    items = read_items(catalogue)
    text = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    perfect = caption_quality(catalogue, text, seed=0)
    assert perfect["items"]["attribute_f1"] == perfect["combinations"]["exact_match"] == 1
    annotated = {item: Annotated(one or "", confidences={"red": 9}).to_text() for item, one in text.items()}
    assert caption_quality(catalogue, annotated, seed=0) == perfect
    wrong = caption_quality(catalogue, dict.fromkeys(text, "mug, red, small, single, on wood"), seed=0)
    assert wrong["items"]["attribute_f1"] < 0.6


def test_baselines_need_no_model(catalogue, trained):
    found = caption_baselines(catalogue, trained[0], seed=0)
    assert set(found) == {"most_frequent", "nearest_pixels"}
    # A near picture shares its setting and more; the commonest caption only what is common.
    assert found["nearest_pixels"]["attribute_f1"] > found["most_frequent"]["attribute_f1"]


def test_items_without_media_or_text_do_not_break_training(catalogue, tmp_path):
    import pyarrow as pa

    items = read_items(catalogue).slice(0, 60)
    rows = items.to_pylist()
    rows[0] |= {"media": None, "media_type": None}
    rows[1] |= {"media": b"not an image", "media_type": "image"}
    rows[2] |= {"text": None}
    from sightline.schema import INTERACTIONS, ITEMS

    write_dataset(tmp_path / "d", pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "odd"})
    record = train_captioner(tmp_path / "d", tmp_path / "out", CaptionerConfig(**SMALL))
    assert record["items"]["train"] > 0
    captions = caption_items(tmp_path / "out", tmp_path / "d")
    assert set(captions) == {row["item_id"] for row in rows[2:]}


def test_no_data_set_makes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json"):
        train_captioner(tmp_path / "nope", tmp_path / "out", CaptionerConfig(**SMALL))
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on_is_said(catalogue, tmp_path):
    import pyarrow as pa

    from sightline.schema import INTERACTIONS, ITEMS

    rows = [row | {"text": None} for row in read_items(catalogue).slice(0, 20).to_pylist()]
    write_dataset(tmp_path / "d", pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "mute"})
    with pytest.raises(DataError, match="found none"):
        train_captioner(tmp_path / "d", tmp_path / "out", CaptionerConfig(**SMALL))


def test_changed_colours_are_no_targets():
    captions = ["mug, striped red, small", "shoe, blue, large"] * 5
    tokenizer = train_tokenizer(captions)
    targets = Targets(captions, tokenizer, EOS)
    rows = np.array([0, 1])
    labels = targets.labels(rows, torch.tensor([True, False]))
    kept = [tokenizer.decode(row[row != IGNORE].tolist(), skip_special_tokens=True) for row in labels]
    assert kept == ["mug, striped red, small", "shoe,, large"]
    x = torch.rand(64, 1, 3, 8, 8)
    changed, true_colours = Augmentation(shift=0, colour_mix=0.5)(x, np.random.default_rng(0))
    assert 10 < int(true_colours.sum()) < 54
    assert torch.equal(changed[true_colours], x[true_colours])
    assert not torch.isclose(changed[~true_colours], x[~true_colours]).all((1, 2, 3, 4)).any()


@pytest.mark.parametrize("bad", [{"size": "huge"}, {"steps": 0}, {"valid_share": 0.9}, {"tower_steps": -1}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        CaptionerConfig(**bad)


def test_tokenizer_gives_back_any_text():
    tokenizer = train_tokenizer(["mug, striped red, small"])
    for text in ("mug, red", "Ünïcode ☃ 12", "new words, too"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text
