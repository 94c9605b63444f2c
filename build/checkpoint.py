"""What a plan has to know of a LLaVA checkpoint: sizes and parameter counts, from its small files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from build.records import FOLDER
from sightline.errors import ConfigError
from sightline.media import MediaSpec
from sightline.prompt import LLAVA_PROMPT, CaptionPrompt

SHAPES = FOLDER / "shapes"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Shape of one multimodal checkpoint; every count is in parameters, every size in units of its name.

    Attributes:
        folder: where its files are.
        architecture: Hugging Face class name, e.g. `LlavaForConditionalGeneration`.
        weights: whether the weights are there, too, or only the shape.
        image_tokens: rows of the prompt table that one image takes.
        prompt_tokens: ids of the prompt beside the image's.
        frames, max_new_tokens: of `sightline.json`, or their defaults.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, positions: of the language model.
        linears: parameters of the decoder's layers that quantisation shrinks and tensor parallelism divides.
        embeddings, norms, head: token embedding, RMSNorm weights, output head (0 where tied).
        tower: parameters of vision tower and projector.
        tower_width, tower_heads, tower_intermediate, tower_layers, pixels: of the vision tower.
    """

    folder: Path
    architecture: str
    weights: bool
    image_tokens: int
    prompt_tokens: int
    frames: int
    max_new_tokens: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    linears: int
    embeddings: int
    norms: int
    head: int
    tower: int
    tower_width: int
    tower_heads: int
    tower_intermediate: int
    tower_layers: int
    pixels: int

    @classmethod
    def read(cls, name: str | Path) -> Checkpoint:
        """Read a checkpoint folder, or one of the recorded shapes by its name (`llava-1.5-7b`).

        A folder without tokenizer counts every byte of the prompt as a token: an upper bound.

        Raises:
            ConfigError: neither, or a model without the parts of a LLaVA checkpoint.
        """
        folder = Path(name)
        if not folder.is_dir() and (SHAPES / str(name)).is_dir():
            folder = SHAPES / str(name)
        if not (folder / "config.json").exists():
            known = ", ".join(sorted(path.name for path in SHAPES.iterdir()))
            raise ConfigError(
                f"--checkpoint {name}: expected a folder with config.json, as Hugging Face saves a model "
                f"or `sightline train captioner` makes it, or a recorded shape ({known})"
            )
        try:
            config = AutoConfig.from_pretrained(folder)
            text, vision = config.text_config, config.vision_config
            width, patch, pixels = vision.hidden_size, vision.patch_size, vision.image_size
            tower_layers, tower_wide = vision.num_hidden_layers, vision.intermediate_size
            tower_heads = vision.num_attention_heads
        except (AttributeError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{folder}/config.json: expected text_config and vision_config of a LLaVA-like checkpoint; {error}"
            ) from error
        architecture = (config.architectures or [type(config).__name__.replace("Config", "")])[0]
        own_path = folder / "sightline.json"
        own = json.loads(own_path.read_text()) if own_path.exists() else {}
        prompt_tokens, new_tokens = _prompt(folder)
        patches = (pixels // patch) ** 2
        strategy = getattr(config, "vision_feature_select_strategy", "default")
        chosen = getattr(config, "vision_feature_layer", -2)
        hidden, kv_heads = text.hidden_size, text.num_key_value_heads
        head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        attention = 2 * hidden * text.num_attention_heads * head_dim + 2 * hidden * kv_heads * head_dim
        layer = 4 * width**2 + 2 * width * tower_wide + 9 * width + tower_wide
        tower = 3 * patch**2 * width + (patches + 2) * width + 4 * width + tower_layers * layer
        projected = width * (len(chosen) if isinstance(chosen, list | tuple) else 1)
        return cls(
            folder=folder.resolve(),
            architecture=architecture,
            weights=any(folder.glob("*.safetensors")),
            image_tokens=patches + (strategy == "full"),
            prompt_tokens=prompt_tokens,
            frames=own.get("video_frames", MediaSpec.frames),
            max_new_tokens=new_tokens,
            layers=text.num_hidden_layers,
            hidden=hidden,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings,
            linears=text.num_hidden_layers * (attention + 3 * hidden * text.intermediate_size),
            embeddings=text.vocab_size * hidden,
            norms=(2 * text.num_hidden_layers + 1) * hidden,
            head=0 if config.tie_word_embeddings else text.vocab_size * hidden,
            tower=tower + projected * hidden + hidden**2 + 2 * hidden,
            tower_width=width,
            tower_heads=tower_heads,
            tower_intermediate=tower_wide,
            tower_layers=tower_layers,
            pixels=pixels,
        )


def _prompt(folder: Path) -> tuple[int, int]:
    """Prompt ids beside the image's, and the most ids that a caption may have."""
    if (folder / "tokenizer.json").exists():
        prompt = CaptionPrompt.from_pretrained(folder)
        return len(prompt.token_ids(0)), prompt.max_new_tokens
    return len(LLAVA_PROMPT.replace("<image>", "").encode()) + 1, CaptionPrompt.MAX_NEW_TOKENS
