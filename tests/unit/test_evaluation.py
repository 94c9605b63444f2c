"""The evaluation can be wrong in few ways: who sees which label, what an arm is given, how wide an interval is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from evaluation import harness
from evaluation.content import Content, residual_codes
from evaluation.gates import check_gates
from evaluation.harness import ARMS, EvaluationConfig, evaluate
from evaluation.splits import SPLITS, Log, folds
from sightline.annotation import Annotated
from sightline.cli import app
from sightline.errors import ConfigError
from sightline.schema import write_dataset
from tests.media_files import picture
from trainer.metrics import lift_interval
from trainer.ranker import RankerConfig
from trainer.splits import TEST, TRAIN, VALID

COLOURS = ("red", "green", "blue", "black")
ITEMS, USERS, ROWS = 120, 60, 9000


@pytest.fixture(scope="module")
def liking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every user likes one colour, and items of it four times as often; ids alone say nothing of a new item."""
    folder = tmp_path_factory.mktemp("liking")
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 4, ITEMS + 1)
    taste = rng.integers(0, 4, USERS + 1)
    user, item = rng.integers(1, USERS + 1, ROWS), rng.integers(1, ITEMS + 1, ROWS)
    chance = np.where(taste[user] == colour[item], 0.8, 0.2)
    time = np.sort(rng.integers(10**15, 15 * 10**14, ROWS))
    data = picture()
    items = pa.table({
        "item_id": pa.array(range(1, ITEMS + 1), pa.int64()),
        "media": [data] * ITEMS,
        "media_uri": pa.nulls(ITEMS, pa.string()),
        "media_type": ["image"] * ITEMS,
        "created_at": pa.array([10**15] * ITEMS, pa.int64()).cast(pa.timestamp("us", "UTC")),
        "text": [f"a {COLOURS[colour[i]]} mug" for i in range(1, ITEMS + 1)],
    })  # fmt: skip
    interactions = pa.table({
        "user_id": user, "item_id": item, "timestamp": pa.array(time).cast(pa.timestamp("us", "UTC")),
        "label": (rng.uniform(size=ROWS) < chance).astype(np.float32),
        "context_hour": rng.integers(0, 24, ROWS).astype(np.int32),
    })  # fmt: skip
    write_dataset(folder, items, interactions, {"name": "liking", "grammar": "words"})
    return folder


# --- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_is_in_two_parts_or_too_early(liking: Path, split: str) -> None:
    log = Log.read(liking)
    made = list(folds(log, split, count=4))
    assert len(made) == (4 if split == "cold" else 1)
    for fold in made:
        train, valid, test = (set(log.item[fold.part == part].tolist()) for part in (TRAIN, VALID, TEST))
        assert train
        assert valid
        assert test
        if split == "cold":
            assert not test & (train | valid)
            assert not valid & train, "stopping looks at items that training does not know"
            assert not test & set(fold.fit_items.tolist())
            assert not fold.history[np.isin(log.item, list(test))].any(), "no history holds an event on a test item"
        elif split == "temporal":
            assert log.time[fold.part == TRAIN].max() <= log.time[fold.part == VALID].min()
            assert log.time[fold.part == VALID].max() <= log.time[fold.part == TEST].min()
            assert fold.history.all()
        else:
            assert not fold.history[fold.part == TEST].any()
        assert not (fold.fitted & (fold.part == TEST)).any()
    if split == "cold":
        tested = np.concatenate([np.unique(log.item[fold.part == TEST]) for fold in made])
        assert sorted(tested.tolist()) == sorted(np.unique(log.item).tolist()), "every item is tested once"


def test_test_labels_are_not_in_the_examples(liking: Path, tmp_path: Path) -> None:
    """The file that a ranker is fitted on has NaN in their place, so whoever looked at one would get NaN."""
    log = Log.read(liking)
    for split in SPLITS:
        fold = next(iter(folds(log, split)))
        config = EvaluationConfig(split=split)
        harness._prepare(log, fold, perfect(log), ARMS["tokens"], tmp_path / "e.parquet", config)
        rows = pq.read_table(tmp_path / "e.parquet")
        label, part = rows["label"].to_numpy(), rows["part"].to_numpy()
        assert np.isnan(label[part == TEST]).all()
        assert not np.isnan(label[(part == TRAIN) | (part == VALID)]).any()


def test_a_cold_items_events_move_no_count(liking: Path, tmp_path: Path) -> None:
    """Flipping every label of a fold's test items leaves all features of all examples as they are."""
    log = Log.read(liking)
    fold = next(iter(folds(log, "cold")))
    flipped = tmp_path / "flipped"
    flipped.mkdir()
    for name in ("items.parquet", "dataset.json"):
        (flipped / name).write_bytes((liking / name).read_bytes())
    rows = pq.read_table(liking / "interactions.parquet")
    label = rows["label"].to_numpy().copy()
    label[fold.part == TEST] = 1 - label[fold.part == TEST]
    at = rows.schema.get_field_index("label")
    pq.write_table(rows.set_column(at, rows.schema.field("label"), pa.array(label)), flipped / "interactions.parquet")
    written = []
    for data in (liking, flipped):
        own = Log.read(data)
        path = tmp_path / "e.parquet"
        harness._prepare(own, fold, perfect(own), ARMS["tokens"], path, EvaluationConfig())
        written.append(pq.read_table(path))
    assert not (Log.read(flipped).label == log.label).all()
    for column in written[0].column_names:
        ours, theirs = (table[column].combine_chunks() for table in written)
        if column == "label":
            np.testing.assert_array_equal(ours.to_numpy(), theirs.to_numpy())
        else:
            assert ours.equals(theirs), column


def test_wrong_options(liking: Path) -> None:
    for change, message in (
        ({"split": "hot"}, "--split is 'hot'; expected one of cold"),
        ({"arms": ("ids", "magic")}, "--arm is magic; expected at least two of ids"),
        ({"arms": ("ids",)}, "--arm is ids; expected at least two"),
        ({"arms": ("ids", "tokens", "ids")}, "each once"),
        ({"folds": 2}, "--folds is 2; expected at least 3"),
        ({"seeds": 0}, "--seeds is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluationConfig(**change)
    with pytest.raises(ConfigError, match="120 items with media are too few for 13 cold folds"):
        next(iter(folds(Log.read(liking), "cold", count=13)))


# --- arms ---------------------------------------------------------------------------------------------------------


def perfect(log: Log) -> Content:
    """Content of a captioner that is always right."""
    ids = log.items["item_id"].to_pylist()
    texts = dict(zip(ids, log.items["text"].to_pylist(), strict=True))
    vectors = np.array([[float(colour in texts[i]) for colour in COLOURS] for i in ids], np.float32)
    at = dict(zip(ids, vectors.argmax(1).tolist(), strict=True))
    coded = {i: Annotated(texts[i], [at[i]], {COLOURS[at[i]]: 3, "mug": 1}).to_text() for i in ids}
    return Content(texts=coded, remembered=coded, reference=texts, vectors=(np.array(ids), vectors))


def test_content_lifts_and_its_control_does_not(
    liking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "describe_fold", lambda log, *args, **options: perfect(log))
    config = EvaluationConfig(
        folds=3, seeds=2, arms=("ids", "words", "semantic ids", "shuffled", "oracle"),
        ranker=RankerConfig(epochs=6, batch=256, item_dropout=0.3),
    )  # fmt: skip
    report = evaluate(liking, tmp_path, config)
    arms = {arm: cuts["all"] for arm, cuts in report["arms"].items()}
    assert report["rows"] == {"all": ROWS}
    for arm in ("words", "semantic ids", "oracle"):
        assert arms[arm]["lift_ci95"][0] > 5, arm
    low, high = arms["shuffled"]["lift_ci95"]
    assert low < 2
    assert arms["shuffled"]["lift_percent"] < 0.3 * arms["words"]["lift_percent"]
    assert high > low
    again = evaluate(liking, tmp_path, config)
    assert again["arms"] == report["arms"], "kept pieces give the same report"


def test_shuffled_captions_are_the_same_captions(liking: Path) -> None:
    content = perfect(Log.read(liking))
    dealt, remembered = harness._texts(content, ARMS["shuffled"], seed=0)
    assert sorted(dealt.values()) == sorted(content.texts.values())
    assert sum(dealt[i] != content.texts[i] for i in dealt) > ITEMS / 2
    assert dealt == remembered, "an item keeps one caption, in examples and in histories"


def test_semantic_ids_are_fitted_on_fitted_items_alone() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 6)).astype(np.float32) + 4 * rng.integers(0, 4, (300, 1))
    fit = np.arange(300) < 200
    codes = residual_codes(vectors, fit, levels=2, size=8)
    assert codes.shape == (300, 2)
    assert len(np.unique(codes[:, 0])) == 8
    moved = vectors.copy()
    moved[250:] += 100
    np.testing.assert_array_equal(residual_codes(moved, fit, levels=2, size=8)[:250], codes[:250])


# --- intervals ------------------------------------------------------------------------------------------------------


def test_an_arm_against_itself_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    label, user, item = rng.integers(0, 2, 900), rng.integers(0, 30, 900), rng.integers(0, 30, 900)
    score = [rng.uniform(size=900)]
    assert lift_interval(label, user, score, score, item=item, draws=20) == (0.0, 0.0)


def test_luck_of_items_widens_the_two_way_interval() -> None:
    """An arm that is better on some items and worse on others: resampling users alone does not see that."""
    rng = np.random.default_rng(1)
    user, item = rng.integers(0, 200, 8000), rng.integers(0, 12, 8000)
    label = rng.integers(0, 2, 8000)
    noise = rng.normal(size=8000)
    base = noise + label
    other = noise + label * (1 + np.where(item % 2, 1.0, -1.0))
    hopeless = lift_interval(label, user, [-1.0 * label], [1.0 * label], item=item, draws=20)  # AUC 0 in every draw
    assert 0 < hopeless[0] <= hopeless[1] < float("inf")
    one = lift_interval(label, user, [base], [other], draws=200)
    both = lift_interval(label, user, [base], [other], item=item, draws=200)
    assert both[1] - both[0] > 2 * (one[1] - one[0])


# --- the verb -------------------------------------------------------------------------------------------------------


def test_the_whole_evaluation_in_small(catalogue: Path, tmp_path: Path) -> None:
    """Captioners per fold, rankers per arm, report: through the command, on generated pictures."""
    argv = ["evaluate", "--data", str(catalogue), "--small", "--folds", "3", "--seeds", "1", "--arm", "ids",
            "--arm", "tokens", "--arm", "dense vector", "--arm", "semantic ids", "--work", str(tmp_path / "work"),
            "--out", str(tmp_path / "report")]  # fmt: skip
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert set(report["arms"]) == {"ids", "tokens", "dense vector", "semantic ids"}
    assert report["rows"]["all"] == 3200
    for arm, cuts in report["arms"].items():
        assert 0.3 < cuts["all"]["auc"] < 0.9, arm
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json", "report.md", "lifts.png", "reliability.png",
    }  # fmt: skip
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| all | 3,200 | tokens |" in page


# --- gates ----------------------------------------------------------------------------------------------------------


def test_gates_hold_fail_or_cannot_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    gates = [{"metric": "lift.0", "at_least": 0.0}, {"metric": "f1.items", "at_least": 0.9}]
    path.write_text(json.dumps({"gates": gates}))
    found = check_gates({"lift": [0.5, 2.0], "f1": {"items": 0.89}}, path)
    assert [(gate["value"], gate["pass"]) for gate in found] == [(0.5, True), (0.89, False)]
    assert not check_gates({"lift": [None, 1.0], "f1": {"items": 1.0}}, path)[0]["pass"]
    with pytest.raises(ConfigError, match=r"no figure 'lift\.0'; there are f1"):
        check_gates({"f1": {"items": 1.0}}, path)


def test_the_checked_in_gates_are_the_demos_figures(tmp_path: Path) -> None:
    """`sightline quality --small`: the run is real, so its few steps fail the gates, and the exit code says so."""
    result = CliRunner().invoke(app, ["quality", "--small", "--root", str(tmp_path / "quality")])
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert not document["pass"]
    assert {gate["metric"] for gate in document["gates"]} >= {"caption_attribute_f1", "gap_closed", "lift_ci95.0"}
    assert not next(gate for gate in document["gates"] if gate["metric"] == "caption_attribute_f1")["pass"]
