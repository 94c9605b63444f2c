"""Small captioners and rankers with random weights, for tests that need the files and not the knowledge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sightline.annotation import Annotated
from sightline.features import Versions
from sightline.profile import DENSE, ProfileConfig, UserProfiles
from sightline.store import Items, UserRecord
from sightline.store.transfer import item_table, user_table
from sightline.tokens import Kind, TokenSpec
from trainer.captioner_model import BOS, CLIP_MEAN, CLIP_STD, EOS, IMAGE, PAD, save_captioner, train_tokenizer
from trainer.ranker_model import RankerShape, new_ranker

TOKENS, PROFILE = 16, 6
WORDS = ("▁red", "▁blue", "▁mugs", "stars", "▁circle", "▁snow", ",")  # of a tiny captioner's classifier

CAPTIONS = [
    "a large red circle with stripes on a white background",
    "three small blue stars on a dark table",
    "a green triangle moving left across the snow",
    "two yellow mugs with dots in a garden",
]


def tiny_captioner(
    folder: Path, seed: int = 0, *, version: str = "test-captioner", layer: int = -2, words: bool = False,
    noise: float = 0.0,
) -> Path:
    """A LLaVA folder: CLIP tower of 2 layers on 32 × 32 pixels, LLaMA decoder of 2 layers, random weights; with `words`
    a random classifier of six words, which gives every level; with `noise` an earlier checkpoint of the same model, so
    to speak: every weight off by so many standard deviations.
    """
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
        for parameter in model.parameters() if noise else ():
            parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    save_captioner(model, tokenizer, folder, version=version, frames=4, max_new_tokens=12)
    if words:
        weight = np.random.default_rng(seed).normal(0, 0.05, (len(WORDS), 3 * 32)).astype(np.float32)
        weight -= weight.mean(1, keepdims=True)  # maxima have a mean above 0, which says nothing
        np.savez(
            folder / "words.npz", words=np.array(WORDS), rate=np.full(len(WORDS), 0.2, np.float32), frames=3,
            weight=weight, bias=np.full(len(WORDS), -0.7, np.float32),
        )  # fmt: skip
    return folder


def tiny_ranker(
    folder: Path, seed: int = 0, *, captioner_version: str = "test-captioner",
    families: Sequence[Kind] = ("word", "trigram"), **options: Any,
) -> Path:  # fmt: skip
    """A ranker folder with random weights: two known users, two known items, two context columns.

    `options` go to RankerShape; without any it is a DLRM with all groups that a release serves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Trigrams, because a random captioner writes nothing that has words in common with real captions.
    known = Annotated("", confidences={word.strip("▁"): 1 for word in WORDS[:-1]}, samples=["a red mug"]).to_text()
    spec = TokenSpec.fit([*CAPTIONS, known], families=families, length=TOKENS, min_count=1, rows=64)
    spec.save(folder / "token_spec.json")
    context = {"position": 4, "hour": 24}
    fixed = {"users": 3, "items": 3, "token_rows": spec.rows, "dense": len(DENSE), "dim": 4}
    shape = RankerShape(**fixed | {"context": context, "user_negative": True} | options)
    model = new_ranker(shape, seed)
    with torch.no_grad():
        for weight in model.features.parameters():
            weight.normal_()  # attention and token weights start so that they change nothing
    torch.save(model.state_dict(), folder / "model.pt")
    record = {
        "version": "test-ranker", "token_spec_version": spec.version, "captioner_version": captioner_version,
        "context": [{"name": name, "cardinality": n} for name, n in context.items()],
        "token_length": TOKENS, "profile": asdict(ProfileConfig(length=PROFILE)), "dense": list(DENSE),
        "features": len(shape.features), "dim": shape.dim, "shape": shape.to_json(),
    }  # fmt: skip
    (folder / "ranker.json").write_text(json.dumps(record))
    for name, ids in (("user", [0, 7, 42]), ("item", [0, 5, 9])):
        pq.write_table(pa.table({f"{name}_id": ids, f"{name}_index": [0, 1, 2]}), folder / f"{name}s.parquet")
    tiny_features(folder, spec, record)
    return folder


def tiny_features(folder: Path, spec: TokenSpec, ranker: dict[str, Any]) -> None:
    """features/ of a ranker folder: items 5, 9 and 11, of which the ranker knows two; users 7 and 42."""
    versions = Versions.of(ranker)
    sure = ({"red": 9, "circle": 2}, {"blue": 5, "stars": 7}, {"snow": 8, "red": 1})
    captions = [Annotated(text, confidences=words).to_text() for text, words in zip(CAPTIONS, sure, strict=False)]
    items = Items(
        ids=np.array([5, 9, 11]), tokens=spec.encode_batch(captions), captions=captions,
        media_hashes=[hashlib.sha256(caption.encode()).hexdigest() for caption in captions],
    )  # fmt: skip
    profiles = UserProfiles(versions.profile, *spec.amounts_of(spec.families[0].kind))
    events = {7: [(5, 1.0), (9, -1.0)], 42: [(9, 1.0), (11, 0.5), (5, -1.0)]}
    users = []
    for user, seen in events.items():
        for item, strength in seen:
            profiles.observe(user, items.tokens[items.ids == item][0], strength=strength)
        users.append(
            UserRecord(
                id=user, profile=profiles.read(user), items=np.array([item for item, _ in seen]),
                strengths=np.array([strength for _, strength in seen], np.float32),
                times=np.arange(len(seen)) + 1_700_000_000_000_000, state=profiles.dump(user),
            )
        )  # fmt: skip
    (folder / "features").mkdir(exist_ok=True)
    pq.write_table(item_table(versions.items, items), folder / "features" / "items.parquet")
    pq.write_table(user_table(versions.users, users), folder / "features" / "users.parquet")


def llava_layout(folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> LlavaForConditionalGeneration:
    """A scaled-down random checkpoint in the layout of llava-hf/llava-1.5-7b-hf; returns its model.

    Three safetensors shards with that checkpoint's key names and dtype, its configuration's keys (`image_token_index`,
    feature layer −2, `default` selection, vocabulary padded to a multiple of 64), LLaMA-2's tokenizer file form
    with `<image>` and `<pad>` added behind the vocabulary, and a CLIP processor that resizes the shortest edge and
    crops the centre.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([*CAPTIONS, "USER: Describe the item in one short sentence. ASSISTANT:"], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]
    size = len(state["model"]["vocab"])
    for offset, token in enumerate(("<image>", "<pad>")):
        state["added_tokens"].append(
            {"id": size + offset, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        )  # fmt: skip
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    pixels = 28
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "image_size": pixels, "intermediate_size": 64,
              "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 24,
              "vocab_size": 32000}  # fmt: skip
    text = {"architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 96,
            "max_position_embeddings": 512, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "torch_dtype": "float16",
            "vocab_size": -(-(size + 2) // 64) * 64}  # fmt: skip
    documents: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": size,
            "model_type": "llava", "pad_token_id": size + 1, "projector_hidden_act": "gelu", "text_config": text,
            "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "vision_config": vision, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "vocab_size": text["vocab_size"],
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": size + 1},
        "added_tokens.json": {"<image>": size, "<pad>": size + 1},
        "special_tokens_map.json": {
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        },
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
            "legacy": False, "model_max_length": 512, "pad_token": "<pad>", "padding_side": "left",
            "processor_class": "LlavaProcessor", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
        },
        "preprocessor_config.json": {
            "crop_size": {"height": pixels, "width": pixels}, "do_center_crop": True, "do_convert_rgb": True,
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": list(CLIP_MEAN),
            "image_processor_type": "CLIPImageProcessor", "image_std": list(CLIP_STD),
            "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": pixels},
        },
        "processor_config.json": {
            "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
            "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default",
        },
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2))

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    model.to(dtype)
    weights = {_llava_name(name): value.contiguous() for name, value in model.state_dict().items()}
    names = sorted(weights)
    shards = [names[:10], names[10:40], names[40:]]
    index: dict[str, Any] = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: weights[name] for name in shard}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return model


def _llava_name(name: str) -> str:
    """Today's parameter name → that of the published checkpoint."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    tower = "vision_tower.vision_model."
    return name if name.startswith(tower) else name.replace("vision_tower.", tower, 1)
