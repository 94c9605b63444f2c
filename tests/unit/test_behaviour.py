"""Taste words: from likes to captions, and what a captioner may not be blamed for."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from sightline.cli import app
from sightline.errors import ConfigError, DataError
from sightline.schema import read_interactions, read_items, read_record
from trainer import captioner
from trainer.behaviour import LIKING, REACH, behaviour_words, split_behaviour, with_behaviour
from trainer.captioner import CaptionerConfig, train_captioner
from trainer.captioner_data import IGNORE, Targets
from trainer.captioner_model import EOS, train_tokenizer
from trainer.metrics import GRAMMARS
from trainer.splits import Split, micros


def log(groups=3, users=20, items=10, seed=0):
    """Users of a group like its items (ids 1 …) nearly always, others' rarely; the last item has two likes."""
    rng = np.random.default_rng(seed)
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(groups * users), np.arange(groups * items)))
    shown = rng.uniform(size=len(user)) < 0.7
    user, item = user[shown], item[shown]
    label = rng.uniform(size=len(user)) < np.where(user // users == item // items, 0.9, 0.05)
    rare = np.full(2, groups * items)
    return np.append(user, [0, 1]), np.append(item, rare) + 1, np.append(label, [True, True]).astype(np.float32)


def test_items_of_one_taste_share_a_word():
    user, item, label = log()
    items = np.arange(1, 33)
    words = behaviour_words(user, item, label, items=items, clusters=3, min_likes=5, seed=0)
    assert sorted(words) == list(range(1, 31)), "an item with two likes and one without any have no word"
    tastes = [{words[i] for i in range(start, start + 10)} for start in (1, 11, 21)]
    assert [len(taste) for taste in tastes] == [1, 1, 1]
    assert set().union(*tastes) == {f"liked with taste{n}" for n in (1, 2, 3)}
    assert words == behaviour_words(user, item, label, items=items, clusters=3, min_likes=5, seed=0)


def test_words_come_from_the_given_items_and_from_likes_alone():
    user, item, label = log()
    some = np.arange(1, 21)
    words = behaviour_words(user, item, label, items=some, clusters=2, min_likes=5, seed=0)
    other = np.where(np.isin(item, some), label, 1 - label)
    assert set(words) == set(some)
    assert words == behaviour_words(user, item, other, items=some, clusters=2, min_likes=5, seed=0)
    twice = (np.concatenate([one, one]) for one in (user, item, label))
    assert words == behaviour_words(*twice, items=some, clusters=2, min_likes=5, seed=0), "users count, not clicks"


def test_terciles_by_hand():
    """Nine items of a crowd: item n is shown to 10 + n users, the first 13 − n like it. Two users like two others."""
    rows = [(user, n, float(user < 13 - n)) for n in range(1, 10) for user in range(10 + n)]
    rows += [(user, n, 1.0) for n in (10, 11) for user in (90, 91)]
    user, item, label = map(np.array, zip(*rows, strict=True))
    words = behaviour_words(user, item, label, items=range(1, 12), clusters=2, min_likes=2, seed=0, terciles=True)
    slots = {i: dict(split_behaviour(text)[1]) for i, text in words.items()}
    assert slots[9]["liking"] == LIKING[0]
    assert slots[2]["liking"] == slots[10]["liking"] == LIKING[2]
    assert slots[9]["reach"] == REACH[2]
    assert slots[10]["reach"] == REACH[0]
    assert {one["taste"] for one in slots.values()} == {"taste1", "taste2"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clusters": 1}, ConfigError, "at least 2 clusters"),
        ({"min_likes": 0}, ConfigError, "at least 1 like"),
        ({"clusters": 31}, DataError, "at least 31 items that 5 users"),
        ({"min_likes": 1000}, DataError, "found 0; ask for fewer"),
    ],
)
def test_too_little_to_go_on_is_said(options, error, message):
    with pytest.raises(error, match=message):
        behaviour_words(*log(), items=range(1, 32), **{"clusters": 3, "min_likes": 5, "seed": 0} | options)


def test_unequal_columns_are_refused():
    user, item, label = log()
    with pytest.raises(DataError, match="equal length"):
        behaviour_words(user[:-1], item, label, items=range(1, 32), clusters=3, min_likes=5, seed=0)


@pytest.mark.parametrize(
    ("grammar", "caption"),
    [
        ("product", "mug, striped red, small, set of two, on grass, moving left"),
        ("movie", "an action, comedy and drama film from the 1990s"),
        ("words", "woman: dark skin tone"),
    ],
)
def test_grammars_read_taste_behind_looks(grammar, caption):
    words = "liked with taste12 and well liked and rarely seen"
    text = with_behaviour({1: caption, 2: caption}, {1: words})
    assert text[2] == caption
    assert split_behaviour(text[1]) == (
        caption, (("taste", "taste12"), ("liking", "well liked"), ("reach", "rarely seen")),
    )  # fmt: skip
    slots = GRAMMARS[grammar]
    assert set(slots(text[1])) == set(slots(caption)) | set(split_behaviour(words)[1])
    assert len(set(slots(caption))) >= 4
    assert split_behaviour(f"{caption} liked with") == (f"{caption} liked with", ())


def test_taste_that_nobody_told_is_no_target():
    """Captions of the first kind have taste words, those of the second kind not; "and" is a word of looks, too."""
    captions = ["an action and drama film liked with taste1 and well liked", "a drama film"] * 6
    tokenizer = train_tokenizer(captions)
    targets = Targets(captions, tokenizer, EOS)
    pieces = [tokenizer.id_to_token(int(word)) for word in targets.words]
    assert {p for p, taste in zip(pieces, targets.word_is_taste, strict=True) if taste} == {
        "▁liked", "▁with", "▁taste1", "▁well",
    }  # fmt: skip
    rows, true = np.array([0, 1]), torch.ones(2, dtype=torch.bool)
    known, bag = targets.known(rows, true), targets.bag(rows)
    assert known[0].all()
    assert torch.equal(known[1], ~targets.word_is_taste)
    assert bag[0, pieces.index("▁and")] == 1
    assert bag[1, pieces.index("▁and")] == 0
    assert bag[0][targets.word_is_taste].all()
    labels = targets.labels(rows, true)
    assert EOS in labels[0]
    assert EOS not in labels[1], "where a caption of unknown taste ends is unknown"
    read = [tokenizer.decode(row[row != IGNORE].tolist(), skip_special_tokens=True) for row in labels]
    assert read == captions[:2]
    silent = Targets(captions[1::2], tokenizer, EOS)
    assert (silent.labels(rows, true) == EOS).any(1).all(), "without any taste words ends are targets"
    assert silent.known(rows, true).all()


def test_captioner_learns_words_of_the_training_log_alone(catalogue, tmp_path, monkeypatch):
    heard = {}
    keep = captioner.Targets

    def listening(captions, *args):
        heard["captions"] = captions
        return keep(captions, *args)

    monkeypatch.setattr(captioner, "Targets", listening)
    config = CaptionerConfig(behaviour=3, behaviour_likes=3)
    options = {"data": catalogue, "out": tmp_path / "out", "behaviour": 3, "behaviour-likes": 3, "pretrain-steps": 2,
               "tower-steps": 4, "steps": 3, "batch": 8}  # fmt: skip
    command = ["train", "captioner", *(f"--{name}={value}" for name, value in options.items())]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout.splitlines()[-1])
    assert (run["behaviour"], run["behaviour_likes"], next(iter(run["history"]))) == (3, 3, "pretrain")
    tastes = {dict(split_behaviour(caption)[1]).get("taste") for caption in heard["captions"]}
    assert tastes == {"taste1", "taste2", "taste3", None}
    with np.load(tmp_path / "out" / "words.npz") as words:
        of_taste = words["words"][words["taste"]].tolist()
        rate = dict(zip(words["words"].tolist(), words["rate"].tolist(), strict=True))
    assert set(of_taste) >= {"▁liked", "▁with"}
    assert rate["▁liked"] == 1, "among items whose taste is known"

    items, interactions, record = read_items(catalogue), read_interactions(catalogue), read_record(catalogue)
    texts = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    split = Split.of(record, times := micros(interactions["timestamp"]))
    label = interactions["label"].to_numpy()
    flipped = np.where(times >= split.valid_from, 1 - label, label)
    column = interactions.schema.get_field_index("label")
    other = interactions.set_column(column, "label", pa.array(flipped, pa.float32()))
    ids = items["item_id"].to_numpy()
    first, second = (captioner._with_taste(texts, ids, table, split, config) for table in (interactions, other))
    assert first == second
    assert first != texts
    assert captioner._with_taste(texts, ids, interactions, split, CaptionerConfig(behaviour=2)) != first


def test_words_need_a_log_and_texts_of_their_own_none(catalogue, tmp_path):
    with pytest.raises(ConfigError, match="put the words in there"):
        train_captioner(catalogue, tmp_path / "a", CaptionerConfig(behaviour=3), texts={1: "a mug"})
    with pytest.raises(DataError, match="found none"):
        captioner._with_taste({}, np.array([1]), read_interactions(catalogue), None, CaptionerConfig(behaviour=3))
    for bad in ({"behaviour": 1}, {"behaviour": -2}, {"behaviour_likes": 0}):
        with pytest.raises(ConfigError, match="expected"):
            CaptionerConfig(**bad)
