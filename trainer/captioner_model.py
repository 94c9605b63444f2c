"""The captioner as Hugging Face has it: CLIP vision tower, MLP projector, LLaMA-2 decoder (LLaVA)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sightline.errors import ConfigError

PROMPT = "<image> item:"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
UNK, BOS, EOS, PAD, IMAGE = range(len(SPECIAL))
CHECKPOINT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# vision (width, layers, heads, feed-forward), decoder (the same), pixels, patch
SIZES: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, int]] = {
    "tiny": ((128, 4, 4, 384), (128, 3, 4, 352), 72, 12),
    "7b": ((1024, 24, 16, 4096), (4096, 32, 32, 11008), 336, 14),
}


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """A LLaMA-style tokenizer: BPE on `▁`-marked words, byte fallback, `<s>` in front.

    Digits stand alone, except at the end of a word (`taste3`), which is one piece if it is frequent.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Split(Regex(r"▁?\p{L}+\d+|\d"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, PROMPT.replace("<image>", "")], trainer)
    # The byte pieces had to be "special" to get fixed ids; as special tokens they would vanish when decoding.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    return Tokenizer.from_str(json.dumps(state))


def new_captioner(size: str, tokenizer: Tokenizer, seed: int = 0) -> LlavaForConditionalGeneration:
    """A captioner with fresh weights.

    Raises:
        ConfigError: `size` is none of `SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"--size is {size!r}; expected one of {', '.join(SIZES)}")
    vision, text, pixels, patch = SIZES[size]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision[0], num_hidden_layers=vision[1], num_attention_heads=vision[2],
            intermediate_size=vision[3], image_size=pixels, patch_size=patch, projection_dim=vision[0],
        ),
        text_config=LlamaConfig(
            hidden_size=text[0], num_hidden_layers=text[1], num_attention_heads=text[2],
            num_key_value_heads=text[2], intermediate_size=text[3], vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        ),
        image_token_id=IMAGE,
        image_seq_length=(pixels // patch) ** 2,
        vision_feature_layer=-1,  # trained from scratch, so the last layer is as good as any and none is wasted
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Rows of the prompt table that one picture takes."""
    config = model.config
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


class Encoder(nn.Module):
    """What a captioner sees of pixels FP32 [N, 3, H, W]: the features that its decoder reads, and their summary.

    image_features [N, P, D]: `LlavaForConditionalGeneration.get_image_features`, the tower's chosen hidden states,
        projected; without class token where the checkpoint says so.
    pooled_features [N, width]: the last of these states, without class token, max-pooled over patches. In captioners
        trained from scratch that is the tower's last state, which the classifier of caption words was trained on.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        layer = model.config.vision_feature_layer
        self.layers: list[int] = [layer] if isinstance(layer, int) else list(layer)
        self.drop_class_token = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(image_features, pooled_features)."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[layer][:, 1:] if self.drop_class_token else states[layer] for layer in self.layers]
        features: Tensor = self.projector(torch.cat(chosen, dim=-1))
        return features, states[self.layers[-1]][:, 1:].amax(1)


def save_captioner(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, folder: Path, *,
    version: str, frames: int, max_new_tokens: int, prompt: str | None = None, copy_from: Path | None = None,
) -> None:  # fmt: skip
    """Write the folder in the Hugging Face layout, with `sightline.json` beside it.

    A model that started from a checkpoint keeps that checkpoint's tokenizer and processor files (`copy_from`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        "version": version, "prompt": prompt or PROMPT, "video_frames": frames, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    (folder / "sightline.json").write_text(json.dumps(own, indent=2))
    if copy_from is not None:
        model.save_pretrained(folder)
        for name in CHECKPOINT_FILES:
            if (copy_from / name).exists():
                shutil.copyfile(copy_from / name, folder / name)
        return
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(folder)  # fmt: skip
    pixels = model.config.vision_config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"height": pixels, "width": pixels}, "resample": 3,
        "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
