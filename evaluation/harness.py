"""Arms × folds × seeds on one data set: the same examples, the same seeds, test labels held back until the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from evaluation.content import Content, describe_fold
from evaluation.splits import SPLITS, Fold, Log, folds
from sightline.errors import ConfigError
from sightline.schema import read_record
from sightline.tokens import Kind
from trainer import metrics
from trainer.captioner import CaptionerConfig
from trainer.examples import stream_examples
from trainer.metrics import relative_lift
from trainer.ranker import Prepared, RankerConfig, fit, predict, prepare_rows
from trainer.ranker_model import RankerShape
from trainer.splits import TEST

__all__ = ["ARMS", "Arm", "EvaluationConfig", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a ranker is given of an item's content.

    Attributes:
        source: `captions`, `shuffled` (captions dealt anew among the items: the same tokens, no meaning) or `reference`
            (the data set's own texts: the ceiling; also where no token is read).
        families: of the tokens.
        item, profile: tokens of the item, of the user's history.
        vector: the dense content vector.
    """

    source: str = "reference"
    families: tuple[Kind, ...] = ("slot",)
    item: bool = True
    profile: bool = True
    vector: bool = False


FULL: tuple[Kind, ...] = ("slot", "confidence")  # profiles are of the first
ARMS: dict[str, Arm] = {
    "ids": Arm(item=False, profile=False),
    "tokens": Arm(source="captions", families=FULL),
    "tokens, item only": Arm(source="captions", families=FULL, profile=False),
    "slots": Arm(source="captions", families=("slot",)),
    "words": Arm(source="captions", families=("word",)),
    "semantic ids": Arm(source="captions", families=("semantic",)),
    "tokens + semantic ids": Arm(source="captions", families=("slot", "confidence", "semantic")),
    "semantic ids, item only": Arm(source="captions", families=("semantic",), profile=False),
    "dense vector": Arm(item=False, profile=False, vector=True),
    "dense vector, with profile": Arm(source="captions", families=("slot",), item=False, vector=True),
    "shuffled": Arm(source="shuffled", families=FULL),
    "shuffled, item only": Arm(source="shuffled", families=FULL, profile=False),
    "oracle": Arm(source="reference", families=("slot",)),
    "oracle, item only": Arm(source="reference", families=("slot",), profile=False),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One evaluation.

    Attributes:
        split: one of `SPLITS`. folds: of the cold split. seeds: per arm and fold.
        arms: names of `ARMS`; the first is the base of all lifts.
    """

    split: str = "cold"
    folds: int = 5
    seeds: int = 5
    seed: int = 0
    arms: tuple[str, ...] = (
        "ids", "tokens", "tokens, item only", "dense vector", "semantic ids", "shuffled", "oracle"
    )  # fmt: skip
    captioner: CaptionerConfig = field(
        default_factory=lambda: CaptionerConfig(
            teacher_steps=450, tower_steps=350, steps=150, shift=6, eval_every=150
        )
    )
    ranker: RankerConfig = field(
        default_factory=lambda: RankerConfig(
            item_dropout=0.3, user_dropout=0.3, epochs=12, patience=2, table_std=0.03, table_lr=0.05, lr=2e-3
        )
    )

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"--split is {self.split!r}; expected one of {', '.join(SPLITS)}")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(set(self.arms)) < max(2, len(self.arms)):
            raise ConfigError(
                f"--arm is {', '.join(unknown or self.arms)}; expected at least two of {', '.join(ARMS)}, each once"
            )
        if self.seeds < 1:
            raise ConfigError(f"--seeds is {self.seeds}; expected at least 1")
        if self.folds < 3:
            raise ConfigError(
                f"--folds is {self.folds}; expected at least 3: one is tested, one is left out for cross-fitting, and "
                "the rest has to train a captioner"
            )


def evaluate(
    data: Path, work: Path, config: EvaluationConfig, *, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train and score every arm on every fold and seed; finished pieces are kept in `work` and not repeated.

    Returns:
        Per arm and cut: means of AUC, GAUC, NE, calibration over folds and seeds; lift of mean AUC over the first arm
        with a two-way (users × items) 95 % interval; and what the run was made of.

    Raises:
        ConfigError, DataError: see `Log.read`, `folds`, `describe_fold`.
    """
    began = time.monotonic()
    log = Log.read(data)
    work.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for fold in folds(log, config.split, count=config.folds, seed=config.seed):
        content = describe_fold(log, fold, work, config.captioner, progress=progress)
        scores: dict[str, list[np.ndarray]] = {}
        for name in config.arms:
            scores[name] = _scores(log, fold, content, name, work, config)
            progress(f"{fold.name}, {name}: {np.mean([_auc(log, fold, s) for s in scores[name]]):.4f} AUC")
        found.append({"fold": fold, "scores": scores})
    report = _summary(log, config, found)
    record = read_record(data)
    return {"name": record["name"], "folds": len(found), "seeds": config.seeds} | report | {
        "seconds": round(time.monotonic() - began, 1)
    }  # fmt: skip


def _auc(log: Log, fold: Fold, score: np.ndarray) -> float:
    return float(roc_auc_score(log.label[fold.part == TEST] > 0.5, score))


def _scores(
    log: Log, fold: Fold, content: Content, name: str, work: Path, config: EvaluationConfig
) -> list[np.ndarray]:
    """Test scores FP32 [rows], one array per seed."""
    arm = ARMS[name]
    identity = [log.identity, fold.name, config.seed, config.folds, *map(repr, (arm, config.captioner, config.ranker))]
    stem = work / f"{config.split}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    paths = [stem.with_name(f"{stem.name}-{seed}.npy") for seed in range(config.seeds)]
    if not all(path.exists() for path in paths):
        examples = stem.with_suffix(".parquet")
        made, shape = _prepare(log, fold, content, arm, examples, config)
        vectors = content.vectors if arm.vector else None
        for seed, path in enumerate(paths):
            if path.exists():
                continue
            model, _ = fit(
                shape, examples, made.table, config.ranker, config.seed + seed, name, vectors=vectors,
                tokens=made.tokens,
            )  # fmt: skip
            batches = stream_examples(examples, (TEST,), made.table, 8192, vectors=vectors)
            np.save(part := path.with_suffix(".part.npy"), predict(model, shape, batches))
            part.replace(path)
        examples.unlink()
    return [np.load(path) for path in paths]


def _prepare(
    log: Log, fold: Fold, content: Content, arm: Arm, examples: Path, config: EvaluationConfig
) -> tuple[Prepared, RankerShape]:
    texts, remembered = _texts(content, arm, config.seed)
    ranker = replace(config.ranker, families=arm.families, seed=config.seed)
    made = prepare_rows(log.data, examples, fold, texts, fold.fit_items, ranker, remembered=remembered)
    groups = ("item_tokens",) * arm.item + ("user_profile", "user_negative") * arm.profile
    return made, made.shape(ranker, groups, content.vectors[1].shape[1] if arm.vector else 0)


def _texts(content: Content, arm: Arm, seed: int) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """Item → text, as a feature of an example and as an item of a history."""
    if arm.source == "reference":
        return content.reference, content.reference
    if arm.source == "shuffled":
        items = sorted(content.texts)
        dealt = np.random.default_rng([seed, 12]).permutation(len(items))
        giver = {item: items[other] for item, other in zip(items, dealt, strict=True)}
        return (
            {item: content.texts[giver[item]] for item in items},
            {item: content.remembered[giver[item]] for item in items},
        )
    return content.texts, content.remembered


# --- figures -------------------------------------------------------------------------------------------------------


def _cuts(log: Log, fold: Fold) -> dict[str, np.ndarray]:
    """Test rows by how often their item stands in the rows that were fitted on: bool [test rows]."""
    items, counts = np.unique(log.item[fold.fitted], return_counts=True)
    test = log.item[fold.part == TEST]
    at = np.minimum(np.searchsorted(items, test), max(len(items) - 1, 0))
    seen = np.where(items[at] == test, counts[at], 0) if len(items) else np.zeros(len(test), np.int64)
    if not (seen > 0).any():
        return {"all": np.ones(len(test), bool)}
    head, torso = np.quantile(counts, [0.99, 0.9])
    cuts = {
        "all": np.ones(len(test), bool), "head": seen >= head, "torso": (seen >= torso) & (seen < head),
        "tail": (seen > 0) & (seen < torso), "cold": seen == 0,
    }  # fmt: skip
    return cuts


def _summary(log: Log, config: EvaluationConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Test rows of all folds together; an arm's AUC is the mean over seeds of the mean over folds."""
    cuts = [_cuts(log, one["fold"]) for one in found]
    report: dict[str, Any] = {"split": config.split, "arms": {}, "rows": {}, "reliability": {}}
    base = config.arms[0]
    for cut in cuts[0]:
        label, user, item, fold_of = [], [], [], []
        scores: dict[str, list[list[np.ndarray]]] = {arm: [[] for _ in range(config.seeds)] for arm in config.arms}
        for number, (one, masks) in enumerate(zip(found, cuts, strict=True)):
            rows = np.flatnonzero(one["fold"].part == TEST)[masks[cut]]
            label.append(log.label[rows] > 0.5)
            user.append(log.user[rows])
            item.append(log.item[rows])
            fold_of.append(np.full(len(rows), number))
            for arm in config.arms:
                for seed in range(config.seeds):
                    scores[arm][seed].append(one["scores"][arm][seed][masks[cut]])
        labels = np.concatenate(label)
        if not 0 < labels.sum() < len(labels):
            continue
        report["rows"][cut] = len(labels)
        pairs = np.stack([np.concatenate(user), np.concatenate(fold_of)])
        user_in_fold = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
        # Scores of different folds are of different models: only their order within a fold counts.
        joined = {arm: [_ranks(parts) for parts in seeds] for arm, seeds in scores.items()}
        for arm in config.arms:
            per_seed = [
                [metrics.ranking_metrics(y, s, u) for y, s, u in zip(label, parts, user, strict=True)
                 if 0 < y.sum() < len(y)]
                for parts in scores[arm]
            ]  # fmt: skip
            means = metrics.summary([metrics.summary(parts) for parts in per_seed])
            entry: dict[str, Any] = {
                key: means[key] for key in ("auc", "gauc", "ne", "calibration")
            } | {"auc_by_seed": [float(np.mean([part["auc"] for part in parts])) for parts in per_seed]}
            if arm != base:
                base_auc = report["arms"][base][cut]["auc"]
                entry["lift_percent"] = relative_lift(entry["auc"], base_auc)
                # Xiang et al. 2011; of a base no better than chance there is none.
                better = base_auc - 0.5
                entry["relaimpr_percent"] = 100 * ((entry["auc"] - 0.5) / better - 1) if better > 0 else None
                entry["lift_ci95"] = metrics.lift_interval(
                    labels, np.concatenate(user), joined[base], joined[arm], item=np.concatenate(item)
                )
                entry["gauc_lift_percent"] = relative_lift(entry["gauc"], report["arms"][base][cut]["gauc"])
                entry["gauc_lift_ci95"] = metrics.lift_interval(
                    labels, np.concatenate(user), joined[base], joined[arm], item=np.concatenate(item),
                    groups=user_in_fold,
                )  # fmt: skip
                entry["lift_ci95_users"] = metrics.lift_interval(
                    labels, np.concatenate(user), joined[base], joined[arm]
                )
            report["arms"].setdefault(arm, {})[cut] = entry
            if cut == "all":
                report["reliability"][arm] = _reliability(labels, np.concatenate(scores[arm][0]))
    return report


def _ranks(parts: list[np.ndarray]) -> np.ndarray:
    """Scores of several folds → shares of the fold's rows with a lower score, ties equal."""
    return np.concatenate([np.searchsorted(np.sort(part), part) / max(1, len(part)) for part in parts])


def _reliability(label: np.ndarray, score: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Mean prediction and share of positives in tenths of the rows by score."""
    order = np.array_split(np.argsort(score, kind="stable"), bins)
    return [{"predicted": float(score[rows].mean()), "observed": float(label[rows].mean())} for rows in order]
