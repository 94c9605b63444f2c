"""Ranking while the captioner is exchanged: AUC with a part of the items described by the new one, the rest by the old.

The ranker is the new release's. Items that its captioner has not described yet have the old one's captions, in the
ranker's own tokens, as `sightline store carry-over` gives them; users' profiles are built from whatever was known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from sightline.features import Versions
from sightline.profile import UserProfiles
from sightline.schema import read_interactions, read_record
from sightline.tokens import TokenSpec
from trainer import metrics
from trainer.examples import Columns, stream_examples, write_examples
from trainer.ranker import predict
from trainer.ranker_model import RankerShape, new_ranker
from trainer.splits import TEST, Split, micros

__all__ = ["curve", "scores_of"]


def scores_of(
    data: Path, ranker_dir: Path, captions: Mapping[int, str], examples: Path
) -> dict[str, NDArray[Any]]:
    """What a ranker says of the rows after the split, if items have these captions.

    Args:
        captions: item → annotated caption, by whichever captioner.
        examples: file that is written.

    Returns:
        score FP32, label, user, item [rows]; cold bool [rows], items that training never saw.
    """
    spec, versions = TokenSpec.load(ranker_dir / "token_spec.json"), Versions.read(ranker_dir)
    interactions = read_interactions(data)
    split = Split.of(read_record(data), micros(interactions["timestamp"]))
    columns = Columns.of(interactions, split)
    ids = np.array(sorted(captions), np.int64)
    tokens = spec.encode_batch([captions[item] for item in ids.tolist()])
    profiles = UserProfiles(versions.profile, *spec.amounts_of(spec.families[0].kind))
    write_examples(data, examples, columns, split, dict(zip(ids.tolist(), tokens, strict=True)), profiles)
    shape = RankerShape.from_json(json.loads((ranker_dir / "ranker.json").read_text())["shape"])
    model = new_ranker(shape, seed=0)
    model.load_state_dict(torch.load(ranker_dir / "model.pt", weights_only=True))
    batches = list(stream_examples(examples, (TEST,), (ids, tokens), 8192))
    label, user, item = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("label", "user_id", "item_id")
    )
    return {
        "score": predict(model, shape, batches), "label": label, "user": user, "item": item,
        "cold": ~np.isin(item, columns.met),
    }  # fmt: skip


def curve(
    data: Path, ranker_dir: Path, old: Mapping[int, str], new: Mapping[int, str], fractions: Sequence[float],
    work: Path, *, seed: int = 0, draws: int = 200,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """AUC at each fraction of items that the new captioner has described, in a random order.

    Args:
        old, new: item → annotated caption.
        fractions: ascending, from 0 to 1.

    Yields:
        Per fraction `fraction`, and per cut (all, cold) `auc` and `lift_ci95`: the two-way interval of the lift in
        percent over the worse of the two ends.
    """
    items = np.random.default_rng([seed, 16]).permutation(sorted(new))
    ends = {
        end: scores_of(data, ranker_dir, captions, work / "examples.parquet")
        for end, captions in ((0.0, {item: old.get(item, "") for item in new}), (1.0, new))
    }
    for fraction in fractions:
        moved = set(items[: round(fraction * len(items))].tolist())
        mixed = {item: new[item] if item in moved else old.get(item, "") for item in new}
        found = ends.get(fraction) or scores_of(data, ranker_dir, mixed, work / "examples.parquet")
        point: dict[str, Any] = {"fraction": round(fraction, 4)}
        for cut, rows in (("all", np.ones(len(found["label"]), bool)), ("cold", found["cold"])):
            label, user, item = (found[name][rows] for name in ("label", "user", "item"))
            worse = min(ends.values(), key=lambda end: roc_auc_score(label, end["score"][rows]))
            interval = metrics.lift_interval(
                label, user, [worse["score"][rows]], [found["score"][rows]], item=item, draws=draws
            )
            point[cut] = {
                "auc": float(roc_auc_score(label, found["score"][rows])),
                "lift_ci95": [round(one, 3) for one in interval],
            }  # fmt: skip
        yield point
