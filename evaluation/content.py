"""What is known of the items of a fold: texts, content vectors, semantic ids; each fitted on the fold's items alone.

Cross-fitting: a captioner knows the pictures that it was fitted on nearly by heart. If a ranker were trained on such
captions it would learn to trust them, and then meet those of unseen items. So the items that a captioner may be fitted
on are dealt into groups, and the captions of a group, as features of an example, come from a captioner that was fitted
on the other groups. Captions as items of a *history* come from a captioner that was fitted on them: of what a user saw
long ago we may know all there is (docs/log.md has both measured).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from evaluation.splits import Fold, Log
from sightline.annotation import Annotated
from sightline.media import MediaSpec
from sightline.schema import MediaReader
from trainer.captioner import CaptionerConfig, train_captioner
from trainer.captioner_data import Pixels
from trainer.captioning import Described, describe_pixels

__all__ = ["Content", "describe_fold", "residual_codes"]

CODE_LEVELS, CODE_SIZE = 3, 32


@dataclass(frozen=True, kw_only=True)
class Content:
    """Of one fold; items without usable media are absent everywhere.

    Attributes:
        texts: item → annotated caption, as features of an example.
        remembered: item → annotated caption, as an item of a history.
        reference: item → the text that the data set has.
        vectors: ids int64 [n] ascending and FP32 [n, D]; of one captioner, for vectors of two are not comparable.
    """

    texts: Mapping[int, str]
    remembered: Mapping[int, str]
    reference: Mapping[int, str]
    vectors: tuple[np.ndarray, np.ndarray]


def describe_fold(
    log: Log, fold: Fold, work: Path, config: CaptionerConfig, *, progress: Callable[[str], None] = lambda line: None
) -> Content:
    """Train the fold's captioners (those that `work` has already are not trained again) and describe all items.

    Raises:
        DataError: the fold has no item with media and text to fit a captioner on.
    """
    ids = log.items["item_id"].to_numpy()
    text = dict(zip(ids.tolist(), log.items["text"].to_pylist(), strict=True))
    group = dict(zip(ids.tolist(), fold.groups.tolist(), strict=True))
    described = [item for item in log.described.tolist() if item in group]
    kept = sorted({group[item] for item in described} - {-1})
    by_group: dict[int, dict[int, tuple[str, np.ndarray]]] = {}
    for left_out in kept:
        fitted = {i: text[i] for i in described if group[i] not in (-1, left_out) and text[i]}
        found = _described(log, fitted, work, config, progress)
        by_group[left_out] = {
            item: (Annotated(caption, confidences=confidence).to_text(), vector)
            for item, caption, vector, confidence in zip(
                found.ids.tolist(), found.captions, found.vectors, found.confidences, strict=True
            )
        }
    first, second = by_group[kept[0]], by_group[kept[1]]
    usable = sorted(first)
    codes = residual_codes(
        np.stack([first[item][1] for item in usable]), np.array([group[item] not in (-1, kept[0]) for item in usable])
    )

    def full(text: str, code: np.ndarray) -> str:
        known = Annotated.parse(text)
        return Annotated(known.caption, code.tolist(), known.confidences).to_text()

    own = {item: by_group[group[item]] if group[item] >= 0 else first for item in usable}
    other = {item: second if group[item] == kept[0] else first for item in usable}
    return Content(
        texts={item: full(own[item][item][0], code) for item, code in zip(usable, codes, strict=True)},
        remembered={item: full(other[item][item][0], code) for item, code in zip(usable, codes, strict=True)},
        reference={item: text[item] for item in usable if text[item]},
        vectors=(np.array(usable, np.int64), np.stack([first[item][1] for item in usable])),
    )


def _described(
    log: Log, texts: Mapping[int, str], work: Path, config: CaptionerConfig, progress: Callable[[str], None]
) -> Described:
    """A captioner fitted on exactly `texts`, applied to everything; kept under a name that follows from both."""
    digest = hashlib.sha256(json.dumps([log.catalogue, sorted(texts.items()), repr(config)]).encode()).hexdigest()[:12]
    folder, cache = work / f"captioner-{digest}", work / f"described-{digest}.npz"
    if not cache.exists():
        progress(f"captioner on {len(texts)} items: {folder}")
        train_captioner(log.data, folder, config, texts=texts)
        pixels = Pixels(MediaReader(log.data, log.items), log.described.tolist(), MediaSpec.from_pretrained(folder))
        found = describe_pixels(folder, pixels)
        part = cache.with_suffix(".part.npz")
        np.savez(
            part, ids=found.ids, vectors=found.vectors, captions=json.dumps(found.captions),
            confidences=json.dumps(found.confidences),
        )  # fmt: skip
        part.replace(cache)
    with np.load(cache) as held:
        return Described(
            ids=held["ids"], vectors=held["vectors"], captions=json.loads(str(held["captions"])),
            confidences=json.loads(str(held["confidences"])),
        )  # fmt: skip


def residual_codes(
    vectors: np.ndarray, fit: np.ndarray, *, levels: int = CODE_LEVELS, size: int = CODE_SIZE, seed: int = 0
) -> np.ndarray:
    """Semantic ids int64 [n, levels] by residual k-means (QARM, arXiv 2411.11739), coarse to fine.

    Args:
        vectors: FP32 [n, D]; standardised before clustering.
        fit: bool [n], rows that the centres may be fitted on.
    """
    mean, scale = vectors[fit].mean(0), vectors[fit].std(0) + 1e-6
    rest = (vectors - mean) / scale
    codes = np.zeros((len(vectors), levels), np.int64)
    for level in range(levels):
        centres = KMeans(min(size, int(fit.sum())), n_init=1, random_state=seed).fit(rest[fit])
        codes[:, level] = centres.predict(rest)
        rest = rest - centres.cluster_centers_[codes[:, level]]
    return codes
