"""Small captioners and rankers with random weights, for tests that need the files and not the knowledge."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from trainer.captioner_model import BOS, EOS, IMAGE, PAD, save_captioner, train_tokenizer

CAPTIONS = [
    "a large red circle with stripes on a white background",
    "three small blue stars on a dark table",
    "a green triangle moving left across the snow",
    "two yellow mugs with dots in a garden",
]


def tiny_captioner(folder: Path, seed: int = 0, *, version: str = "test-captioner", layer: int = -2) -> Path:
    """A LLaVA folder: CLIP tower of 2 layers on 32 × 32 pixels, LLaMA decoder of 2 layers, random weights."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=320)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=32, patch_size=8, projection_dim=32,
        ),
        text_config=LlamaConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=96, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
        ),
        image_token_id=IMAGE, image_seq_length=16, vision_feature_layer=layer,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Random weights of the usual scale say the same of every picture; these tell pictures apart.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    save_captioner(model, tokenizer, folder, version=version, frames=4, max_new_tokens=12)
    return folder
