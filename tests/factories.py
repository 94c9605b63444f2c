"""Small captioners and rankers with random weights, for tests that need the files and not the knowledge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sightline.profile import DENSE
from sightline.tokens import TokenSpec
from trainer.captioner_model import BOS, EOS, IMAGE, PAD, save_captioner, train_tokenizer
from trainer.ranker_model import RankerShape, new_ranker

TOKENS, PROFILE = 16, 6

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


def tiny_ranker(folder: Path, seed: int = 0, *, captioner_version: str = "test-captioner") -> Path:
    """A ranker folder with random weights: two known users, two known items, two context columns."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    # Trigrams, because a random captioner writes nothing that has words in common with real captions.
    spec = TokenSpec.fit(CAPTIONS, families=("word", "trigram"), length=TOKENS, min_count=1, rows=64)
    spec.save(folder / "token_spec.json")
    context = {"position": 4, "hour": 24}
    shape = RankerShape(users=3, items=3, context=context, token_rows=spec.rows, dense=len(DENSE), dim=4)
    torch.save(new_ranker(shape, seed).state_dict(), folder / "model.pt")
    record = {
        "version": "test-ranker", "token_spec_version": spec.version, "captioner_version": captioner_version,
        "context": [{"name": name, "cardinality": n} for name, n in context.items()],
        "token_length": TOKENS, "profile_length": PROFILE, "dense": list(DENSE),
        "features": len(shape.features), "dim": shape.dim, "shape": shape.to_json(),
    }  # fmt: skip
    (folder / "ranker.json").write_text(json.dumps(record))
    tokens = random.integers(1, spec.rows, (3, PROFILE))
    users = {
        "user_id": pa.array([0, 7, 42], pa.int64()),
        "user_index": pa.array([0, 1, 2], pa.int64()),
        "profile_tokens": pa.array(tokens.tolist(), pa.list_(pa.int64())),
        "profile_weights": pa.array(random.dirichlet(np.ones(PROFILE), 3).tolist(), pa.list_(pa.float32())),
        "dense": pa.array((3 * random.random((3, len(DENSE)))).tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(users), folder / "users.parquet")
    pq.write_table(pa.table({"item_id": [0, 5, 9], "item_index": [0, 1, 2]}), folder / "items.parquet")
    return folder
