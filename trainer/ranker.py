"""Train and compare rankers; the chosen one becomes the ranker folder that a release is built from."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from tqdm import tqdm

from sightline.errors import ConfigError, DataError
from sightline.features import FEATURES, Versions
from sightline.profile import DENSE, ProfileConfig, UserProfiles
from sightline.schema import read_interactions, read_items, read_record
from sightline.tokens import Kind, TokenSpec
from trainer import metrics
from trainer.examples import Batch, Columns, ItemTable, stream_examples, write_examples
from trainer.features import write_features
from trainer.metrics import grammar_of
from trainer.ranker_model import MODELS, TABLE_STD, Ranker, RankerShape, Tokens, new_ranker
from trainer.splits import TEST, TRAIN, VALID, Rows, Split, micros, training_items

log = logging.getLogger(__name__)

# arm → RankerShape's feature groups that it has beside ids and context
ARMS: dict[str, tuple[str, ...]] = {
    "ids": (),
    "item_tokens": ("item_tokens",),
    "profile": ("user_profile",),
    "positive": ("item_tokens", "user_profile"),
    "tokens": ("item_tokens", "user_profile", "user_negative"),
}


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """One comparison of arms; the first seed of the last arm becomes the ranker folder."""

    arms: tuple[str, ...] = ("ids", "tokens")
    model: str = "dlrm"
    seeds: int = 2
    families: tuple[Kind, ...] = ("slot",)  # profiles are made of the first one's tokens
    token_rows: int = 2048  # per hashed family
    token_length: int = 24
    profile_length: int = 24
    token_weights: bool = False  # learn a weight per token for the pooled item tokens
    dim: int = 16
    epochs: int = 4
    batch: int = 1024
    lr: float = 4e-3
    table_lr: float = 0.1
    table_std: float = TABLE_STD  # smaller for small logs (docs/log.md)
    item_dropout: float = 0.1  # share of examples whose item, or user, is a stranger's
    user_dropout: float = 0.1
    patience: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ConfigError(f"--arm is {', '.join(unknown) or 'empty'}; expected some of {', '.join(ARMS)}")
        if self.model not in MODELS:
            raise ConfigError(f"--model is {self.model!r}; expected one of {', '.join(MODELS)}")
        for name in ("seeds", "token_rows", "token_length", "profile_length", "dim", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("item_dropout", "user_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share from 0 to below 1")

    @property
    def table_options(self) -> dict[str, float]:
        """Of row-wise Adagrad. `eps` is named because TorchRec's plain and fused forms have other defaults."""
        return {"lr": self.table_lr, "eps": 1e-8}


def train_ranker(
    data: Path, captions: dict[int, str], captioner_version: str, out: Path, config: RankerConfig
) -> dict[str, Any]:
    """Train every arm on the same examples and seeds, compare them after the split, and write the ranker folder.

    The token spec is fitted on the captions of training items; vocabularies and weights on rows before the
    split; early stopping looks at the last part of those. Rows after it are scored once per trained model.

    Args:
        captions: item_id → the captioner's caption.
        captioner_version: whose captions they are; the release checks it.

    Returns:
        The record: per arm and cut (`all`, `cold`, `warm`) mean AUC, GAUC, NE, calibration over the seeds;
        relative lifts over the first arm with 95 % intervals; also in `out/record.json`.
    """
    began = time.monotonic()
    made = prepare(data, captions, out, config)
    test = _Test(out / "examples.parquet", made.table, made.columns)
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[np.ndarray]] = {}
    chosen: Ranker | None = None
    for arm in config.arms:
        shape = made.shape(config, ARMS[arm])
        scores[arm] = []
        for seed in range(config.seeds):
            model, history = fit(
                shape, out / "examples.parquet", made.table, config, config.seed + seed, arm, tokens=made.tokens
            )
            scores[arm].append(predict(model, shape, test.batches()))
            if arm == config.arms[-1] and seed == 0:
                chosen = model
            results.setdefault(arm, {"history": []})["history"].append(history)
    assert chosen is not None
    for arm in config.arms:
        results[arm]["cuts"] = test.metrics(scores[arm])
    base = config.arms[0]
    lifts = {arm: test.lifts(scores[base], scores[arm]) for arm in config.arms[1:]}

    version = write_ranker(out, chosen.state_dict(), chosen.shape, made, captioner_version, data)
    report = {
        "version": version,
        "config": asdict(config),
        "split": asdict(made.split),
        "token_spec_version": made.spec.version,
        "captioner_version": captioner_version,
        "cuts": {name: int(mask.sum()) for name, mask in test.cuts.items()},
        "arms": results,
        "lift_percent": lifts,
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "record.json").write_text(json.dumps(report, indent=2))
    return report


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all arms share. The examples themselves are in a file."""

    split: Rows
    columns: Columns
    spec: TokenSpec
    texts: Mapping[int, str]  # item → caption
    table: ItemTable  # item ids and their tokens
    profiles: UserProfiles  # as of the end of the log

    @property
    def tokens(self) -> Tokens:
        """What the rows of the token table stand for."""
        return self.spec.base, self.spec.amount

    def shape(self, config: RankerConfig, groups: Collection[str], item_vector: int = 0) -> RankerShape:
        """Of a ranker with these feature groups beside ids and context."""
        chosen = {group: group in groups for group in ("item_tokens", "user_profile", "user_negative")}
        return RankerShape(
            users=self.columns.users.rows, items=self.columns.items.rows, context=self.columns.context,
            token_rows=self.spec.rows, dense=len(DENSE), dim=config.dim, model=config.model,
            table_std=config.table_std, item_vector=item_vector,
            token_weights=config.token_weights and chosen["item_tokens"], **chosen,
        )  # fmt: skip


def prepare(data: Path, captions: dict[int, str], out: Path, config: RankerConfig) -> Prepared:
    """`prepare_rows` by the data set's own split and training items, into `out/examples.parquet`.

    Raises:
        DataError: the data set has no interactions.
    """
    out.mkdir(parents=True, exist_ok=True)
    items, interactions, record = read_items(data), read_interactions(data), read_record(data)
    if interactions.num_rows == 0:
        raise DataError(
            f"{data}/interactions.parquet: expected interactions to train a ranker on, it is empty"
        )
    split = Split.of(record, micros(interactions["timestamp"]))
    may = items["item_id"].to_numpy()[training_items(items, interactions, record, split, config.seed)]
    return prepare_rows(data, out / "examples.parquet", split, captions, may, config)


def prepare_rows(
    data: Path, examples: Path, rows: Rows, texts: Mapping[int, str], may: np.ndarray, config: RankerConfig, *,
    remembered: Mapping[int, str] | None = None,
) -> Prepared:  # fmt: skip
    """Fit the token spec on texts of the items that it may be fitted on, and write the examples.

    Args:
        texts: item → its caption. remembered: the same for items in histories, where they are others.
        may: int64 ids of items.
    """
    fit_on = set(may.tolist())
    columns = Columns.of(read_interactions(data), rows)
    spec = TokenSpec.fit(
        [text for item, text in texts.items() if item in fit_on],
        families=config.families, length=config.token_length, rows=config.token_rows, seed=config.seed,
        slots=grammar_of(read_record(data)),
    )  # fmt: skip
    ids = np.array(sorted(texts), dtype=np.int64)

    def encoded(texts: Mapping[int, str]) -> np.ndarray:
        return spec.encode_batch([texts[item] for item in ids.tolist()])

    table = (ids, encoded(texts))
    past = table[1] if remembered is None else encoded(remembered)
    profiles = UserProfiles(
        ProfileConfig(length=config.profile_length, prior_strength=columns.mean_strength),
        *spec.amounts_of(config.families[0]),
    )
    tokens, history = (dict(zip(ids.tolist(), rows_, strict=True)) for rows_ in (table[1], past))
    write_examples(data, examples, columns, rows, tokens, profiles, history_tokens=history)
    return Prepared(split=rows, columns=columns, spec=spec, texts=texts, table=table, profiles=profiles)


def bayes_auc(data: Path) -> dict[str, float] | None:
    """AUC of the simulator's own probabilities after the split, all and cold; None without an oracle."""
    path = data / "oracle.parquet"
    if not path.exists():
        return None
    interactions, record = read_interactions(data), read_record(data)
    time_ = micros(interactions["timestamp"])
    split = Split.of(record, time_)
    met = Columns.of(interactions, split).met
    probability = pq.read_table(path)["probability"].to_numpy()
    label = interactions["label"].to_numpy()
    after = time_ >= split.test_from
    cold = after & ~np.isin(interactions["item_id"].to_numpy(), met)
    return {
        name: float(roc_auc_score(label[m], probability[m])) for name, m in (("all", after), ("cold", cold))
    }


class _Test:
    """The rows after the split, with their cuts: all, cold (item never seen in training), warm."""

    def __init__(self, path: Path, table: tuple[np.ndarray, np.ndarray], columns: Columns) -> None:
        self._path, self._table = path, table
        batches = list(self.batches())
        self.label = np.concatenate([b.label for b in batches])
        self.user = np.concatenate([b.user_id for b in batches])
        cold = ~np.isin(np.concatenate([b.item_id for b in batches]), columns.met)
        cuts = {"all": np.ones_like(cold), "cold": cold, "warm": ~cold}
        self.cuts = {name: mask for name, mask in cuts.items() if 0 < self.label[mask].sum() < mask.sum()}

    def batches(self) -> Iterator[Batch]:
        return stream_examples(self._path, (TEST,), self._table, 8192)

    def metrics(self, scores: list[np.ndarray]) -> dict[str, dict[str, float]]:
        return {
            name: metrics.summary(
                [metrics.ranking_metrics(self.label[m], s[m], self.user[m]) for s in scores]
            )
            for name, m in self.cuts.items()
        }

    def lifts(self, base: list[np.ndarray], other: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        found = {}
        for name, m in self.cuts.items():
            a, b = (
                float(np.mean([roc_auc_score(self.label[m], s[m]) for s in arm])) for arm in (base, other)
            )
            interval = metrics.lift_interval(
                self.label[m], self.user[m], [s[m] for s in base], [s[m] for s in other]
            )
            found[name] = {"lift": metrics.relative_lift(b, a), "ci95": list(interval)}
        return found


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The model's inputs of a batch as tensors."""
    names = (
        "user_index",
        "item_index",
        "context",
        "item_tokens",
        "profile_tokens",
        "profile_weights",
        "profile_negative_tokens",
        "profile_negative_weights",
        "item_vector",
        "dense",
    )
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in names}


class Shard(NamedTuple):
    """Which of the processes this one is."""

    rank: int = 0
    ranks: int = 1

    def total(self, *values: float) -> list[float]:
        """Sums over the processes."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()


def fit(
    shape: RankerShape, path: Path, table: ItemTable, config: RankerConfig, seed: int, name: str, *,
    vectors: ItemTable | None = None, tokens: Tokens | None = None,
) -> tuple[Ranker, list[dict[str, float]]]:  # fmt: skip
    """Train one ranker on the training rows of an examples file; early stopping looks at the validation rows.

    Args:
        path: what `write_examples` wrote; the columns `label` and `part` may be others than that.
        table: item ids ascending int64 [n], their tokens int64 [n, L].
        name: of the progress bar.
        vectors: item ids ascending int64 [m], their content vectors FP32 [m, V], for `shape.item_vector` = V.
        tokens: what the rows of the token table stand for, where that is not each for itself.

    Returns:
        The ranker with the weights of its best epoch; the epochs as `optimise` returns them.

    Raises:
        DataError: the file has no training rows, or no validation rows.
    """
    model = new_ranker(shape, seed, tokens)
    history = optimise(model, optimizer(model, config), path, table, config, seed, name, vectors=vectors)
    return model.eval(), history


def optimizer(model: Ranker, config: RankerConfig) -> torch.optim.Optimizer:
    """Row-wise Adagrad for tables, Adam for the rest.

    The tables are replaced by TorchRec's fused ones, which update rows inside of the backward pass and touch only those
    that a batch has. What is returned steps the rest.
    """
    tables = {id(table) for table in model.tables().values()}
    dense = [p for p in model.parameters() if id(p) not in tables]
    for name in ("bags", "sequences"):
        if (plain := getattr(model, name)) is not None:
            fused = FusedEmbeddingBagCollection(
                tables=plain.embedding_bag_configs(), optimizer_type=RowWiseAdagrad,
                optimizer_kwargs=config.table_options, is_weighted=plain.is_weighted(),
            )  # fmt: skip
            fused.load_state_dict(plain.state_dict())
            setattr(model, name, fused)
    return torch.optim.Adam(dense, lr=config.lr)


def optimise(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path, table: ItemTable,
    config: RankerConfig, seed: int, name: str, *, vectors: ItemTable | None = None, shard: Shard | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """The training loop of `fit`, on one process or as one `shard` of several; leaves the best epoch's weights.

    Returns:
        Per epoch mean training and validation loss in nats, and how many labels this process trained on.
    """
    shard = shard or Shard()
    history: list[dict[str, float]] = []
    best, stale, kept = float("inf"), 0, {}
    for epoch in range(config.epochs):
        rng = np.random.default_rng([seed, 8, epoch])
        model.train()
        total = known = own = 0.0
        with tqdm(
            desc=f"{name} seed {seed} epoch {epoch}", unit="row", mininterval=2, leave=False, disable=shard.rank > 0
        ) as progress:
            for read in stream_examples(path, (TRAIN,), table, config.batch, rng, vectors=vectors, shard=shard):
                batch = _drop_ids(read, rng, config)
                here = int(np.isfinite(batch.label).sum())
                (labels,) = shard.total(here)
                loss = _loss(model, batch)
                optimizer.zero_grad()
                # Gradients of several processes are averaged: so this is the mean over the whole batch.
                (loss * (shard.ranks / max(1, labels))).backward()
                optimizer.step()
                total, known, own = total + float(loss.detach()), known + labels, own + here
                progress.update(batch.rows)
        # In random order every process has about as many rows of a batch.
        order = np.random.default_rng(0)
        valid = stream_examples(path, (VALID,), table, 8192, order, vectors=vectors, shard=shard)
        valid_loss = _mean_loss(model, valid, shard)
        if not known or np.isnan(valid_loss):
            raise DataError(
                f"{path}: expected labelled rows for training and validation, one of the two parts has none; "
                "give a longer log or another split"
            )
        train_loss = shard.total(total)[0] / known
        history.append({"epoch": epoch, "train_loss": train_loss, "valid_loss": valid_loss, "labels": own})
        if valid_loss < best:
            best, stale = valid_loss, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            stale += 1
            if stale > config.patience:
                break
    model.load_state_dict(kept)
    return history


def _drop_ids(batch: Batch, rng: np.random.Generator, config: RankerConfig) -> Batch:
    """Dropped ids train row 0, which then stands for users and items that training never saw."""
    user, item = (
        np.where(rng.uniform(size=batch.rows)[batch.place] < share, 0, index)
        for index, share in (
            (batch.user_index, config.user_dropout),
            (batch.item_index, config.item_dropout),
        )
    )
    return replace(batch, user_index=user, item_index=item)


def _loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Cross entropy in nats, summed over the labels that are known."""
    logits = model(tensors(batch))
    label = torch.from_numpy(batch.label).view_as(logits)
    return F.binary_cross_entropy_with_logits(
        logits, label.nan_to_num(), weight=label.isfinite().float(), reduction="sum"
    )


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, batches: Iterable[Batch], shard: Shard) -> float:
    """NaN without any labels."""
    model.eval()
    total = known = 0.0
    for batch in batches:
        total += float(_loss(model, batch))
        known += float(np.isfinite(batch.label).sum())
    total, known = shard.total(total, known)
    return total / known if known else float("nan")


@torch.no_grad()
def predict(model: torch.nn.Module, shape: RankerShape, batches: Iterable[Batch]) -> np.ndarray:
    """Probabilities FP32 [rows]; [rows, tasks] where the ranker has several tasks."""
    model.eval()
    scores = np.concatenate([torch.sigmoid(model(tensors(batch))).numpy() for batch in batches])
    return scores[:, 0] if shape.tasks == 1 else scores


def write_check(out: Path, batch: Batch) -> None:
    """`check.npz`: held-out rows as the exported graphs take them, and `label`. A build measures on them what a
    lower precision costs."""
    inputs = {name.upper(): value.numpy() for name, value in tensors(batch).items() if value.shape[-1]}
    for name in ("USER_INDEX", "ITEM_INDEX"):
        inputs[name] = inputs[name].reshape(-1, 1)
    np.savez_compressed(out / "check.npz", label=batch.label, **inputs)


def write_ranker(
    out: Path, weights: dict[str, Tensor], shape: RankerShape, made: Prepared, captioner_version: str, data: Path
) -> str:
    """The ranker folder: model.pt, ranker.json, token_spec.json, users.parquet, items.parquet, features/, check.npz.

    Returns:
        Its version.
    """
    columns, spec, profiles = made.columns, made.spec, made.profiles
    torch.save(weights, out / "model.pt")
    spec.save(out / "token_spec.json")
    for name, known in (("user", columns.users), ("item", columns.items)):
        ids = np.concatenate([[0], known.ids])  # 0 is nobody: the fallback
        pq.write_table(pa.table({f"{name}_id": ids, f"{name}_index": known.index(ids)}), out / f"{name}s.parquet")
    digest = hashlib.sha256()
    for name in ("model.pt", "token_spec.json", "users.parquet", "items.parquet"):
        digest.update((out / name).read_bytes())
    document = {
        "version": digest.hexdigest()[:12],
        "token_spec_version": spec.version,
        "captioner_version": captioner_version,
        "context": [{"name": name, "cardinality": n} for name, n in columns.context.items()],
        "token_length": spec.length,
        "profile": asdict(profiles.config),
        "dense": list(DENSE),
        "features": len(shape.features),
        "dim": shape.dim,
        "shape": shape.to_json(),
    }
    (out / "ranker.json").write_text(json.dumps(document, indent=2))
    write_features(out / FEATURES, data, Versions.of(document), made.texts, made.table, profiles)
    write_check(out, next(stream_examples(out / "examples.parquet", (TEST,), made.table, 8192)))
    return str(document["version"])
