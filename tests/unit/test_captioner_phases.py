"""Phases of the captioner's training: the best weights stay, also of a run that was stopped; masked pre-training."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from sightline.errors import ConfigError
from sightline.schema import ITEMS, read_interactions, read_items, read_record, write_dataset
from trainer import captioner
from trainer.captioner import CaptionerConfig, train_captioner
from trainer.captioner_model import new_captioner, train_tokenizer
from trainer.splits import Split, micros, training_items
from trainer.tower import Masked

EVERY_STEP = {"batch": 4, "eval_every": 1, "patience": 2, "checkpoint_seconds": 0.0}
LOSSES = {"tower": [2.0, 1.0, 3.0, 0.5], "caption": [3.0, 1.0, 2.0, 1.5, 0.1, 0.1]}


@pytest.fixture
def scripted(monkeypatch):
    """Validation losses by phase and look, as `LOSSES` has them; the weights at each look."""
    seen = {name: [] for name in LOSSES}

    def valid_loss(run, module, name, loss_of):
        seen[name].append({key: value.clone() for key, value in module.state_dict().items()})
        return LOSSES[name][len(seen[name]) - 1]

    monkeypatch.setattr(captioner._Run, "_valid_loss", valid_loss)
    return seen


def stopped(monkeypatch, phase, step, *run):
    """A run that is interrupted right after its checkpoint of this step."""
    keep = captioner._Run._checkpoint

    def checkpoint(run, **state):
        keep(run, **state)
        if state["phase"] == phase and state["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(captioner._Run, "_checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train_captioner(*run)


def test_each_phase_ends_with_its_best_weights(catalogue, tmp_path, scripted, monkeypatch):
    config = CaptionerConfig(**EVERY_STEP, tower_steps=4, steps=6)
    whole = train_captioner(catalogue, tmp_path / "whole", config)
    assert whole["kept"] == {"tower": 4, "caption": 2}
    assert [look["valid_loss"] for look in whole["history"]["caption"]] == LOSSES["caption"][:4], "two without gain"
    saved = captioner.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    best, last = scripted["caption"][1], scripted["caption"][3]
    assert all(torch.equal(saved[key], best[key]) for key in best)
    assert not all(torch.equal(saved[key], last[key]) for key in last)
    with np.load(tmp_path / "whole" / "words.npz") as words:
        assert np.array_equal(words["weight"], scripted["tower"][3]["head.weight"].numpy())

    for seen in scripted.values():
        seen.clear()
    stopped(monkeypatch, "caption", 3, catalogue, tmp_path / "stopped", config)  # one look after the best one
    again = train_captioner(catalogue, tmp_path / "stopped", config)
    assert {key: again[key] for key in ("version", "kept", "history")} == {
        key: whole[key] for key in ("version", "kept", "history")
    }


def test_a_loss_that_is_no_number_is_said(catalogue, tmp_path, scripted, monkeypatch):
    monkeypatch.setitem(LOSSES, "tower", [float("nan")] * 4)
    with pytest.raises(ConfigError, match="tower: the loss on held-out items is no number"):
        train_captioner(catalogue, tmp_path / "out", CaptionerConfig(**EVERY_STEP, tower_steps=4, steps=1))


def test_pretraining_continues_to_the_same_captioner(catalogue, tmp_path, monkeypatch):
    config = CaptionerConfig(pretrain_steps=8, tower_steps=3, steps=2, batch=8, eval_every=4, checkpoint_seconds=0.0)
    whole = train_captioner(catalogue, tmp_path / "whole", config)
    assert list(whole["history"]) == ["pretrain", "tower", "caption"]
    looks = [look["valid_loss"] for look in whole["history"]["pretrain"]]
    assert looks[-1] < looks[0]
    for phase, step in (("pretrain", 5), ("tower", 2)):
        out = tmp_path / phase
        stopped(monkeypatch, phase, step, catalogue, out, config)
        again = train_captioner(catalogue, out, config)
        assert again["version"] == whole["version"]
        assert again["history"] == whole["history"]


def test_pretraining_looks_at_what_it_may(catalogue, tmp_path, monkeypatch):
    """Pictures of training items without a caption always; those of later items only where asked for."""
    items, interactions, record = read_items(catalogue), read_interactions(catalogue), read_record(catalogue)
    rows = items.to_pylist()
    may = training_items(items, interactions, record, Split.of(record, micros(interactions["timestamp"])), seed=0)
    silent = {rows[at]["item_id"] for at in np.flatnonzero(may)[:7]}
    for row in rows:
        row["text"] = None if row["item_id"] in silent else row["text"]
    write_dataset(tmp_path / "d", pa.Table.from_pylist(rows, ITEMS), interactions, record)
    drawn = set()
    keep = captioner.Pixels.batch

    def listening(pixels, chosen):
        drawn.update(pixels.ids[row] for row in chosen)
        return keep(pixels, chosen)

    monkeypatch.setattr(captioner.Pixels, "batch", listening)
    training = {row["item_id"] for row in items.filter(pa.array(may)).to_pylist()}
    found = {}
    for name, options in {
        "off": {}, "training": {"pretrain_steps": 8}, "all": {"pretrain_steps": 8, "pretrain_unseen": True},
    }.items():  # fmt: skip
        drawn.clear()
        config = CaptionerConfig(**options, tower_steps=1, steps=1, batch=32, eval_every=20)
        found[name] = train_captioner(tmp_path / "d", tmp_path / name, config)["items"]
        assert bool(drawn & silent) == (name != "off")
        assert bool(drawn - training) == (name == "all")
    assert [one["without_caption"] for one in found.values()] == [0, 7, 7 + int((~may).sum())]
    assert len({(one["train"], one["valid"]) for one in found.values()}) == 1


def test_hidden_patches_are_hidden():
    """What a mask covers changes neither what the tower says of it nor of the rest, and is all that is measured."""
    model = new_captioner("tiny", train_tokenizer(["a mug"]))
    masked = Masked(model)
    torch.nn.init.normal_(masked.token)
    told = []
    masked.head.register_forward_hook(lambda _, __, out: told.append(out.detach()))
    x = torch.rand(2, 3, 72, 72)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, 7] = True  # second row and column of 12 × 12 pixels
    other = x.clone()
    other[:, :, 12:24, 12:24] += 1
    losses = [masked(pixels, mask) for pixels in (x, other)]
    assert torch.equal(*told)
    assert not torch.isclose(*losses)
    shown = x.clone()
    shown[:, :, :12, :12] += 1
    masked(shown, mask)
    assert not torch.equal(told[0], told[2])
    wanted = x[:, :, 12:24, 12:24].flatten(1)
    assert torch.isclose(losses[0], (told[0][:, 7] - wanted).abs().mean())
    losses[0].backward()
    assert masked.token.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [{"pretrain_steps": -1}, {"pretrain_steps": 5, "tower_steps": 0}])
def test_bad_pretraining(bad, tmp_path):
    with pytest.raises(ConfigError, match="expected"):
        CaptionerConfig(**bad)
    with pytest.raises(ConfigError, match="no --from"):
        CaptionerConfig(pretrain_steps=5, start=tmp_path)
