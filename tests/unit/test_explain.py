"""explain: on a ranker whose score is made by one word, that word is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from evaluation.explain import SEMANTIC, explain, plot
from sightline import cli
from sightline.annotation import Annotated
from sightline.errors import ConfigError, ReleaseError, StoreError, TokenSpecError
from sightline.features import Versions
from sightline.profile import Profile
from sightline.store import UserRecord, open_store
from sightline.store.transfer import load, user_table
from sightline.tokens import TokenSpec
from trainer.captioning import write_captions

NOTE = Annotated("a small red mug, red lid", (4, 2), {"red": 9, "mug": 3}, ("red cup", "a red mug"))
FAMILIES = ("word", "bigram", "trigram", "slot", "semantic", "confidence", "sample")

# score = sigmoid(Σ table[item tokens] + Σ weight · table[profile tokens] − Σ weight · table[negative profile tokens]
# + 0.1 · user index + 0.01 · item index + mood + 0.001 · position)
EMBED = """
<ir_version: 8, opset_import: ["" : 17]>
embed (int64[B, 1] USER_INDEX, int64[B, 1] ITEM_INDEX, int64[B, 1] CONTEXT, int64[B, L] ITEM_TOKENS,
       int64[B, K] PROFILE_TOKENS, float[B, K] PROFILE_WEIGHTS, int64[B, K] PROFILE_NEGATIVE_TOKENS,
       float[B, K] PROFILE_NEGATIVE_WEIGHTS) => (float[B, 1, 1] FEATURES)
<int64[1] last = {1}, float tenth = {0.1}, float hundredth = {0.01}, float thousandth = {0.001}>
{
  looks = Gather (table, ITEM_TOKENS)
  look = ReduceSum (looks, last)
  likes = Gather (table, PROFILE_TOKENS)
  liked = Mul (likes, PROFILE_WEIGHTS)
  like = ReduceSum (liked, last)
  hates = Gather (table, PROFILE_NEGATIVE_TOKENS)
  hated = Mul (hates, PROFILE_NEGATIVE_WEIGHTS)
  hate = ReduceSum (hated, last)
  relish = Sub (like, hate)
  users = Cast <to = 1> (USER_INDEX)
  user = Mul (users, tenth)
  items = Cast <to = 1> (ITEM_INDEX)
  item = Mul (items, hundredth)
  places = Cast <to = 1> (CONTEXT)
  place = Mul (places, thousandth)
  total = Sum (look, relish, user, item, place)
  FEATURES = Unsqueeze (total, last)
}
"""
SCORE = """
<ir_version: 8, opset_import: ["" : 17]>
score (float[B, 1, 1] FEATURES, float[B, 4] DENSE) => (float[B, 1] SCORE)
<int64[1] last = {1}, int64[1] three = {3}>
{
  mood = Gather <axis = 1> (DENSE, three)
  feature = Squeeze (FEATURES, last)
  logit = Add (feature, mood)
  SCORE = Sigmoid (logit)
}
"""


@pytest.fixture(scope="module")
def spec() -> TokenSpec:
    return TokenSpec.fit([NOTE.to_text()] * 2, families=FAMILIES, length=96, rows=4096)


@pytest.fixture
def made(spec: TokenSpec, tmp_path: Path):
    """A function: rows of the token table → folder of a release with that ranker.

    User 7 likes `mug` and `red` and passes over `lid`.
    """

    def make(values: dict[int, float]) -> Path:
        models = tmp_path / "cpu-test" / "model_repository"
        for model in ("tokenize", "lookup", "embed", "score", "rank_media"):
            (models / model / "1").mkdir(parents=True)
        spec.save(models / "tokenize" / "1" / "token_spec.json")
        table = np.zeros(spec.rows, dtype=np.float32)
        table[list(values)] = list(values.values())
        embed = onnx.parser.parse_model(EMBED)
        embed.graph.initializer.append(numpy_helper.from_array(table, "table"))
        onnx.save(embed, models / "embed" / "1" / "model.onnx")
        onnx.save(onnx.parser.parse_model(SCORE), models / "score" / "1" / "model.onnx")
        mug, red, lid = (word_row(spec, word) for word in ("mug", "red", "lid"))
        for name, known in (("user", 7), ("item", 5)):
            table = pa.table({f"{name}_id": [0, known], f"{name}_index": [0, 1]})
            pq.write_table(table, models / "lookup" / "1" / f"{name}s.parquet")
        record = {
            "version": "ranker", "captioner_version": "v1", "token_spec_version": spec.version, "token_length": 96,
            "profile": {"length": 3},
        }  # fmt: skip
        (models / "lookup" / "1" / "ranker.json").write_text(json.dumps(record))
        (tmp_path / "cpu-test" / "features").mkdir()
        likes = user(7, [mug, red, 0], [0.75, 0.25, 0], [lid, 0, 0], [1, 0, 0], mood=0.5)
        users = user_table(Versions.of(record).users, [likes])
        pq.write_table(users, tmp_path / "cpu-test" / "features" / "users.parquet")
        columns = json.dumps(json.dumps([{"name": "position", "cardinality": 10}]))
        (models / "rank_media" / "config.pbtxt").write_text(
            f'name: "rank_media"\nparameters {{ key: "context" value: {{ string_value: {columns} }} }}\n'
        )
        return tmp_path / "cpu-test"

    return make


def user(
    identity: int, tokens: list[int], weights: list[float], negative: list[int], passed: list[float], mood: float
) -> UserRecord:
    profile = Profile(
        tokens=np.array(tokens), weights=np.array(weights, np.float32), negative_tokens=np.array(negative),
        negative_weights=np.array(passed, np.float32), dense=np.array([0, 0, 0, mood], np.float32),
    )  # fmt: skip
    nothing = np.zeros(0, np.int64)
    return UserRecord(id=identity, profile=profile, items=nothing, times=nothing, strengths=nothing.astype(np.float32))


def word_row(spec: TokenSpec, word: str) -> int:
    return spec.ids_of("word")[0] + spec.families[0].vocabulary.index(word)


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def test_the_word_that_decides_is_found(spec, made) -> None:
    folder = made({word_row(spec, "red"): 3.0})
    found = explain(folder, 0, 0, NOTE.to_text())
    assert found.caption == "a small red mug, red lid"
    assert found.score == pytest.approx(sigmoid(3), abs=1e-6)
    first, *others = found.occlusions
    assert (first.part, first.word) == ("caption", "red")
    assert first.without == pytest.approx(0.5, abs=1e-6)
    assert first.change == pytest.approx(sigmoid(3) - 0.5, abs=1e-6)
    assert {one.word for one in others} == {"a", "small", "mug", "lid", "cup", SEMANTIC}
    assert all(one.change == 0 for one in others)


def test_a_word_takes_all_its_ids_with_it_and_none_of_another(spec, made) -> None:
    found = {one.word: one.ids for one in explain(made({}), 0, 0, NOTE.to_text()).occlusions}
    tokens = list(spec.tokens(NOTE.to_text()))
    rows = {(token.kind, token.text): set(token.rows) for token in tokens}
    red = {family: set(ids) for family, ids in found["red"].items()}
    assert set(red) == set(FAMILIES) - {"semantic"}
    pairs = ("small red", "red mug", "mug red", "red lid")
    assert red["bigram"] == set().union(*(rows["bigram", pair] for pair in pairs))
    assert red["trigram"] == rows["trigram", " re"] | rows["trigram", "red"] | rows["trigram", "ed "]
    assert red["confidence"] == rows["confidence", "red 9"]
    assert red["sample"] == rows["sample", "red 1"]
    assert set(found[SEMANTIC]["semantic"]) == rows["semantic", "4"] | rows["semantic", "4 2"]
    # `small` and `mug` share no id with what is left; `red mug` goes with either of its words.
    assert rows["bigram", "red mug"] <= set(found["mug"]["bigram"])
    kept = set(spec.encode(NOTE.to_text()).tolist()) - {0}
    assert set().union(*(ids for one in found.values() for ids in one.values())) == kept


def test_an_id_that_another_word_has_stays(spec, made) -> None:
    shared = explain(made({}), 0, 0, "redder reds").occlusions
    ids = {one.word: set(one.ids.get("trigram", ())) for one in shared}
    begin = {row for t in spec.tokens("red") if t.kind == "trigram" and t.text in (" re", "red") for row in t.rows}
    assert not begin & (ids["redder"] | ids["reds"])
    assert ids["redder"]


def test_profile_tokens_of_a_known_user(spec, made) -> None:
    folder = made({word_row(spec, "mug"): 1.0, word_row(spec, "red"): -2.0, word_row(spec, "lid"): 0.25})
    found = explain(folder, 7, 5, "a cup", {"position": 4})
    logit = 0.75 * 1 - 0.25 * 2 - 0.25 + 0.1 + 0.01 + 0.5 + 0.004
    assert found.user_known
    assert found.item_known
    assert found.score == pytest.approx(sigmoid(logit), abs=1e-6)
    profile = {one.word: one for one in found.occlusions if one.part == "profile"}
    assert set(profile) == {"mug", "red"}
    assert profile["mug"].without == pytest.approx(sigmoid(logit - 0.75), abs=1e-6)
    assert profile["mug"].ids == {"word": [word_row(spec, "mug")]}
    assert profile["red"].change == pytest.approx(sigmoid(logit) - sigmoid(logit + 0.5), abs=1e-6)
    (passed,) = [one for one in found.occlusions if one.part == "profile_negative"]
    assert (passed.word, passed.without) == ("lid", pytest.approx(sigmoid(logit + 0.25), abs=1e-6))
    changes = [abs(one.change) for one in found.occlusions]
    assert changes == sorted(changes, reverse=True)


def test_unknown_ids_use_the_fallback_rows(spec, made) -> None:
    folder = made({word_row(spec, "red"): 3.0})
    found = explain(folder, 10**12, -3, "red")
    assert (found.user_known, found.item_known) == (False, False)
    assert found.score == explain(folder, 0, 0, "red").score
    assert not [one for one in found.occlusions if one.part != "caption"]
    empty = explain(folder, 1, 1, "")
    assert (empty.occlusions, empty.score) == ([], 0.5)


def test_errors_are_clear(made, tmp_path: Path) -> None:
    folder = made({})
    with pytest.raises(ConfigError, match=r"--context colour=1: this ranker's context is position=0…9"):
        explain(folder, 0, 0, "red", {"colour": 1})
    with pytest.raises(ConfigError, match="position=10"):
        explain(folder, 0, 0, "red", {"position": 10})
    with pytest.raises(TokenSpecError, match="field 'q' is none"):
        explain(folder, 0, 0, "red\x1fq")
    with pytest.raises(ReleaseError, match="nowhere: expected a release"):
        explain(tmp_path / "nowhere", 0, 0, "red")
    for damaged in ("rank_media/config.pbtxt", "lookup/1/users.parquet", "lookup/1/ranker.json", "embed/1/model.onnx"):
        whole = (file := folder / "model_repository" / damaged).read_bytes()
        file.write_bytes(b"\xff\xfe no more")
        with pytest.raises(ReleaseError, match="expected a release"):
            explain(folder, 0, 0, "red")
        file.write_bytes(whole)


def test_profiles_of_a_store_are_those_of_now(spec, made, tmp_path: Path) -> None:
    """User 7 as the store has them, and nobody where it has none."""
    folder = made({word_row(spec, "mug"): 1.0})
    location = str(tmp_path / "store")
    with open_store(location) as store:
        load(store, folder / "features" / "users.parquet", lambda rows: None)
        changed = user(7, [word_row(spec, "mug"), 0, 0], [0.25, 0, 0], [0, 0, 0], [0, 0, 0], mood=0.0)
        store.write_users("ranker", [changed])
    logit = 0.1 + 0.01  # of the indices
    assert explain(folder, 7, 5, "", store=location).score == pytest.approx(sigmoid(logit + 0.25), abs=1e-6)
    assert explain(folder, 7, 5, "").score == pytest.approx(sigmoid(logit + 0.75 + 0.5), abs=1e-6)
    assert explain(folder, 8, 5, "", store=location).score == pytest.approx(sigmoid(0.01), abs=1e-6)
    with pytest.raises(StoreError, match="expected a feature store"):
        explain(folder, 7, 5, "", store=str(tmp_path / "none"))


def test_the_command_writes_table_picture_and_json(spec, made, tmp_path: Path) -> None:
    folder = made({word_row(spec, "red"): 3.0})
    write_captions(tmp_path / "captions.parquet", {5: NOTE.to_text()}, "v1")
    asked = ["explain", "--user", "7", "--releases", str(folder.parent), "--release", folder.name]
    asked += ["--captions", str(tmp_path / "captions.parquet"), "--out", str(tmp_path / "pictures" / "out.png")]
    result = CliRunner().invoke(cli.app, [*asked, "--item", "5", "--context", "position=3"], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["occlusions"][0]["word"] == "red"
    assert document["context"] == {"position": 3}
    assert Path(document["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "red" in result.stderr
    with pytest.raises(ConfigError, match=r"--item 6: .*has no caption of it; give one with --caption"):
        CliRunner().invoke(cli.app, [*asked, "--item", "6"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="whole number, got position=x"):
        CliRunner().invoke(cli.app, [*asked, "--item", "5", "--context", "position=x"], catch_exceptions=False)


def test_a_caption_without_words_has_a_picture_as_well(made, tmp_path: Path) -> None:
    plot(explain(made({}), 0, 0, "$^{"), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000
