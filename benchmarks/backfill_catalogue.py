"""The recommender's own case of `make bench-backfill`: content vectors by two captioners, clicks as relevance.

    item ──captioner's vision tower──► content vector          clicks before the cut ──► labels to fit on
                                                               clicks after it ──► what a new item should find

Nothing is trained but the transforms, on items that were clicked before the data set's cut. A tenth of these chooses
settings. Queries and gallery are items that training never saw (`trainer.splits.training_items`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize
from transformers import LlavaForConditionalGeneration

from benchmarks.backfill_data import VALIDATION, Asked, Case
from benchmarks.program import say
from catalogue.simulate import SLOT_WEIGHTS
from evaluation.backfilling.curves import ends
from evaluation.backfilling.ranks import Relevance, Side
from evaluation.splits import Log
from sightline.content import encode, unit
from sightline.errors import ConfigError, DataError, MediaError
from sightline.media import MediaSpec
from sightline.prompt import captioner_version
from sightline.schema import MediaReader, read_interactions, read_record
from trainer.backfill.methods import Embeddings
from trainer.behaviour import behaviour_words
from trainer.captioner_model import Encoder
from trainer.metrics import GRAMMARS
from trainer.splits import Split, training_items

__all__ = ["NOTES", "catalogue", "content_vectors", "liked_alike"]

Array = NDArray[np.float32]
NEAREST = 10  # relevant items of a query
DIMENSIONS = 16  # of users' tastes
GROUPS, GROUP = 60, 30  # labels at most; items that a label should have
LIKES = 2  # clicks that an item needs for a label
BATCH = 64  # media
NOTES = (
    f"Relevant are the {NEAREST} items whose clickers after the cut are nearest to the query's in taste, as clicks "
    "before the cut tell it. Labels are groups of items that the same users clicked before the cut.",
    "One pair of captioners: runs differ in transforms, labels and validation items. BCT is left out: its new model "
    "would have to be trained for it.",
)


def catalogue(data: Path, captioners: Sequence[Path], seed: int, kept: Path) -> Case:
    """One seed's case.

    `fit`: items with clicks before the cut, with labels by `trainer.behaviour` from these items' clicks before the cut;
    items that were clicked too seldom for a label are left out. `validation`: a seeded tenth of the items with clicks
    before the cut; what is relevant among them is said by these clicks. `test`: items that training never saw and that
    were clicked after the cut. No click after the cut is used but to say what is relevant in `test`.

    Args:
        data: a data set with media, clicks and a cut (its own, or one by time: `Split.of`).
        captioners: folders of the old and of the new one.
        seed: of the validation items and the labels.
        kept: folder of content vectors, which are computed once per captioner and catalogue.

    Raises:
        ConfigError: both folders hold the same captioner, or one holds none.
        DataError: no data set, no clicks after the cut, or too few before it.
    """
    versions = [captioner_version(folder) for folder in captioners]
    if versions[0] == versions[1]:
        raise ConfigError(f"--captioners: both folders hold captioner {versions[0]}, expected an old one and a new one")
    log, record = Log.read(data), read_record(data)
    split = Split.of(record, log.time)
    by_version = [content_vectors(folder, log, kept) for folder in captioners]
    shown = np.intersect1d(by_version[0][0], by_version[1][0])
    vectors = [found[np.isin(ids, shown)] for ids, found in by_version]
    trained = log.items["item_id"].to_numpy()[training_items(log.items, read_interactions(data), record, split, 0)]
    before = log.time < split.test_from
    clicked = (log.label > 0) & np.isin(log.item, shown)
    known = np.unique(log.item[clicked & before])
    asked = np.setdiff1d(log.item[clicked & ~before], trained)
    held, fit = np.split(np.random.default_rng([seed, 23]).permutation(known), [round(VALIDATION * len(known))])
    held.sort()
    if min(len(asked), len(held)) <= NEAREST:
        raise DataError(
            f"{data}: expected more than {NEAREST / VALIDATION:.0f} items with clicks before the cut and {NEAREST} "
            f"others that appear after it and have clicks, got {len(known)} and {len(asked)}; make a larger data set"
        )
    words = behaviour_words(
        log.user[before], log.item[before], log.label[before], items=fit, min_likes=LIKES, seed=seed,
        clusters=max(2, min(GROUPS, len(fit) // GROUP)),
    )  # fmt: skip
    ids = np.array(sorted(words), np.int64)
    groups = np.unique([words[item] for item in ids.tolist()], return_inverse=True)[1].astype(np.int64)

    def embeddings(ids: NDArray[np.int64], labels: NDArray[np.int64]) -> Embeddings:
        old, new = (found[np.searchsorted(shown, ids)] for found in vectors)
        return Embeddings(old=old, new=new, labels=labels)

    def cut(ids: NDArray[np.int64], rows: NDArray[np.bool_], of: NDArray[np.int64]) -> Asked:
        both = embeddings(ids, np.full(len(ids), -1))
        tastes = _tastes(_clicks(log, clicked & before, of))
        return Asked(queries=both, gallery=both, relevance=liked_alike(_clicks(log, clicked & rows, ids), tastes))

    on, test = embeddings(ids, groups), cut(asked, ~before, known)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return Case(
        fit=on, validation=cut(held, before, np.sort(fit)), test=test,
        head=unit(np.stack([on.new[groups == one].mean(0) for one in range(groups.max() + 1)])),
        keys={
            name: f"{version}-{log.identity}-{source}" for name, version in zip(("old", "new"), versions, strict=True)
        },
        sizes={"fit": len(ids), "validation": len(held), "test": len(asked), "classes": int(groups.max()) + 1},
        reference=_reference(log, record, asked, test.relevance),
        trial=1.0,  # fewer epochs favour warmer temperatures than those that are best in the end
    )  # fmt: skip


def content_vectors(folder: Path, log: Log, kept: Path) -> tuple[NDArray[np.int64], Array]:
    """Content vectors of all items whose media can be used by a captioner folder's vision tower: their ids, int64 [N]
    ascending, and float32 [N, W], rows of length 1. Computed once per captioner and items.parquet."""
    file = kept / f"{captioner_version(folder)}-{log.catalogue}.npz"
    if not file.exists():
        say(f"content vectors of {len(log.described)} items by {folder}")
        spec, media = MediaSpec.from_pretrained(folder), MediaReader(log.data, log.items)
        encoder = Encoder(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)).eval()

        def pool(frames: Array) -> NDArray[Any]:
            with torch.inference_mode():
                return np.asarray(encoder(torch.from_numpy(frames))[1].numpy())

        found: dict[int, Array] = {}
        for at in range(0, len(log.described), BATCH):
            ids = log.described[at : at + BATCH].tolist()
            vectors = encode([media[item] or b"" for item in ids], spec, pool)
            found |= {item: one for item, one in zip(ids, vectors, strict=True) if not isinstance(one, MediaError)}
        if not found:
            raise DataError(f"{log.data}: expected items with an image or a video, found none that can be used")
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, ids=np.array(list(found), np.int64), vectors=np.stack(list(found.values())))
        part.replace(file)
    with np.load(file) as arrays:
        return arrays["ids"], arrays["vectors"]


def _clicks(log: Log, rows: NDArray[np.bool_], ids: NDArray[np.int64]) -> sparse.csr_matrix:
    """{0, 1} [items of `ids`, ascending; users of the log]."""
    users, rows = np.unique(log.user), rows & np.isin(log.item, ids)
    at = np.searchsorted(ids, log.item[rows]), np.searchsorted(users, log.user[rows])
    found = sparse.csr_matrix((np.ones(len(at[0])), at), shape=(len(ids), len(users)))
    found.data[:] = 1  # clicked twice is clicked
    return found


def _tastes(clicks: sparse.csr_matrix) -> NDArray[np.float64]:
    """Users' places in clicks [items, users]: left singular vectors of D_u^−½ Cᵀ D_i^−½, D the numbers of clicks,
    without the first, which tells but who clicks much (Dhillon 2001); unit rows less their mean, [users, DIMENSIONS].
    """
    items, users = (sparse.diags(1 / np.sqrt(np.maximum(np.asarray(clicks.sum(axis)).ravel(), 1))) for axis in (1, 0))
    svd = TruncatedSVD(min(DIMENSIONS + 1, *clicks.shape), random_state=0)
    places = normalize(svd.fit_transform(users @ clicks.T @ items)[:, 1:])
    return np.asarray(places - places.mean(0))


def liked_alike(clicks: sparse.csr_matrix, tastes: NDArray[np.float64]) -> Relevance:
    """What is relevant to an item: the NEAREST others by the cosine of their clickers' summed tastes, where that is
    above 0. Two items' common clickers are too few to be counted (docs/backfilling_methods.md).

    Args:
        clicks: {0, 1} [N, users]. tastes: [users, D].
    """
    places = normalize(clicks @ tastes)
    near = places @ places.T
    np.fill_diagonal(near, -1)
    last = np.sort(near, axis=1)[:, -min(NEAREST, len(near) - 1)]
    return Relevance(matrix=(near >= last[:, None]) & (near > 0), itself=np.arange(len(near)))


def _reference(
    log: Log, record: Mapping[str, Any], ids: NDArray[np.int64], relevance: Relevance
) -> dict[str, dict[str, float]]:
    """mAP and CMC@1 of a random ranking and of one by what the data set's texts say of the items: cosine of one-hot
    slots, weighted as the generator's tastes weigh them, equal ones in random order."""
    slots, rng = GRAMMARS[record.get("grammar", "words")], np.random.default_rng(0)
    texts = dict(zip(log.items["item_id"].to_pylist(), log.items["text"].to_pylist(), strict=True))
    said = [slots(texts[item] or "") for item in ids.tolist()]
    column = {pair: at for at, pair in enumerate(sorted(set().union(*said)))}
    hot = np.zeros((len(ids), len(column) + 1), np.float32)
    for row, pairs in enumerate(said):
        for pair in pairs:
            hot[row, column[pair]] = SLOT_WEIGHTS.get(pair[0], 1.0)
    noise = rng.normal(size=(len(ids), 32)).astype(np.float32)
    found = {}
    for name, vectors in (("random", noise), ("attributes", np.hstack([normalize(hot), noise * 1e-4]))):
        side = Side(queries=vectors, gallery=vectors)
        alone = ends(side, side, relevance)[0]
        found[name] = {"mAP": float(alone.precision.mean()), "CMC@1": float((alone.before < 1).mean())}
    return found
