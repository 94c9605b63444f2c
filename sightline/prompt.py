"""The captioner's text side: prompt → ids, ids → caption. Shared by the trainer and the server.

Image tokens are ids ≥ the decoder's vocabulary size: id `vocab_size + i` stands for row i of the request's
prompt table (TensorRT-LLM's prompt-tuning convention), so a decoder never needs to know where pixels came from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sightline.errors import ConfigError

__all__ = ["CaptionPrompt", "captioner_version"]

IMAGE = "<image>"
# What LLaVA-1.5 was tuned with; folders trained here carry their own in sightline.json.
LLAVA_PROMPT = f"USER: {IMAGE}\nDescribe the item in one short sentence. ASSISTANT:"


@dataclass(frozen=True, kw_only=True)
class CaptionPrompt:
    """Tokenizer, template and limits of one captioner folder."""

    tokenizer: Tokenizer
    template: str
    image_token_id: int
    vocab_size: int
    end_id: int
    pad_id: int
    max_new_tokens: int

    MAX_NEW_TOKENS: ClassVar[int] = 64
    """Where a folder does not say."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CaptionPrompt:
        """Read `tokenizer.json`, `config.json` and, if there, `sightline.json` of a LLaVA folder.

        Raises:
            ConfigError: a file or key is missing; the message names it.
        """
        folder = Path(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = _read_json(folder / "config.json")
            text = config["text_config"]
            image_token = config.get("image_token_id", config.get("image_token_index"))
        except KeyError as error:
            raise ConfigError(
                f"{folder}/config.json: expected the key {error}, as in a LLaVA checkpoint"
            ) from error
        except Exception as error:
            raise ConfigError(f"{folder}: expected a LLaVA checkpoint folder; {error}") from error
        own = _read_json(folder / "sightline.json") if (folder / "sightline.json").exists() else {}
        end = _first(text.get("eos_token_id"), config.get("eos_token_id"), tokenizer.token_to_id("</s>"))
        return cls(
            tokenizer=tokenizer,
            template=own.get("prompt", LLAVA_PROMPT),
            image_token_id=_first(image_token, tokenizer.token_to_id(IMAGE)),
            vocab_size=text.get("vocab_size", 32000),
            end_id=end,
            pad_id=_first(text.get("pad_token_id"), config.get("pad_token_id"), end),
            max_new_tokens=own.get("max_new_tokens", cls.MAX_NEW_TOKENS),
        )

    def token_ids(self, image_tokens: int) -> NDArray[np.int32]:
        """Prompt as the Hugging Face model wants it: int32 [L], `image_token_id` repeated `image_tokens` times."""
        ids = np.array(self.tokenizer.encode(self.template).ids, dtype=np.int32)
        return np.repeat(ids, np.where(ids == self.image_token_id, image_tokens, 1))

    def ids(self, image_tokens: int) -> NDArray[np.int32]:
        """Prompt as the serving decoder wants it: int32 [L], image position i as `vocab_size + i`."""
        ids = self.token_ids(image_tokens)
        here = ids == self.image_token_id
        ids[here] = self.vocab_size + np.arange(here.sum())
        return ids

    def text(self, ids: NDArray[Any] | list[int]) -> str:
        """Generated ids [T] → caption, without special tokens, control characters and outer spaces."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return "".join(c if c.isprintable() else " " for c in text).strip()


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _first(*values: Any) -> int:
    """The first id that is set; a list of ids counts with its first."""
    for value in values:
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None:
            return int(value)
    raise ConfigError("the checkpoint names no end-of-text or image token; expected eos_token_id and <image>")


def captioner_version(folder: str | Path) -> str:
    """Version of a captioner folder: its `sightline.json`'s, else 12 digits of the hash of weights and tokenizer.

    Raises:
        ConfigError: neither is there.
    """
    folder = Path(folder)
    own = folder / "sightline.json"
    if own.exists():
        return str(_read_json(own)["version"])
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    if len(files) < 3 or not all(path.exists() for path in files):
        raise ConfigError(
            f"{folder}: expected a captioner: sightline.json of `sightline train captioner`, or a LLaVA checkpoint's "
            "config.json, tokenizer.json and *.safetensors; train one or give another folder"
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
