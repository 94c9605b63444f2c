"""Train and compare rankers; the chosen one becomes the ranker folder that a release is built from."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchrec.models.dlrm import DLRM
from torchrec.optim import RowWiseAdagrad
from tqdm import tqdm

from sightline.errors import ConfigError, DataError
from sightline.profile import DENSE, ProfileConfig, UserProfiles
from sightline.schema import read_interactions, read_items, read_record
from sightline.tokens import Kind, TokenSpec
from trainer import metrics
from trainer.examples import TEST, TRAIN, VALID, Batch, Columns, stream_examples, write_examples
from trainer.ranker_model import RankerShape, jagged, new_ranker
from trainer.splits import Split, micros, training_items

log = logging.getLogger(__name__)

# arm → (item tokens?, user profile?)
ARMS: dict[str, tuple[bool, bool]] = {
    "ids": (False, False),
    "item_tokens": (True, False),
    "profile": (False, True),
    "tokens": (True, True),
}


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """One comparison of arms; the first seed of the last arm becomes the ranker folder."""

    arms: tuple[str, ...] = ("ids", "tokens")
    seeds: int = 2
    families: tuple[Kind, ...] = ("word", "bigram")
    token_rows: int = 2048  # per hashed family
    token_length: int = 24
    profile_length: int = 24
    dim: int = 16
    epochs: int = 4
    batch: int = 1024
    lr: float = 4e-3
    table_lr: float = 0.1
    id_dropout: float = 0.1
    patience: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise ConfigError(f"--arm is {', '.join(unknown) or 'empty'}; expected some of {', '.join(ARMS)}")
        for name in ("seeds", "token_rows", "token_length", "profile_length", "dim", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"--id-dropout is {self.id_dropout}; expected a share from 0 to below 1")


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
    out.mkdir(parents=True, exist_ok=True)
    items, interactions, record = read_items(data), read_interactions(data), read_record(data)
    if interactions.num_rows == 0:
        raise DataError(
            f"{data}/interactions.parquet: expected interactions to train a ranker on, it is empty"
        )
    split = Split.of(record, micros(interactions["timestamp"]))
    columns = Columns.of(interactions, split)
    fit_on = set(
        items["item_id"].to_numpy()[training_items(items, interactions, record, split, config.seed)].tolist()
    )
    spec = TokenSpec.fit(
        [caption for item, caption in captions.items() if item in fit_on],
        families=config.families, length=config.token_length, rows=config.token_rows, seed=config.seed,
    )  # fmt: skip
    ids = np.array(sorted(captions), dtype=np.int64)
    table = (ids, spec.encode_batch([captions[i] for i in ids.tolist()]))
    profiles = UserProfiles(ProfileConfig(length=config.profile_length), spec.ids_of(config.families[0]))
    write_examples(
        data,
        out / "examples.parquet",
        columns,
        split,
        dict(zip(ids.tolist(), table[1], strict=True)),
        profiles,
    )

    test = _Test(out / "examples.parquet", table, columns)
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[np.ndarray]] = {}
    chosen: tuple[DLRM, RankerShape] | None = None
    for arm in config.arms:
        item_tokens, user_profile = ARMS[arm]
        shape = RankerShape(
            users=columns.users.rows, items=columns.items.rows, context=columns.context, token_rows=spec.rows,
            dense=len(DENSE), dim=config.dim, item_tokens=item_tokens, user_profile=user_profile,
        )  # fmt: skip
        scores[arm] = []
        for seed in range(config.seeds):
            model, history = _fit(shape, out / "examples.parquet", table, config, config.seed + seed, arm)
            scores[arm].append(_predict(model, shape, test.batches()))
            if arm == config.arms[-1] and seed == 0:
                chosen = (model, shape)
            results.setdefault(arm, {"history": []})["history"].append(history)
    assert chosen is not None
    for arm in config.arms:
        results[arm]["cuts"] = test.metrics(scores[arm])
    base = config.arms[0]
    lifts = {arm: test.lifts(scores[base], scores[arm]) for arm in config.arms[1:]}

    version = _write_folder(out, chosen, spec, columns, profiles, captioner_version)
    write_check(out, next(test.batches()))
    report = {
        "version": version,
        "config": asdict(config),
        "split": asdict(split),
        "token_spec_version": spec.version,
        "captioner_version": captioner_version,
        "cuts": {name: int(mask.sum()) for name, mask in test.cuts.items()},
        "arms": results,
        "lift_percent": lifts,
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "record.json").write_text(json.dumps(report, indent=2))
    return report


def bayes_auc(data: Path) -> dict[str, float] | None:
    """AUC of the simulator's own probabilities after the split, all and cold; None without an oracle."""
    path = data / "oracle.parquet"
    if not path.exists():
        return None
    interactions, record = read_interactions(data), read_record(data)
    time_ = micros(interactions["timestamp"])
    split = Split.of(record, time_)
    known = Columns.of(interactions, split).items
    probability = pq.read_table(path)["probability"].to_numpy()
    label = interactions["label"].to_numpy()
    after = time_ >= split.test_from
    cold = after & (known.index(interactions["item_id"].to_numpy()) == 0)
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
        cold = np.concatenate([b.item_index for b in batches]) == 0
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
        "dense",
    )
    return {name: torch.from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in names}


def _fit(
    shape: RankerShape,
    path: Path,
    table: tuple[np.ndarray, np.ndarray],
    config: RankerConfig,
    seed: int,
    arm: str,
) -> tuple[DLRM, list[dict[str, float]]]:
    model = new_ranker(shape, seed)
    is_table = {id(p) for p in model.sparse_arch.parameters()}
    optimizers = [
        RowWiseAdagrad(model.sparse_arch.parameters(), lr=config.table_lr),
        torch.optim.Adam([p for p in model.parameters() if id(p) not in is_table], lr=config.lr),
    ]
    history: list[dict[str, float]] = []
    best, stale, kept = float("inf"), 0, {}
    for epoch in range(config.epochs):
        rng = np.random.default_rng([seed, 8, epoch])
        model.train()
        total = rows = 0.0
        progress = tqdm(desc=f"{arm} seed {seed} epoch {epoch}", unit="row", mininterval=2, leave=False)
        for batch in stream_examples(path, (TRAIN,), table, config.batch, shuffle=rng):
            inputs = tensors(batch)
            # Dropped ids train row 0, which then stands for users and items that training never saw.
            for name in ("user_index", "item_index"):
                dropped = torch.from_numpy(rng.uniform(size=len(batch.label)) < config.id_dropout)
                inputs[name] = inputs[name].masked_fill(dropped, 0)
            logits = model(inputs["dense"], jagged(shape, inputs)).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.label))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total, rows = total + float(loss.detach()) * len(batch.label), rows + len(batch.label)
            progress.update(len(batch.label))
        progress.close()
        valid = list(stream_examples(path, (VALID,), table, 8192))
        predicted = _predict(model, shape, iter(valid))
        label = np.concatenate([b.label for b in valid])
        valid_loss = float(F.binary_cross_entropy(torch.from_numpy(predicted), torch.from_numpy(label)))
        history.append({"epoch": epoch, "train_loss": total / rows, "valid_loss": valid_loss})
        if valid_loss < best:
            best, stale = valid_loss, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            stale += 1
            if stale > config.patience:
                break
    model.load_state_dict(kept)
    return model.eval(), history


@torch.no_grad()
def _predict(model: DLRM, shape: RankerShape, batches: Iterator[Batch]) -> np.ndarray:
    """Click probabilities FP32 [rows]."""
    model.eval()
    scores = []
    for batch in batches:
        inputs = tensors(batch)
        scores.append(torch.sigmoid(model(inputs["dense"], jagged(shape, inputs)).squeeze(1)).numpy())
    return np.concatenate(scores)


def write_check(out: Path, batch: Batch) -> None:
    """`check.npz`: held-out rows as the exported graphs take them, and `label`. A build measures on them what a
    lower precision costs."""
    inputs = {name.upper(): value.numpy() for name, value in tensors(batch).items()}
    for name in ("USER_INDEX", "ITEM_INDEX"):
        inputs[name] = inputs[name].reshape(-1, 1)
    np.savez_compressed(out / "check.npz", label=batch.label, **inputs)


def _write_folder(
    out: Path, chosen: tuple[DLRM, RankerShape], spec: TokenSpec, columns: Columns, profiles: UserProfiles,
    captioner_version: str,
) -> str:  # fmt: skip
    """model.pt, ranker.json, token_spec.json, users.parquet, items.parquet. Returns the version."""
    model, shape = chosen
    torch.save(model.state_dict(), out / "model.pt")
    spec.save(out / "token_spec.json")
    users = np.union1d(columns.users.ids, np.fromiter(profiles, dtype=np.int64))
    users = np.concatenate([[0], users[users > 0]])  # user 0 is nobody: the fallback
    read = [profiles.read(user) for user in users.tolist()]
    pq.write_table(
        pa.table(
            {
                "user_id": users,
                "user_index": columns.users.index(users),
                "profile_tokens": [p.tokens for p in read],
                "profile_weights": [p.weights for p in read],
                "dense": [p.dense for p in read],
            }
        ),
        out / "users.parquet",
    )
    items = np.concatenate([[0], columns.items.ids])
    pq.write_table(
        pa.table({"item_id": items, "item_index": columns.items.index(items)}), out / "items.parquet"
    )
    digest = hashlib.sha256()
    for name in ("model.pt", "token_spec.json", "users.parquet", "items.parquet"):
        digest.update((out / name).read_bytes())
    document = {
        "version": digest.hexdigest()[:12],
        "token_spec_version": spec.version,
        "captioner_version": captioner_version,
        "context": [{"name": name, "cardinality": n} for name, n in columns.context.items()],
        "token_length": spec.length,
        "profile_length": profiles.config.length,
        "dense": list(DENSE),
        "features": len(shape.features),
        "dim": shape.dim,
        "shape": shape.to_json(),
    }
    (out / "ranker.json").write_text(json.dumps(document, indent=2))
    return str(document["version"])
