"""Examples without leaks, metrics against scikit-learn and by hand, ranker = its ONNX graphs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from build.ranker_onnx import export_ranker
from sightline.errors import ConfigError, DataError, ReleaseError
from sightline.profile import ProfileConfig, UserProfiles
from sightline.schema import INTERACTIONS, ITEMS, read_items, write_dataset
from trainer import metrics
from trainer.examples import TEST, TRAIN, VALID, Columns, Vocabulary, stream_examples, write_examples
from trainer.ranker import RankerConfig, bayes_auc, tensors, train_ranker
from trainer.ranker_model import EmbedGraph, RankerShape, ScoreGraph, item_weights, jagged, new_ranker
from trainer.splits import Split

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranker")
    items = read_items(catalogue)
    captions = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    config = RankerConfig(arms=("ids", "item_tokens", "profile", "tokens"), seeds=2, epochs=2, batch=256)
    return out, train_ranker(catalogue, captions, "v-test", out, config)


def _log(folder, events):
    """events: (user, item, seconds, label). Items 1…9 exist."""
    items = [{"item_id": i, "media": None, "media_uri": None, "media_type": None,
              "created_at": START - timedelta(days=1), "text": None} for i in range(1, 10)]  # fmt: skip
    rows = [{"user_id": u, "item_id": i, "timestamp": START + timedelta(seconds=s), "label": float(y)}
            for u, i, s, y in events]  # fmt: skip
    log = pa.Table.from_pylist(rows, INTERACTIONS)
    log = log.append_column("context_hour", pa.array([0] * len(rows), pa.int32()))
    write_dataset(folder, pa.Table.from_pylist(items, ITEMS), log, {"name": "x"})
    return log


def test_profiles_never_see_the_present_or_the_future(tmp_path):
    events = [(1, 1, 0, 1), (1, 2, 5, 1), (1, 3, 5, 0), (1, 4, 9, 0), (2, 1, 9, 1), (1, 5, 12, 1), (1, 6, 13, 0)]
    log = _log(tmp_path, events)
    split = Split(valid_from=int(2e18), test_from=int(3e18))
    tokens = {item: np.array([10 + item, 0], dtype=np.int64) for item in range(1, 10)}
    profiles = UserProfiles(ProfileConfig(length=4, half_life=1e9), range(1, 100))
    write_examples(tmp_path, tmp_path / "e.parquet", Columns.of(log, split), split, tokens, profiles)
    seen = [set(row) - {0} for row in pq.read_table(tmp_path / "e.parquet")["profile_tokens"].to_pylist()]
    # The two events of second 5 do not see each other; a negative never enters; users are apart.
    assert seen == [set(), {11}, {11}, {11, 12}, set(), {11, 12}, {11, 12, 15}]
    assert set(profiles.read(2).tokens.tolist()) == {11, 0}  # the last events are there for serving


def test_planted_future_label_cannot_be_read(tmp_path):
    """Flipping the label of the last event changes no example's features."""
    features = []
    for label in (0, 1):
        folder = tmp_path / str(label)
        log = _log(folder, [(1, 1, 0, 1), (1, 2, 5, 0), (1, 3, 9, label)])
        split = Split(valid_from=int(2e18), test_from=int(3e18))
        tokens = {item: np.array([item]) for item in range(1, 10)}
        profiles = UserProfiles(ProfileConfig(length=2), range(1, 100))
        write_examples(folder, folder / "e.parquet", Columns.of(log, split), split, tokens, profiles)
        features.append(pq.read_table(folder / "e.parquet").drop_columns(["label"]))
    assert features[0].equals(features[1])


def test_a_log_without_context_is_refused(tmp_path):
    log = _log(tmp_path, [(1, 1, 0, 1)]).drop_columns(["context_hour"])
    with pytest.raises(DataError, match="context_<name>"):
        Columns.of(log, Split(valid_from=int(2e18), test_from=int(3e18)))


def test_rows_out_of_time_order_are_refused(tmp_path):
    log = _log(tmp_path, [(1, 1, 9, 1), (1, 2, 5, 0)])
    split = Split(valid_from=int(2e18), test_from=int(3e18))
    with pytest.raises(DataError, match="time order"):
        write_examples(
            tmp_path, tmp_path / "e.parquet", Columns.of(log, split), split, {},
            UserProfiles(ProfileConfig(), range(1, 2)),
        )  # fmt: skip


def test_vocabulary_gives_0_to_strangers():
    vocabulary = Vocabulary(ids=np.array([3, 7, 9]))
    assert vocabulary.index(np.array([9, 1, 3, 100, 7, 8])).tolist() == [3, 0, 1, 0, 2, 0]
    assert vocabulary.rows == 4


def test_stream_gives_every_row_once_and_parts_are_by_time(trained, catalogue):
    out, _ = trained
    table = (np.array([1]), np.ones((1, 2), dtype=np.int64))
    whole = pq.read_table(out / "examples.parquet")
    for part in (TRAIN, VALID, TEST):
        wanted = whole.filter(pa.compute.equal(whole["part"], part))
        plain = list(stream_examples(out / "examples.parquet", (part,), table, 100))
        mixed = list(stream_examples(out / "examples.parquet", (part,), table, 100, np.random.default_rng(0)))
        for batches in (plain, mixed):
            pairs = [(u, i) for b in batches for u, i in zip(b.user_id.tolist(), b.item_id.tolist(), strict=True)]
            assert len(pairs) == wanted.num_rows
            assert sorted(pairs) == sorted(zip(*(wanted[c].to_pylist() for c in ("user_id", "item_id")), strict=True))
        assert [b.item_id.tolist() for b in plain] != [b.item_id.tolist() for b in mixed]
    tokens = np.concatenate([b.item_tokens[:, 0] * (b.item_id == 1) for b in plain])
    assert tokens.sum() == sum((b.item_id == 1).sum() for b in plain)


def test_record_compares_all_arms(trained):
    _, record = trained
    assert set(record["arms"]) == {"ids", "item_tokens", "profile", "tokens"}
    assert {"all", "cold", "warm"} == set(record["cuts"])
    assert record["cuts"]["all"] == record["cuts"]["cold"] + record["cuts"]["warm"]
    for arm in ("item_tokens", "profile", "tokens"):
        low, high = record["lift_percent"][arm]["all"]["ci95"]
        assert low < record["lift_percent"][arm]["all"]["lift"] < high


def test_oracle_beats_every_arm(trained, catalogue):
    bayes = bayes_auc(catalogue)
    assert bayes["all"] > max(arm["cuts"]["all"]["auc"] for arm in trained[1]["arms"].values())


def test_eager_torchrec_equals_graphs_equals_onnx(trained, catalogue, tmp_path):
    out, _ = trained
    document = export_ranker(out, tmp_path)
    shape = RankerShape.from_json(document["shape"])
    model = new_ranker(shape, 0)
    model.load_state_dict(torch.load(out / "model.pt"))
    items = read_items(catalogue)
    from sightline.tokens import TokenSpec

    spec = TokenSpec.load(out / "token_spec.json")
    table = (items["item_id"].to_numpy(), spec.encode_batch(items["text"].to_pylist()))
    batch = tensors(next(iter(stream_examples(out / "examples.parquet", (TEST,), table, 333))))
    with torch.no_grad():
        logits = model(batch["dense"], jagged(shape, batch)).squeeze(1)
        inputs = [batch["user_index"][:, None], batch["item_index"][:, None], batch["context"], batch["item_tokens"],
                  batch["profile_tokens"], batch["profile_weights"]]  # fmt: skip
        features = EmbedGraph(model, shape)(*inputs)
        score = ScoreGraph(model)(features, batch["dense"]).squeeze(1)
    assert torch.allclose(torch.sigmoid(logits), score, atol=1e-6)
    embed, rank = (onnxruntime.InferenceSession(tmp_path / f"{n}.onnx") for n in ("embed", "score"))
    feed = {i.name: x.numpy() for i, x in zip(embed.get_inputs(), inputs, strict=True)}
    served = rank.run(None, {"FEATURES": embed.run(None, feed)[0], "DENSE": batch["dense"].numpy()})[0][:, 0]
    assert np.abs(served - score.numpy()).max() < 1e-5
    # batch = single
    one = {name: value[:1] for name, value in feed.items()}
    assert np.abs(embed.run(None, one)[0] - features[:1].numpy()).max() < 1e-5


def test_export_refuses_a_graph_that_differs(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("build.ranker_onnx.TOLERANCE", -1.0)
    with pytest.raises(ReleaseError, match=r"embed\.onnx: eager and ONNX differ"):
        export_ranker(trained[0], tmp_path)


def test_padding_weighs_nothing():
    assert item_weights(torch.tensor([[4, 5, 6, 7, 0], [0] * 5])).tolist() == [[0.5] * 4 + [0], [0] * 5]


def test_arms_have_their_features():
    base = {"users": 2, "items": 2, "context": {"hour": 24}, "token_rows": 5, "dense": 3}
    assert RankerShape(**base, item_tokens=False, user_profile=False).features == ["user", "item", "context_hour"]
    assert RankerShape(**base).features == ["user", "item", "context_hour", "item_tokens", "profile"]


def test_metrics_by_hand():
    label, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.2])
    found = metrics.ranking_metrics(label, score, np.array([1, 1, 2, 2]))
    assert found["auc"] == roc_auc_score(label, score) == 0.75
    assert found["gauc"] == 0.5  # 1 for the first user, 0 for the second
    assert found["calibration"] == pytest.approx(score.mean() / 0.5)
    assert metrics.ranking_metrics(label, np.full(4, 0.5), np.arange(4))["ne"] == pytest.approx(1)


def test_weighted_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    label, score = rng.uniform(size=500) < 0.3, rng.integers(0, 40, 500) / 40  # many ties
    weight = rng.integers(0, 4, 500)
    ours = metrics._WeightedAuc(label, score)(weight)
    assert ours == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)


def test_interval_covers_no_difference_and_finds_a_real_one():
    rng = np.random.default_rng(0)
    user, truth = rng.integers(0, 60, 3000), rng.uniform(size=3000)
    label = (rng.uniform(size=3000) < truth).astype(float)
    blind, seeing = truth + rng.normal(0, 2, 3000), truth + rng.normal(0, 0.2, 3000)
    low, high = metrics.lift_interval(label, user, [blind], [seeing], draws=60)
    assert 0 < low < high
    again = blind + rng.normal(0, 0.01, 3000)
    low, high = metrics.lift_interval(label, user, [blind], [again], draws=60)
    assert low < 0 < high


def test_caption_metrics_by_hand():
    from catalogue.attributes import caption_slots

    found = metrics.caption_metrics(
        ["mug, red, small, single, on wood", "nonsense"],
        ["mug, red, large, single, on wood", "shoe, blue, small, single, on sand"], caption_slots,
    )  # fmt: skip
    # 5 of 6 claimed slots right (plain counts), 12 wanted.
    assert found["attribute_f1"] == pytest.approx(2 * 5 / (6 + 12))
    assert found["exact_match"] == 0


@pytest.mark.parametrize("bad", [{"arms": ("vision",)}, {"arms": ()}, {"seeds": 0}, {"id_dropout": 1.0}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        RankerConfig(**bad)
