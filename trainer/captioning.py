"""Caption items offline with a trained captioner, and measure the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from sightline.annotation import Annotated, plain
from sightline.errors import ConfigError, DataError
from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt, captioner_version
from sightline.schema import MediaReader, open_parquet, read_interactions, read_items, read_record
from sightline.words import WordHead
from trainer.behaviour import split_behaviour
from trainer.caption_report import calibration, coverage, slot_scores
from trainer.captioner_data import Pixels
from trainer.captioner_model import Encoder
from trainer.metrics import GRAMMARS, caption_metrics
from trainer.splits import Split, micros, training_items


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a captioner has to say of items.

    Attributes:
        ids: int64 [n].
        captions: greedy.
        vectors: FP32 [n, width], pooled features averaged over frames.
        confidences: per item, word → level 1 … 9 (sightline/words.py); none where the folder has no word classifier.
    """

    ids: np.ndarray
    captions: list[str]
    vectors: np.ndarray
    confidences: list[dict[str, int]]

    @property
    def annotations(self) -> dict[int, str]:
        """item_id → annotated caption, as the server's ANNOTATION."""
        return {
            int(item): Annotated(caption, confidences=confidence).to_text()
            for item, caption, confidence in zip(self.ids, self.captions, self.confidences, strict=True)
        }


def caption_items(
    captioner: Path, data: Path, item_ids: Sequence[int] | None = None, *, batch: int = 128
) -> dict[int, str]:
    """item_id → annotated caption, for all items with usable media (or those of `item_ids`).

    `sightline.annotation.plain` gives the caption that people read.
    """
    return describe_pixels(captioner, _pixels(captioner, data, item_ids), batch).annotations


def describe_pixels(captioner: Path, pixels: Pixels, batch: int = 128) -> Described:
    """Greedy caption, content vector and word confidences of decoded media."""
    with tqdm(total=len(pixels), desc="caption", unit="item", mininterval=1) as progress:
        return Captioner(captioner).describe(pixels, batch, progress.update)


class Captioner:
    """A captioner folder, loaded once for any number of batches; `version` as `captioner_version` has it."""

    def __init__(self, folder: Path) -> None:
        self.version, self.spec = captioner_version(folder), MediaSpec.from_pretrained(folder)
        self._prompt, self._words = CaptionPrompt.from_pretrained(folder), WordHead.from_pretrained(folder)
        self._model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def describe(self, pixels: Pixels, batch: int, advance: Callable[[int], object]) -> Described:
        """`describe_pixels`; `advance` hears of every batch's number of items."""
        captions = [""] * len(pixels)
        vectors = np.zeros((len(pixels), self._model.config.vision_config.hidden_size), np.float32)
        confidences: list[dict[str, int]] = [{} for _ in range(len(pixels))]
        for rows, start, pooled in _read(self._model, self._prompt, pixels, batch):
            written = _write(self._model, self._prompt, start, do_sample=False)
            vectors[rows] = pooled.mean(1)
            known = self._words(pooled) if self._words else [{} for _ in rows]
            for row, text, levels in zip(rows, written, known, strict=True):
                captions[row], confidences[row] = text, levels
            advance(len(rows))
        ids = np.array(pixels.ids, np.int64)
        return Described(ids=ids, captions=captions, vectors=vectors, confidences=confidences)


def sample_items(
    captioner: Path, data: Path, item_ids: Sequence[int] | None = None, *, samples: int, temperature: float = 1.0,
    seed: int = 0,
) -> dict[int, list[str]]:  # fmt: skip
    """`sample_pixels` of all items with usable media (or those of `item_ids`)."""
    pixels = _pixels(captioner, data, item_ids)
    return sample_pixels(captioner, pixels, samples=samples, temperature=temperature, seed=seed)


@torch.inference_mode()
def sample_pixels(
    captioner: Path, pixels: Pixels, *, samples: int, temperature: float = 1.0, seed: int = 0, batch: int = 128
) -> dict[int, list[str]]:
    """item_id → `samples` captions drawn from the decoder's distribution at `temperature`, repetitions included.

    The draws depend on the seed, the items and the batch; the process's own random state is left as it was.

    Raises:
        ConfigError: no sample asked for, or a temperature that is not above 0.
    """
    if samples < 1 or not temperature > 0:
        raise ConfigError(
            f"sampled captions: expected at least 1 and a temperature above 0, got {samples} and {temperature}"
        )
    prompt = CaptionPrompt.from_pretrained(captioner)
    model = LlavaForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).eval()
    found: dict[int, list[str]] = {}
    progress = tqdm(total=len(pixels), desc="sample", unit="item", mininterval=1)
    with torch.random.fork_rng(devices=[]), progress:
        torch.manual_seed(seed)
        for rows, start, _ in _read(model, prompt, pixels, max(1, batch // samples)):
            drawn = _write(
                model, prompt, start, do_sample=True, num_return_sequences=samples, temperature=temperature, top_k=0,
                top_p=1.0,
            )  # fmt: skip
            for at, row in enumerate(rows):
                found[pixels.ids[row]] = drawn[at * samples : (at + 1) * samples]
            progress.update(len(rows))
    return found


def with_samples(annotations: Mapping[int, str], samples: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """item_id → annotated caption, with its sampled captions in place of those that it had."""
    return {
        item: replace(Annotated.parse(text), samples=samples.get(item, ())).to_text()
        for item, text in annotations.items()
    }


def _pixels(captioner: Path, data: Path, item_ids: Sequence[int] | None) -> Pixels:
    """Usable media of all items, or of `item_ids`, as the captioner sees them."""
    items = read_items(data)
    ids = items["item_id"].to_pylist() if item_ids is None else list(item_ids)
    return Pixels(MediaReader(data, items), ids, MediaSpec.from_pretrained(captioner))


def _read(
    model: LlavaForConditionalGeneration, prompt: CaptionPrompt, pixels: Pixels, batch: int
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """In batches of at most `batch` frames or one item, items of one length each: their rows [B], the decoder's input
    FP32 [B, L, D] and pooled features FP32 [B, frames, width]."""
    encoder, embed = Encoder(model), model.get_input_embeddings()
    for group in pixels.by_length(np.arange(len(pixels))):
        frames = int(pixels.counts[group[0]])
        for rows in np.array_split(group, min(len(group), -(-len(group) * frames // batch))):
            seen, pooled = encoder(pixels.normalised(pixels.batch(rows)))
            ids = torch.from_numpy(prompt.token_ids(seen.shape[1] * frames).astype(np.int64)).expand(len(rows), -1)
            start = embed(ids)  # [B, L, D]; the image's places then take what the encoder sees
            start[ids == prompt.image_token_id] = seen.flatten(0, 1)
            yield rows, start, pooled.unflatten(0, (-1, frames)).numpy()


def _write(model: LlavaForConditionalGeneration, prompt: CaptionPrompt, start: Tensor, **how: Any) -> list[str]:
    """The decoder's input [B, L, D] → captions, those of one item together; `how` is for Hugging Face's `generate`."""
    out = model.generate(
        inputs_embeds=start, attention_mask=torch.ones(start.shape[:2], dtype=torch.int64),
        max_new_tokens=prompt.max_new_tokens, eos_token_id=prompt.end_id, pad_token_id=prompt.pad_id, **how,
    )  # fmt: skip
    return [prompt.text(ids) for ids in out.tolist()]


def write_captions(path: Path, captions: Mapping[int, str], version: str) -> None:
    """`write_caption_parts` of one part."""
    write_caption_parts(path, [captions], version)


def write_caption_parts(path: Path, parts: Iterable[Mapping[int, str]], version: str) -> None:
    """Write item_id → annotated caption as Parquet, marked with the captioner's version; whole or not at all.

    Columns: `item_id`, `caption` as people read it, `annotation` as the server's `caption` model answers it. One part
    is in memory at a time.
    """
    columns = {"item_id": pa.int64(), "caption": pa.string(), "annotation": pa.string()}
    schema = pa.schema(list(columns.items()), {"captioner": version})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with pq.ParquetWriter(part, schema) as writer:
        for captions in parts:
            texts = list(captions.values())
            writer.write_table(pa.table([list(captions), list(map(plain, texts)), texts], schema))
    part.replace(path)


def read_captions(path: Path) -> tuple[dict[int, str], str]:
    """item_id → annotated caption, and the version of the captioner that wrote them.

    Raises:
        DataError: no such file, or not one that `sightline caption` wrote. One of captions alone, as earlier versions
            wrote it, is refused, too: a ranker would be trained on less than it is served.
    """
    with open_parquet(path, "captions; write them with `sightline caption`") as file:
        table = file.read()
    version = (table.schema.metadata or {}).get(b"captioner")
    if version is None or not {"item_id", "annotation"} <= set(table.column_names):
        raise DataError(
            f"{path}: expected item_id, annotation and the captioner's version, found {', '.join(table.column_names)}; "
            "remove the file and write it again with `sightline caption`"
        )
    return dict(zip(table["item_id"].to_pylist(), table["annotation"].to_pylist(), strict=True)), version.decode()


def caption_quality(data: Path, captions: dict[int, str], seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of captions, annotated or not, on items that the captioner was not fitted on, and on unseen combinations
    among them.

    A combination is unseen if the generator held it out; in other data, if no training item has the same set
    of attributes.

    Returns:
        `items` and `combinations`, each with `trainer.metrics.caption_metrics`, precision, recall and F1 per slot
        (`slots`; `recall` alone, too) and `coverage`. Words of taste are left out: references have none.
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

    held = [
        (split_behaviour(plain(captions[item]))[0], text) for item, text, fit in rows if not fit and item in captions
    ]
    cuts = {"items": held, "combinations": [pair for pair in held if unseen(pair[1])]}
    quality: dict[str, dict[str, Any]] = {}
    for name, pairs in cuts.items():
        if pairs:
            ours, theirs = zip(*pairs, strict=True)
            scores = slot_scores(ours, theirs, slots)
            quality[name] = {
                **caption_metrics(ours, theirs, slots),
                "recall": {slot: one["recall"] for slot, one in scores.items() if one["wanted"]},
                "slots": scores,
                "coverage": coverage(ours, theirs),
            }
    return quality


def caption_calibration(data: Path, captioner: Path, seed: int) -> dict[str, Any]:
    """`trainer.caption_report.calibration` on items that the captioner was not fitted on; empty without such items."""
    items, _, rows = _described(data, seed)
    held = {item: text for item, text, fit in rows if not fit}
    pixels = Pixels(MediaReader(data, items), list(held), MediaSpec.from_pretrained(captioner))
    return calibration(captioner, pixels, held) if len(pixels) else {}


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
