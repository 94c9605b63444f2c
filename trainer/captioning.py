"""Caption items offline with a trained captioner, and measure the captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt
from sightline.schema import MediaReader, read_items
from trainer.captioner import image_tokens
from trainer.captioner_data import Pixels


@torch.inference_mode()
def caption_items(
    captioner: Path, data: Path, item_ids: Sequence[int] | None = None, *, batch: int = 128
) -> dict[int, str]:
    """item_id → caption, greedy, for all items with usable media (or those of `item_ids`)."""
    items = read_items(data)
    ids = items["item_id"].to_pylist() if item_ids is None else list(item_ids)
    return caption_pixels(captioner, Pixels(MediaReader(data, items), ids, MediaSpec.from_pretrained(captioner)), batch)


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
