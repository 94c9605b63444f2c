"""Caption items offline with a trained captioner, and measure the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.neighbors import NearestNeighbors
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from sightline.errors import DataError
from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt
from sightline.schema import MediaReader, read_interactions, read_items, read_record
from trainer.captioner import image_tokens
from trainer.captioner_data import Pixels
from trainer.metrics import GRAMMARS, caption_metrics, slot_recall
from trainer.splits import Split, micros, training_items


@torch.inference_mode()
def caption_items(
    captioner: Path, data: Path, item_ids: Sequence[int] | None = None, *, batch: int = 128
) -> dict[int, str]:
    """item_id → caption, greedy, for all items with usable media (or those of `item_ids`)."""
    items = read_items(data)
    ids = items["item_id"].to_pylist() if item_ids is None else list(item_ids)
    return caption_pixels(
        captioner, Pixels(MediaReader(data, items), ids, MediaSpec.from_pretrained(captioner)), batch
    )


@torch.inference_mode()
def caption_pixels(captioner: Path, pixels: Pixels, batch: int = 128) -> dict[int, str]:
    """item_id → caption of decoded media."""
    prompt = CaptionPrompt.from_pretrained(captioner)
    model = LlavaForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).eval()
    tokens = image_tokens(model)
    captions: dict[int, str] = {}
    progress = tqdm(total=len(pixels), desc="caption", unit="item", mininterval=1)
    for group in pixels.by_length(np.arange(len(pixels))):
        frames = int(pixels.counts[group[0]])
        head = torch.from_numpy(prompt.token_ids(tokens * frames).astype(np.int64))
        for rows in np.array_split(group, -(-len(group) * frames // batch)):
            ids = head.expand(len(rows), -1)
            out = model.generate(
                input_ids=ids, pixel_values=pixels.normalised(pixels.batch(rows)), attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.max_new_tokens, do_sample=False, eos_token_id=prompt.end_id,
                pad_token_id=prompt.pad_id,
            )  # fmt: skip
            for row, generated in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                captions[pixels.ids[row]] = prompt.text(generated)
            progress.update(len(rows))
    progress.close()
    return captions


# Bins of a word's confidence: how many times its share of the training captions its probability is.
CONFIDENCE_BINS = (1.2, 1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a captioner has to say of items.

    Attributes:
        ids: int64 [n].
        captions: greedy.
        vectors: FP32 [n, D], the vision tower's patches averaged over patches and frames.
        confidences: per item, word → bin from 1 (`CONFIDENCE_BINS[0]` times its usual share) on; none where the folder
            has no word classifier.
    """

    ids: np.ndarray
    captions: list[str]
    vectors: np.ndarray
    confidences: list[dict[str, int]]


@torch.inference_mode()
def describe_pixels(captioner: Path, pixels: Pixels, batch: int = 128) -> Described:
    """Caption, content vector and word confidences of decoded media."""
    model = LlavaForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).eval()
    words = np.load(captioner / "words.npz") if (captioner / "words.npz").exists() else None
    vectors = np.zeros((len(pixels), model.config.vision_config.hidden_size), np.float32)
    confidences: list[dict[str, int]] = [{} for _ in range(len(pixels))]
    for group in pixels.by_length(np.arange(len(pixels))):
        frames = int(pixels.counts[group[0]])
        for rows in np.array_split(group, -(-len(group) * frames // batch)):
            states = model.model.vision_tower(
                pixel_values=pixels.normalised(pixels.batch(rows))
            ).last_hidden_state[:, 1:]
            vectors[rows] = states.mean(1).unflatten(0, (-1, frames)).mean(1).numpy()
            if words is not None:
                pooled = states.amax(1).unflatten(0, (-1, frames))  # [B, frames, width]
                in_order = np.linspace(0, frames - 1, int(words["frames"])).round().astype(np.int64)
                logits = pooled[:, in_order].flatten(1).numpy() @ words["weight"].T + words["bias"]
                ratio = 1 / (1 + np.exp(-logits)) / (words["rate"] + 0.01)
                for row, bins in zip(rows, np.digitize(ratio, CONFIDENCE_BINS), strict=True):
                    found = {str(words["words"][at]).replace("▁", ""): int(bins[at]) for at in np.flatnonzero(bins)}
                    confidences[row] = {word: level for word, level in found.items() if word.isalnum()}
    captions = caption_pixels(captioner, pixels, batch)
    return Described(
        ids=np.array(pixels.ids, np.int64), captions=[captions[item] for item in pixels.ids], vectors=vectors,
        confidences=confidences,
    )  # fmt: skip


def write_captions(path: Path, captions: dict[int, str], version: str) -> None:
    """Write item_id → caption as Parquet, marked with the captioner's version; whole or not at all."""
    table = pa.table(
        {"item_id": pa.array(captions, pa.int64()), "caption": pa.array(captions.values(), pa.string())}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(table.replace_schema_metadata({"captioner": version}), part)
    part.replace(path)


def read_captions(path: Path) -> tuple[dict[int, str], str]:
    """item_id → caption, and the version of the captioner that wrote them.

    Raises:
        DataError: no such file, or not one that `sightline caption` wrote.
    """
    if not path.exists():
        raise DataError(f"{path}: expected captions; write them with `sightline caption`")
    table = pq.read_table(path)
    version = (table.schema.metadata or {}).get(b"captioner")
    if version is None or not {"item_id", "caption"} <= set(table.column_names):
        raise DataError(
            f"{path}: expected item_id, caption and the captioner's version; write it with `sightline caption`"
        )
    return dict(
        zip(table["item_id"].to_pylist(), table["caption"].to_pylist(), strict=True)
    ), version.decode()


def caption_quality(data: Path, captions: dict[int, str], seed: int) -> dict[str, dict[str, Any]]:
    """Caption metrics on items that the captioner was not fitted on, and on unseen combinations among them.

    A combination is unseen if the generator held it out; in other data, if no training item has the same set
    of attributes.

    Returns:
        `items` and `combinations`, each with `trainer.metrics.caption_metrics` and the recall per slot.
    """
    _, record, rows = _described(data, seed)
    slots: Callable[[str], Any] = GRAMMARS[record.get("grammar", "words")]
    unseen_pairs = {tuple(pair) for pair in record.get("held_out", [])}
    seen = {frozenset(slots(text)) for _, text, fit in rows if fit}

    def unseen(text: str) -> bool:
        found = dict(slots(text))
        if unseen_pairs:
            return (found.get("object"), found.get("colour")) in unseen_pairs
        return frozenset(slots(text)) not in seen

    held = [(captions[item], text) for item, text, fit in rows if not fit and item in captions]
    cuts = {"items": held, "combinations": [pair for pair in held if unseen(pair[1])]}
    quality: dict[str, dict[str, Any]] = {}
    for name, pairs in cuts.items():
        if pairs:
            ours, theirs = zip(*pairs, strict=True)
            quality[name] = {
                **caption_metrics(ours, theirs, slots),
                "recall": slot_recall(ours, theirs, slots),
            }
    return quality


def caption_baselines(data: Path, captioner: Path, seed: int) -> dict[str, dict[str, float]]:
    """What a captioner has to beat on held-out items: two captions that need no model.

    Returns:
        Caption metrics of `most_frequent` (the commonest training caption for everything) and `nearest_pixels`
        (the caption of the training item whose first frame, as the captioner sees it, is nearest in L2).
    """
    items, record, rows = _described(data, seed)
    text = {item: caption for item, caption, _ in rows}
    fitted = {item: fit for item, _, fit in rows}
    ids = list(text)
    pixels = Pixels(MediaReader(data, items), ids, MediaSpec.from_pretrained(captioner))
    first = pixels.frames[pixels.starts].reshape(len(pixels), -1).astype(np.float32)
    known = np.array([fitted[item] for item in pixels.ids])
    captions = [text[item] for item in pixels.ids]
    reference = [caption for caption, fit in zip(captions, known, strict=True) if not fit]
    train = [caption for caption, fit in zip(captions, known, strict=True) if fit]
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(first[known])
    at = nearest.kneighbors(first[~known], return_distance=False)[:, 0]
    slots = GRAMMARS[record.get("grammar", "words")]
    common = Counter(train).most_common(1)[0][0]
    return {
        "most_frequent": caption_metrics([common] * len(reference), reference, slots),
        "nearest_pixels": caption_metrics([train[i] for i in at], reference, slots),
    }


def _described(data: Path, seed: int) -> tuple[pa.Table, dict[str, Any], list[tuple[int, str, bool]]]:
    """Items, record, and of every item with a text: id, text, whether the captioner was fitted on it."""
    items, interactions, record = read_items(data), read_interactions(data), read_record(data)
    split = Split.of(record, micros(interactions["timestamp"])) if interactions.num_rows else None
    fitted = training_items(items, interactions, record, split, seed).tolist()
    rows = zip(items["item_id"].to_pylist(), items["text"].to_pylist(), fitted, strict=True)
    return items, record, [row for row in rows if row[1]]
