"""Rankers: examples are read once each, every model learns what is there, ranker = its ONNX graphs."""

from __future__ import annotations

import io
import json

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec.optim import RowWiseAdagrad

from build.ranker_onnx import example_inputs, export_ranker
from sightline.errors import ConfigError, DataError, ReleaseError
from sightline.schema import read_items
from sightline.tokens import TokenSpec
from tests.factories import tiny_ranker
from trainer.examples import stream_examples
from trainer.ranker import RankerConfig, bayes_auc, fit, optimizer, predict, tensors, train_ranker
from trainer.ranker_model import (
    MODELS,
    Attention,
    DeepFMArch,
    EmbedGraph,
    RankerShape,
    ScoreGraph,
    item_weights,
    new_ranker,
)
from trainer.splits import TEST, TRAIN, VALID

ARM_NAMES = ("ids", "item_tokens", "profile", "positive", "tokens")


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranker")
    items = read_items(catalogue)
    captions = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    config = RankerConfig(arms=ARM_NAMES, seeds=2, epochs=2, batch=256)
    return out, train_ranker(catalogue, captions, "v-test", out, config)


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
    assert tuple(record["arms"]) == ARM_NAMES
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
    spec = TokenSpec.load(out / "token_spec.json")
    table = (items["item_id"].to_numpy(), spec.encode_batch(items["text"].to_pylist()))
    batch = next(iter(stream_examples(out / "examples.parquet", (TEST,), table, 333)))
    inputs = {name.upper(): value for name, value in tensors(batch).items() if value.shape[-1]}
    _hold(model, tmp_path, inputs)


def _hold(model, folder, inputs):
    """TorchRec's lookups = the eager graphs = ONNX within 1e-5; one row = the same row of a batch."""
    batch = {name.lower(): value for name, value in inputs.items()}
    inputs = {n: v[:, None] if n in ("USER_INDEX", "ITEM_INDEX") and v.dim() == 1 else v for n, v in inputs.items()}
    batch |= {name: batch[name].flatten() for name in ("user_index", "item_index")}
    ids = [value for name, value in inputs.items() if name != "DENSE"]
    with torch.no_grad():
        direct = torch.sigmoid(model(batch))[:, :1]
        features = EmbedGraph(model)(*ids)
        score = ScoreGraph(model)(features, inputs["DENSE"])
    assert torch.isfinite(direct).all()
    assert torch.allclose(direct, score, atol=2e-6)  # FP32 sums in another order
    embed, rank = (onnxruntime.InferenceSession(folder / f"{n}.onnx") for n in ("embed", "score"))
    feed = {i.name: inputs[i.name].numpy() for i in embed.get_inputs()}
    served = rank.run(None, {"FEATURES": embed.run(None, feed)[0], "DENSE": inputs["DENSE"].numpy()})[0]
    assert np.abs(served - score.numpy()).max() < 1e-5
    one = {name: value[:1] for name, value in feed.items()}
    assert np.abs(embed.run(None, one)[0] - features[:1].numpy()).max() < 1e-5


SHAPES = {
    **{model: {"model": model} for model in MODELS},
    **{f"{model}-tasks": {"model": model, "tasks": 2} for model in MODELS},
    "token-weights": {"token_weights": True},
    "din-token-weights": {"model": "din", "token_weights": True},
    "vector": {"item_vector": 12},
    "tokens-alone": {"ids": False, "model": "din"},
    "ids-alone": {"item_tokens": False, "user_profile": False, "user_negative": False},
    "din-without-item-tokens": {"model": "din", "item_tokens": False},
    "vector-alone": {"ids": False, "context": {}, "item_tokens": False, "user_profile": False,
                     "user_negative": False, "item_vector": 12},
}  # fmt: skip


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_exported_as_it_is(tmp_path, options):
    """Padding, an item without a caption and users without likes or dislikes among the rows (`example_inputs`)."""
    document = export_ranker(tiny_ranker(tmp_path / "ranker", **options), tmp_path)
    shape = RankerShape.from_json(document["shape"])
    model = new_ranker(shape, 0)
    model.load_state_dict(torch.load(tmp_path / "ranker" / "model.pt"))
    _hold(model, tmp_path, example_inputs(document))


@pytest.mark.parametrize("model", MODELS)
def test_every_group_moves_the_score(tmp_path, model):
    document = json.loads((tiny_ranker(tmp_path, model=model, item_vector=5) / "ranker.json").read_text())
    ranker = new_ranker(RankerShape.from_json(document["shape"]), 0)
    batch = {name.lower(): value for name, value in example_inputs(document).items()}
    batch |= {name: batch[name].flatten() for name in ("user_index", "item_index")}
    with torch.no_grad():
        before = ranker(batch)
        for name, value in batch.items():
            other = value.flip(0)
            moved = (ranker(batch | {name: other}) - before).abs().amax()
            assert moved > 1e-6, name


def test_attention_by_hand_and_at_the_start():
    """Zhou et al. 2018, figure 2: one MLP score per history item, seen with the candidate; weights are the prior."""
    torch.manual_seed(0)
    pool = Attention(3)
    query, keys, weights = torch.randn(2, 3), torch.randn(2, 4, 3), torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0] * 4])
    plain = (weights[..., None] * keys).sum(1)
    assert torch.allclose(pool(query, keys, weights), plain, atol=1e-6)
    torch.nn.init.normal_(pool.out.weight)
    first = torch.cat([pool.key.weight[:, :3], pool.item.weight, pool.key.weight[:, 3:]], 1)  # of (e, q, e · q)
    share = []
    for k in range(4):
        e, q = keys[0, k], query[0]
        hidden = torch.relu(first @ torch.cat([e, q, e * q]) + pool.key.bias)
        share.append((weights[0, k] * (pool.out.weight[0] @ hidden + pool.out.bias[0]).exp()).item())
    by_hand = sum(s / sum(share) * keys[0, k] for k, s in enumerate(share))
    assert torch.allclose(pool(query, keys, weights)[0], by_hand, atol=1e-5)
    assert not pool(query, keys, weights)[1].any()


def test_deepfm_has_the_papers_pairwise_term():
    torch.manual_seed(0)
    arch = DeepFMArch(4 * 5, (6,))
    dense, sparse = torch.randn(2, 5), torch.randn(2, 3, 5)
    vectors = [dense, *sparse.unbind(1)]
    pairs = sum((vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i))
    assert torch.allclose(arch(dense, sparse)[:, -1], pairs, atol=1e-4)


def _learnable(folder, rows=12000, tasks=1):
    """An examples file: item i has token i and a vector; clicks come where it is a liked token and no disliked one."""
    rng = np.random.default_rng(0)
    items, liked, disliked = (rng.integers(1, 6, rows) for _ in range(3))
    vectors = rng.normal(size=(5, 6)).astype(np.float32)
    logit = 3.0 * (items == liked) - 3.0 * (items == disliked) - 0.5
    label = (rng.uniform(size=(rows, tasks)) < 1 / (1 + np.exp(-logit[:, None]))).astype(np.float32)
    if tasks > 1:
        label[rng.uniform(size=rows) < 0.5, 1] = np.nan
    part = np.repeat([TRAIN, VALID, TEST], [rows // 2, rows // 4, rows - rows // 2 - rows // 4])

    def lists(values):
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])

    one = np.ones((rows, 1), np.float32)
    table = pa.table({
        "user_id": np.ones(rows, np.int64), "item_id": items, "label": lists(label) if tasks > 1 else label[:, 0],
        "part": part, "user_index": np.zeros(rows, np.int64), "item_index": np.zeros(rows, np.int64),
        "context": lists(np.zeros((rows, 1), np.int64)), "profile_tokens": lists(liked[:, None]),
        "profile_weights": lists(one), "profile_negative_tokens": lists(disliked[:, None]),
        "profile_negative_weights": lists(one), "dense": lists(np.zeros((rows, 3), np.float32)),
    })  # fmt: skip
    pq.write_table(table, folder / "e.parquet")
    ids = np.arange(1, 6)
    return folder / "e.parquet", (ids, ids[:, None]), (ids, vectors), logit


SMALL = {"users": 1, "items": 1, "context": {"hour": 1}, "token_rows": 6, "dense": 3, "dim": 8, "user_negative": True}


@pytest.mark.parametrize(
    "options",
    [*({"model": m} for m in MODELS), {"token_weights": True}, {"item_vector": 6, "item_tokens": False}],
    ids=lambda options: "-".join(options) if len(options) > 1 else str(*options.values()),
)
def test_every_model_learns_what_is_there(tmp_path, options):
    """Only products of item and profiles tell clicks apart; the same seed gives the same ranker, bit for bit."""
    path, tokens, vectors, logit = _learnable(tmp_path)
    config = RankerConfig(epochs=8, batch=256, lr=1e-2, item_dropout=0.0, user_dropout=0.0, patience=8)
    shape = RankerShape(**SMALL, **options)
    vectors = vectors if shape.item_vector else None
    scores = []
    for _ in range(2):
        model, history = fit(shape, path, tokens, config, 0, "test", vectors=vectors)
        scores.append(predict(model, shape, stream_examples(path, (TEST,), tokens, 512, vectors=vectors)))
    label, best = pq.read_table(path)["label"].to_numpy()[-3000:], logit[-3000:]
    assert roc_auc_score(label, scores[0]) > 0.5 + 0.9 * (roc_auc_score(label, best) - 0.5)
    assert history[0]["train_loss"] > history[-1]["train_loss"]
    assert (scores[0] == scores[1]).all()


def test_tasks_learn_from_the_labels_that_are_known(tmp_path):
    path, tokens, _, logit = _learnable(tmp_path, tasks=2)
    config = RankerConfig(epochs=6, batch=256, lr=1e-2, item_dropout=0.0, user_dropout=0.0)
    shape = RankerShape(**SMALL, tasks=2)
    model, history = fit(shape, path, tokens, config, 0, "test")
    scores = predict(model, shape, stream_examples(path, (TEST,), tokens, 512))
    assert scores.shape == (3000, 2)
    for task in range(2):
        assert roc_auc_score(logit[-3000:] > -0.5, scores[:, task]) > 0.9
    assert all(np.isfinite(list(epoch.values())).all() for epoch in history)


def test_a_label_that_is_not_known_leaves_no_gradient(tmp_path):
    path, tokens, _, _ = _learnable(tmp_path, tasks=2)
    model = new_ranker(RankerShape(**SMALL, tasks=2), 0)
    batch = next(iter(stream_examples(path, (TRAIN,), tokens, 64)))
    from trainer.ranker import _loss

    batch.label[:, 1] = np.nan
    _loss(model, batch).backward()
    last = model.score.top.model[-1].weight.grad
    assert last[0].abs().sum() > 0
    assert not last[1].any()


@pytest.mark.parametrize("options", [{}, {"model": "din", "token_weights": True}], ids=["bags", "sequences"])
def test_fused_tables_train_as_plain_ones(tmp_path, options):
    """Three steps of the fused row-wise Adagrad against TorchRec's own optimizer on plain tables."""
    from trainer.ranker import _loss

    path, tokens, _, _ = _learnable(tmp_path)
    config = RankerConfig(batch=256)
    found = []
    for fused in (True, False):
        model = new_ranker(RankerShape(**SMALL, **options), 0)
        if fused:
            steps = [optimizer(model, config)]
        else:
            tables = list(model.tables().values())
            dense = [p for p in model.parameters() if not any(p is t for t in tables)]
            steps = [RowWiseAdagrad(tables, **config.table_options), torch.optim.Adam(dense, lr=config.lr)]
        for batch, _ in zip(stream_examples(path, (TRAIN,), tokens, 256), range(3), strict=False):
            for step in steps:
                step.zero_grad()
            (_loss(model, batch) / 256).backward()
            for step in steps:
                step.step()
        found.append({name: value.detach() for name, value in model.state_dict().items()})
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-4), name


def test_without_validation_rows_training_says_so(tmp_path):
    path, tokens, _, _ = _learnable(tmp_path)
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.compute.equal(table["part"], TRAIN)), path)
    with pytest.raises(DataError, match="validation"):
        fit(RankerShape(**SMALL), path, tokens, RankerConfig(epochs=1), 0, "test")


class CountedFile(io.FileIO):
    """Knows how many bytes were read of it."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("ranks", [2, 3, 40])
@pytest.mark.parametrize("mixed", [True, False])
def test_processes_read_their_own_rows_and_together_make_the_batches_of_one(tmp_path, monkeypatch, ranks, mixed):
    path, tokens, _, _ = _learnable(tmp_path)
    table = pq.read_table(path)
    number = np.arange(1, len(table) + 1)
    noise = pa.array(np.random.default_rng(0).normal(size=len(table) * 32))
    table = table.set_column(0, "user_id", pa.array(number))
    table = table.set_column(table.num_columns - 1, "dense", pa.FixedSizeListArray.from_arrays(noise, 32))
    pq.write_table(table, path, row_group_size=700)  # of 12 000 rows; the first half is for training
    parquet, read = pq.ParquetFile, []

    def stream(shard):
        shuffle = np.random.default_rng(1) if mixed else None
        with CountedFile(path) as file, monkeypatch.context() as patch:
            read.append(file)
            patch.setattr(pq, "ParquetFile", lambda path: parquet(file))
            return list(stream_examples(path, (TRAIN,), tokens, 256, shuffle, buffer_rows=3000, shard=shard))

    one = stream((0, 1))
    several = [stream((rank, ranks)) for rank in range(ranks)]
    assert sorted(np.concatenate([batch.user_id for batch in one]).tolist()) == list(range(1, 6001))
    for whole, *shards in zip(one, *several, strict=True):
        found = np.zeros(len(whole.label), np.int64)
        assert len({len(part.label) for part in shards}) == 1
        for part in shards:
            own = np.isfinite(part.label)
            found[part.place[own]] += part.user_id[own]
            np.testing.assert_array_equal(part.item_tokens[own], whole.item_tokens[part.place[own]])
            assert part.rows == len(whole.label)
            assert not any(getattr(part, name)[~own].any() for name in ("user_id", "item_tokens", "dense", "place"))
        np.testing.assert_array_equal(found, whole.user_id)
    whole, *shares = [file.count for file in read]
    assert whole < 0.65 * path.stat().st_size  # no row group that has nothing for training
    if ranks == 2:
        assert max(shares) < 0.65 * whole
        if mixed:  # most rows that a process computes are its own
            assert sum(len(batch.label) for batch in several[0]) < 0.6 * 6000


def test_vectors_of_unknown_items_are_zeros(tmp_path):
    path, tokens, (ids, vectors), _ = _learnable(tmp_path)
    batch = next(iter(stream_examples(path, (TRAIN,), tokens, 64, vectors=(ids[1:], vectors[1:]))))
    assert batch.item_vector.dtype == np.float32
    for item, vector in zip(batch.item_id, batch.item_vector, strict=True):
        assert np.array_equal(vector, vectors[item - 1] * (item > 1))


def test_export_refuses_a_graph_that_differs(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("build.ranker_onnx.TOLERANCE", -1.0)
    with pytest.raises(ReleaseError, match=r"embed\.onnx: eager and ONNX differ"):
        export_ranker(trained[0], tmp_path)


def test_padding_weighs_nothing():
    amounts = torch.tensor([[1.0, 1, 1, 1, 0], [0.0] * 5, [1 / 4, 0, 0, 0, 0], [3, 1, 0, 0, 0]])
    wanted = [[0.5] * 4 + [0], [0] * 5, [0.25, 0, 0, 0, 0], [1.5, 0.5, 0, 0, 0]]
    assert item_weights(amounts).tolist() == wanted


def test_amounts_of_a_token_add_up_and_travel_with_the_weights():
    """Ids 4 and 5 are a third and two of the token in row 3: whatever reads the weights knows it."""
    base, amount = np.array([0, 1, 2, 3, 3, 3]), np.array([0, 1, 1, 1, 1 / 3, 2], np.float32)
    shape = RankerShape(**SMALL | {"user_negative": False}, user_profile=False)
    model = new_ranker(shape, 0, (base, amount))
    found = model.features.tokens({"item_tokens": torch.tensor([[4, 5, 2, 0]])})["item_tokens"]
    assert found[0].tolist() == [[3, 3, 2, 0]]
    assert found[1][0].tolist() == pytest.approx([w / (1 / 3 + 2 + 1) ** 0.5 for w in (1 / 3, 2, 1, 0)])
    again = new_ranker(shape, 1)  # as an export does: shape and weights alone
    again.load_state_dict(model.state_dict())
    batch = {"item_tokens": torch.tensor([[4, 5, 2, 0]]), "user_index": torch.zeros(1, dtype=torch.long),
             "item_index": torch.zeros(1, dtype=torch.long), "context": torch.zeros(1, 1, dtype=torch.long),
             "dense": torch.zeros(1, 3)}  # fmt: skip
    assert torch.equal(again(batch), model(batch))
    assert not torch.equal(new_ranker(shape, 0)(batch), model(batch))


def test_arms_have_their_features():
    base = {"users": 2, "items": 2, "context": {"hour": 24}, "token_rows": 5, "dense": 3}
    assert RankerShape(**base, item_tokens=False, user_profile=False).features == ["user", "item", "context_hour"]
    assert RankerShape(**base).features == ["user", "item", "context_hour", "item_tokens", "profile"]
    more = RankerShape(**base | {"context": {}}, ids=False, user_negative=True, item_vector=4)
    assert more.features == ["item_tokens", "profile", "profile_negative", "item_vector"]


@pytest.mark.parametrize("bad", [
    {"model": "mlp"}, {"tasks": 0}, {"item_vector": -1}, {"token_weights": True, "item_tokens": False},
    {"ids": False, "context": {}, "item_tokens": False, "user_profile": False},
])  # fmt: skip
def test_bad_shape(bad):
    base = {"users": 2, "items": 2, "context": {"hour": 24}, "token_rows": 5, "dense": 3}
    with pytest.raises(ConfigError, match="expected"):
        RankerShape(**base | bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"arms": ("vision",)}, {"arms": ()}, {"seeds": 0}, {"item_dropout": 1.0}, {"user_dropout": -0.1},
        {"model": "x"},
    ],
)
def test_bad_configuration(bad):
    with pytest.raises(ConfigError, match="expected"):
        RankerConfig(**bad)


@pytest.mark.parametrize("options", [["--model", "din"], ["--model", "dcnv2", "--token-weights"]])
def test_the_command_trains_any_model_for_a_release(catalogue, tmp_path, options):
    from typer.testing import CliRunner

    from sightline.cli import app
    from trainer.captioning import write_captions

    items = read_items(catalogue)
    captions = dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True))
    write_captions(tmp_path / "captions.parquet", captions, "v-test")
    command = ["train", "ranker", "--data", str(catalogue), "--captions", str(tmp_path / "captions.parquet"), "--out",
               str(tmp_path / "ranker"), "--arm", "tokens", "--seeds", "1", "--epochs", "1", *options]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    shape = RankerShape.from_json(export_ranker(tmp_path / "ranker", tmp_path)["shape"])
    assert (shape.model, shape.token_weights, shape.user_negative) == (options[1], "--token-weights" in options, True)
    names = {tensor.name for tensor in onnxruntime.InferenceSession(tmp_path / "embed.onnx").get_inputs()}
    with np.load(tmp_path / "ranker" / "check.npz") as rows:
        assert names | {"DENSE", "label"} == set(rows.files)  # a build feeds these rows to the graphs


def test_a_ranker_with_vectors_is_not_released(parts, tmp_path):
    from build.assemble import build_release

    tiny_ranker(tmp_path / "ranker", item_vector=4)
    with pytest.raises(ReleaseError, match="ITEM_VECTOR, which nothing in the ensemble makes"):
        build_release(parts / "captioner", tmp_path / "ranker", tmp_path / "releases")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_makes_a_release(parts, tmp_path, model):
    from build.assemble import build_release

    tiny_ranker(tmp_path / "ranker", model=model)
    assert build_release(parts / "captioner", tmp_path / "ranker", tmp_path / "releases")
