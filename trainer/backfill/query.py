"""The query transform as a deployable: fitted on two aligned arrays of vectors, exported to ONNX, measured.

    query.onnx       VECTOR FP32 [batch, D_n] → NEW FP32 [batch, D_n], OLD FP32 [batch, D_o], rows of length 1
    uncertainty.npy  FP32 [D_o]: weights of an old vector; the larger the sum, the worse OLD finds the item
    transform.json   dimensions, configuration, temperature, figures on items that it was not fitted on

A vector of the new backbone gives NEW, which is what the new gallery keeps of an item and what searches it, and OLD,
which searches the old gallery as it lies. An item's distance is 2 − 2⟨·, ·⟩ in the gallery that it is in; one sort over
both answers the query (distance rank merge).
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from evaluation.backfilling.curves import Method, ends, evaluate, summarise
from evaluation.backfilling.orders import descending, random_orders
from evaluation.backfilling.ranks import Relevance, Side
from sightline.errors import ConfigError, DataError, ReleaseError
from trainer.backfill.fit import Fit, fit_query, ridge, unit_rows
from trainer.backfill.images import split
from trainer.backfill.transforms import QueryTransform

__all__ = ["TEMPERATURES", "TransformConfig", "apply_query", "export_query_transform", "train_query_transform"]

TEMPERATURES = (0.1, 0.2, 0.4, 1.0)
TOLERANCE = 1e-5  # absolute, on rows of length 1: FP32 sums in another order
LEAST = 64  # items
NEIGHBOURS = 10  # that an item without a label should find: those nearest to it in the new system
QUERIES = 2000  # at most, of the validation


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """What is fitted. The defaults suit some thousand to a million items."""

    loss: str = "mcl"
    """`mcl`: ψ and, with labels, ρ by the joint contrastive loss; `rqt`: ψ alone by its distance to the old vectors."""
    linear: bool = True
    """ψ is a linear map, from least squares, and what the layers add to it."""
    blocks: int = 2
    hidden: int = 256
    epochs: int = 50
    batch: int = 512
    lr: float = 1e-3
    temperature: float = 0.0
    """τ of exp(−d/τ); 0 chooses among `TEMPERATURES` by mAP over the backfill on the validation items."""
    validation: float = 0.1
    """Share of the items that only choose and measure."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("mcl", "rqt"):
            raise ConfigError(f"loss: got {self.loss!r}, expected mcl or rqt")
        if not 0 < self.validation <= 0.5:
            raise ConfigError(f"validation: got {self.validation}, expected a share above 0, at most 0.5")
        if self.temperature < 0:
            raise ConfigError(f"temperature: got {self.temperature}, expected a positive number, or 0 to choose")
        self.fit(self.temperature or TEMPERATURES[0])

    def fit(self, temperature: float) -> Fit:
        return Fit(
            blocks=self.blocks, hidden=self.hidden, epochs=self.epochs, batch=self.batch, lr=self.lr,
            temperature=temperature, seed=self.seed,
            reverse_weight=1.0,  # without labels an item has little else to be found by
        )  # fmt: skip


def train_query_transform(
    old: NDArray[Any], new: NDArray[Any], labels: NDArray[np.int64] | None, out: Path, *,
    config: TransformConfig = TransformConfig(),
) -> dict[str, Any]:  # fmt: skip
    """Fit ψ (and ρ) on the vectors of the same items in both systems; write `query.onnx`, `uncertainty.npy` and
    `transform.json` to `out`.

    Args:
        old, new: floating point [N, D_o] and [N, D_n], any length but 0, row i of both being the same item.
        labels: int64 [N]: items of one label should find each other. Without labels an item's positive is itself, the
            new embedding stays as it is, and figures are about finding an item's neighbours in the new system.

    Returns:
        the record in transform.json. Its figures are of items held out: mAP and CMC@1 of the old system, the new one
        and over the backfill, for the transform in a random order and with the uncertain items first, and for DRM
        without a transform.

    Raises DataError for arrays that do not fit together, fewer than 64 items, and labels that are all different.
    """
    old, new = unit_rows(old, "old"), unit_rows(new, "new")
    if len(old) != len(new) or (labels is not None and labels.shape != (len(old),)):
        shapes = f"{old.shape}, {new.shape} and {None if labels is None else labels.shape}"
        raise DataError(f"old, new and labels: got {shapes}, expected the same items in all")
    if len(old) < LEAST:
        raise DataError(f"got {len(old)} items, expected at least {LEAST} to fit and to validate a transform on")
    if labels is None:
        fit, held = split(np.zeros(len(old), np.int64), config.validation, config.seed)
    else:
        fit, held = split(labels, config.validation, config.seed)
    if labels is not None and (len(held) == 0 or len(np.unique(labels[held])) == len(held)):
        raise DataError("labels: expected several items of one label among those held out; without labels pass None")
    olds, news = (side[held] for side in (old, new))
    relevance = _relevance(news, None if labels is None else labels[held])
    asked = slice(0, relevance.shape[0])
    before, after = Side(queries=olds[asked], gallery=olds), Side(queries=news[asked], gallery=news)
    alone = ends(before, after, relevance)

    def measured(method: Method) -> dict[str, Any]:
        orders = {} if method.orders else random_orders(len(held), range(3))
        runs = list(evaluate({"": method}, relevance, orders)[""].values())
        found = summarise(runs, [alone[0]] * len(runs), [alone[1]] * len(runs))
        return {metric: found[metric] for metric in ("mAP", "CMC@1")} | {"negative_flips": found["negative_flips"]}

    def fitted(config: TransformConfig, temperature: float) -> tuple[QueryTransform, Method]:
        loss = "reverse" if config.loss == "rqt" else "joint"
        own = None if labels is None else labels[fit]
        learn_new = own is not None and loss == "joint"
        module = fit_query(old[fit], new[fit], own, loss, config.fit(temperature), learn_new=learn_new,
                           linear=config.linear)  # fmt: skip
        to_new, to_old = apply_query(module, news)
        return module, Method(
            old=Side(queries=to_old[asked], gallery=olds), new=Side(queries=to_new[asked], gallery=to_new)
        )

    temperature, tried = config.temperature, {}
    if config.loss == "mcl" and not temperature:
        short = replace(config, epochs=max(1, config.epochs // 3))
        tried = {value: measured(fitted(short, value)[1])["mAP"]["auc"]["value"] for value in TEMPERATURES}
        temperature = max(tried, key=lambda value: tried[value])
    module, method = fitted(config, temperature or TEMPERATURES[0])
    weights = _uncertainty(module, old[fit], new[fit])
    first = replace(method, orders={"uncertainty": descending(olds @ weights)})
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "uncertainty.npy", weights)
    record = {
        "old_dim": old.shape[1], "new_dim": new.shape[1], "items": len(old), "fitted_on": len(fit),
        "labelled": labels is not None, "learnt_new": module.residual is not None, "config": asdict(config),
        "temperature": temperature if config.loss == "mcl" else None,
        "mAP_by_temperature": {str(value): round(found, 5) for value, found in tried.items()},
        "validation": {
            "transform": measured(method), "transform, uncertain first": measured(first),
            "rank merge alone": measured(Method(old=before, new=after)),
        },
        "onnx_error": export_query_transform(out / "query.onnx", module),
    }  # fmt: skip
    part = out / "transform.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, out / "transform.json")
    return record


@torch.inference_mode()
def apply_query(module: QueryTransform, new: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """NEW [N, D_n] and OLD [N, D_o] of new vectors [N, D_n]."""
    forward, reverse = module.eval()(torch.from_numpy(new))
    return forward.numpy(), reverse.numpy()


def export_query_transform(path: Path, transform: QueryTransform) -> float:
    """Write the ONNX graph and return its largest difference to torch on random vectors, one and many at a time.

    Raises ReleaseError if that is above 1e-5.
    """
    transform = transform.eval()
    vectors = torch.randn(17, transform.new_dim, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            transform, (vectors,), path, input_names=["VECTOR"], output_names=["NEW", "OLD"],
            dynamic_axes={name: {0: "batch"} for name in ("VECTOR", "NEW", "OLD")}, dynamo=False,
        )  # fmt: skip
        eager = [value.numpy() for value in transform(vectors)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    error = 0.0
    for rows in (slice(0, 1), slice(0, 17)):
        exported = session.run(["NEW", "OLD"], {"VECTOR": vectors[rows].numpy()})
        error = max(error, *(_apart(one[rows], two) for one, two in zip(eager, exported, strict=True)))
    if not error <= TOLERANCE:
        raise ReleaseError(f"{path.name}: torch and ONNX differ by {error:.2e}; expected at most {TOLERANCE:g}")
    return error


def _uncertainty(module: QueryTransform, old: NDArray[np.float32], new: NDArray[np.float32]) -> NDArray[np.float32]:
    """How badly ψ will do for an item, from its old vector: ridge regression of log d(ψ(n), o), [D_o].

    What FastFill's uncertainty (Jaeckle et al. 2023) is to a transform of the gallery, linear.
    """
    _, reverse = apply_query(module, new)
    error = np.log(np.maximum(2 - 2 * (reverse * old).sum(1, keepdims=True), 1e-6))
    weights: NDArray[np.float32] = ridge(error, old)[0][0]
    return weights


def _apart(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    return float(np.abs(one - two).max())


def _relevance(new: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Relevance:
    """The first items as queries against all that are held out."""
    count = min(len(new), QUERIES)
    itself = np.arange(count)
    if labels is not None:
        return Relevance(query_labels=labels[:count], gallery_labels=labels, itself=itself)
    similar = new[:count] @ new.T
    similar[itself, itself] = -np.inf
    nearest = min(NEIGHBOURS, len(new) - 1)
    matrix = np.zeros(similar.shape, bool)
    np.put_along_axis(matrix, np.argpartition(-similar, nearest - 1, axis=1)[:, :nearest], True, axis=1)
    return Relevance(matrix=matrix, itself=itself)
