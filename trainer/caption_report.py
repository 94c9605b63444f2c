"""How good captions are, slot by slot and word by word, and whether a captioner's probabilities mean what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

from sightline.prompt import CaptionPrompt
from sightline.tokens import normalise
from sightline.words import WordHead
from trainer.captioner_data import IGNORE, Pixels, Targets, model_inputs
from trainer.captioner_model import Encoder, image_tokens
from trainer.metrics import Slots

__all__ = ["calibration", "coverage", "reliability", "slot_scores", "tables"]

BINS = 10


def slot_scores(
    predicted: Sequence[str], reference: Sequence[str], slots: Callable[[str], Slots]
) -> dict[str, dict[str, float]]:
    """Per slot: precision, recall and F1 over its values (micro), and how many the references (`wanted`) have.

    Precision of a slot that no prediction claims is 0, as is recall of one that no reference has.
    """
    hit: Counter[str] = Counter()
    claimed: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for ours, theirs in zip(predicted, reference, strict=True):
        p, r = set(slots(ours)), set(slots(theirs))
        for counter, pairs in ((hit, p & r), (claimed, p), (wanted, r)):
            counter.update(slot for slot, _ in pairs)
    return {
        slot: {
            "precision": hit[slot] / max(1, claimed[slot]),
            "recall": hit[slot] / max(1, wanted[slot]),
            "f1": 2 * hit[slot] / (claimed[slot] + wanted[slot]),
            "wanted": wanted[slot],
        }
        for slot in sorted(claimed | wanted)
    }


def coverage(predicted: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """Which words captions use at all, whatever the item.

    Returns:
        `words_covered`: share of the references' distinct words that some caption has; `words_invented`: share of the
        captions' distinct words that no reference has; `tokens_covered`, `tokens_invented`: the same shares of all
        occurrences.
    """
    ours, theirs = (Counter(w for text in texts for w in normalise(text).split()) for texts in (predicted, reference))
    covered, invented = theirs.keys() & ours.keys(), ours.keys() - theirs.keys()
    return {
        "words_covered": len(covered) / max(1, len(theirs)),
        "words_invented": len(invented) / max(1, len(ours)),
        "tokens_covered": sum(theirs[word] for word in covered) / max(1, theirs.total()),
        "tokens_invented": sum(ours[word] for word in invented) / max(1, ours.total()),
    }


def reliability(probability: np.ndarray, true: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Reliability of probabilities FP [n] of events bool [n], in `bins` bins of equal width.

    Returns:
        `ece`, the expected calibration error: the mean over events of their bin's |predicted − observed| (Naeini et al.
        2015; Guo et al. 2017); `events`; and the `bins` that are not empty, each with its lower edge, events, mean
        probability (`predicted`) and share of true events (`observed`).
    """
    at = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(at, minlength=bins)
    kept = np.flatnonzero(count)
    count = count[kept]
    predicted, observed = (np.bincount(at, values, minlength=bins)[kept] / count for values in (probability, true))
    rows = zip((kept / bins).tolist(), count.tolist(), predicted.tolist(), observed.tolist(), strict=True)
    return {
        "ece": float(np.average(np.abs(predicted - observed), weights=count)) if len(kept) else 0.0,
        "events": len(probability),
        "bins": [dict(zip(("from", "events", "predicted", "observed"), row, strict=True)) for row in rows],
    }


@torch.inference_mode()
def calibration(captioner: Path, pixels: Pixels, reference: Mapping[int, str], batch: int = 128) -> dict[str, Any]:
    """Reliability of what a captioner believes of items with reference captions.

    Returns:
        `tokens`: probability of the likeliest next token, given the picture and the reference so far; true if it is the
        reference's (ends of captions left out). `words`, where the captioner has a classifier of them: probability of
        each word; true if the reference has it (words of taste, which references lack, left out).
    """
    prompt, head = CaptionPrompt.from_pretrained(captioner), WordHead.from_pretrained(captioner)
    model = LlavaForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).eval()
    encoder, tokenizer = Encoder(model), Tokenizer.from_file(str(captioner / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    targets = Targets([reference[item] for item in pixels.ids], tokenizer, prompt.end_id)
    likeliest, right, believed, there = [], [], [], []
    if head is not None:
        with np.load(captioner / "words.npz") as held:
            of_looks = ~held["taste"] if "taste" in held else np.ones(len(head.words), bool)
        vocabulary = tokenizer.get_vocab()
        ids = torch.tensor([vocabulary.get(word, -1) for word in head.words])
    for group in pixels.by_length(np.arange(len(pixels))):
        frames = int(pixels.counts[group[0]])
        for rows in np.array_split(group, -(-len(group) * frames // batch)):
            x = pixels.normalised(pixels.batch(rows))
            read, labels = model_inputs(prompt, image_tokens(model) * frames, targets.ids[rows], targets.ids[rows])
            out = model(
                input_ids=read, pixel_values=x, attention_mask=torch.ones_like(read), logits_to_keep=targets.length + 1
            )
            wanted = labels[:, -targets.length :]
            best, token = out.logits[:, :-1].softmax(-1).max(-1)
            kept = (wanted != IGNORE) & (wanted != prompt.end_id)
            likeliest.append(best[kept].numpy())
            right.append((token == wanted)[kept].numpy())
            if head is not None:
                pooled = encoder(x)[1].unflatten(0, (-1, frames)).numpy()
                believed += [head.probabilities(one)[of_looks] for one in pooled]
                there += [torch.isin(ids, targets.ids[row]).numpy()[of_looks] for row in rows]
    found = {"tokens": reliability(np.concatenate(likeliest), np.concatenate(right))}
    if head is not None:
        found["words"] = reliability(np.concatenate(believed), np.concatenate(there))
    return found


def tables(quality: Mapping[str, Any]) -> list[Table]:
    """For a terminal: what `sightline caption` reports."""
    cuts = {name: values for name, values in quality.items() if "slots" in values}
    whole = Table(title="Captions of items that the captioner never saw")
    for column in ("cut", "captions", "attribute F1", "exact match", "token F1", "words covered", "invented"):
        whole.add_column(column, justify="left" if column == "cut" else "right")
    slots = Table(title="Per slot")
    for column in ("cut", "slot", "wanted", "precision", "recall", "F1"):
        slots.add_column(column, justify="left" if column in ("cut", "slot") else "right")
    for name, values in cuts.items():
        figures = [*(values[key] for key in ("attribute_f1", "exact_match", "token_f1")),
                   *(values["coverage"][key] for key in ("words_covered", "words_invented"))]  # fmt: skip
        whole.add_row(name, str(values["captions"]), *(f"{figure:.3f}" for figure in figures))
        for slot, one in values["slots"].items():
            scores = [f"{one[key]:.3f}" for key in ("precision", "recall", "f1")]
            slots.add_row(name, slot, str(one["wanted"]), *scores)
    found = [whole, slots]
    if quality.get("calibration"):
        bins = Table(title="Calibration on these items")
        for column in ("probability of", "from", "events", "predicted", "observed"):
            bins.add_column(column, justify="left" if column == "probability of" else "right")
        for what, one in quality["calibration"].items():
            for row in one["bins"]:
                shares = [f"{row[key]:.3f}" for key in ("predicted", "observed")]
                bins.add_row(what, f"{row['from']:.1f}", str(row["events"]), *shares)
            bins.add_row(what, "all", str(one["events"]), "expected error", f"{one['ece']:.3f}", end_section=True)
        found.append(bins)
    return found
