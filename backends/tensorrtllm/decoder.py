"""A LLaMA decoder on the CPU: greedy, batched, with a KV cache. It needs torch and nothing on top of it.

Importing transformers' LlamaForCausalLM costs three times the start-up of torch, and its layers a multiple of
the time per token for small models; LLaMA-2 fits on this page. A test holds it to LlamaForCausalLM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sequence to continue.

    Attributes:
        ids: int [L]; an id ≥ the vocabulary size is row `id - vocabulary size` of `table`.
        table: float [R, hidden], or None where every id is a token's.
        max_new: number of ids to generate at most.
        end_id: the id that ends the sequence; it is not part of the result. -1: none.
    """

    ids: NDArray[Any]
    table: NDArray[Any] | None
    max_new: int
    end_id: int


class Decoder:
    """Weights of one `LlamaForCausalLM` folder (`config.json`, `model.safetensors`)."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        _require(config, "model_type", "llama")
        _require(config, "hidden_act", "silu")
        _require(config, "attention_bias", False)
        _require(config, "mlp_bias", False)
        _require(rope, "rope_type", "default")
        self.vocab_size: int = config["vocab_size"]
        self.hidden: int = config["hidden_size"]
        self.max_positions: int = config["max_position_embeddings"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or self.hidden // self.heads
        self.eps: float = config["rms_norm_eps"]
        self.theta: float = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.lm_head = weights.get("lm_head.weight", self.embedding)
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]

    @staticmethod
    def _layer(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        w = {
            name.removeprefix(prefix).removesuffix(".weight"): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        return {
            "input_norm": w["input_layernorm"],
            "post_norm": w["post_attention_layernorm"],
            # One product in place of three (two): the small ones are bound by call overhead.
            "qkv": torch.cat([w["self_attn.q_proj"], w["self_attn.k_proj"], w["self_attn.v_proj"]]),
            "out": w["self_attn.o_proj"],
            "gate_up": torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]]),
            "down": w["mlp.down_proj"],
        }

    @torch.inference_mode()
    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """Greedy continuation of each prompt, end id left out; whatever else is in the batch.

        Each prompt has passed `check`.
        """
        inputs = [self._embed(prompt) for prompt in prompts]  # each [L, hidden]
        longest = max(len(x) for x in inputs)
        room = longest + max(prompt.max_new for prompt in prompts)
        pads = torch.tensor([longest - len(x) for x in inputs])
        x = torch.stack(
            [torch.nn.functional.pad(x, (0, 0, longest - len(x), 0)) for x in inputs]
        )  # [B, S, hidden]
        caches = [
            torch.empty(2, len(prompts), self.kv_heads, room, self.head_dim, dtype=x.dtype)
            for _ in self.layers
        ]
        results: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # rows[b]: the prompt that row b of the cache belongs to
        done = [prompt.max_new <= 0 for prompt in prompts]
        start = 0
        while not all(done):
            logits = self._forward(x, caches, start, pads)
            start += x.shape[1]
            tokens = logits.argmax(-1)  # [B]
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if not done[row]:
                    if token == prompts[row].end_id:
                        done[row] = True
                    else:
                        results[row].append(token)
                        done[row] = len(results[row]) >= prompts[row].max_new
            going = [b for b, row in enumerate(rows) if not done[row]]
            # Copying the cache costs about a step: worth it when it halves the steps' width.
            if 0 < len(going) <= len(rows) // 2:
                keep = torch.tensor(going)
                rows = [rows[b] for b in going]
                tokens, pads = tokens[keep], pads[keep]
                caches = [cache[:, keep] for cache in caches]
            x = self.embedding[tokens].unsqueeze(1)
        return results

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError where an id has no embedding or the sequence would outgrow the positions."""
        rows, width = (0, self.hidden) if prompt.table is None else prompt.table.shape
        if width != self.hidden:
            raise ValueError(f"prompt_embedding_table: expected rows of width {self.hidden}, got {width}")
        if len(prompt.ids) == 0 or prompt.ids.min() < 0 or prompt.ids.max() >= self.vocab_size + rows:
            raise ValueError(
                f"input_ids: expected ids in [0, {self.vocab_size + rows}) (vocabulary {self.vocab_size}, "
                f"prompt_embedding_table {rows} rows), got {prompt.ids.tolist()}"
            )
        if len(prompt.ids) + prompt.max_new > self.max_positions:
            raise ValueError(
                f"request_output_len: {len(prompt.ids)} input ids and {prompt.max_new} new ones outgrow "
                f"the model's {self.max_positions} positions"
            )

    def _embed(self, prompt: Prompt) -> Tensor:
        """Prompt → [L, hidden], from the embedding matrix and the prompt table."""
        ids = torch.tensor(prompt.ids, dtype=torch.int64)
        x = self.embedding[ids.clamp(max=self.vocab_size - 1)]
        if prompt.table is not None:
            virtual = ids >= self.vocab_size
            x[virtual] = torch.tensor(prompt.table, dtype=x.dtype)[ids[virtual] - self.vocab_size]
        return x

    def _forward(self, x: Tensor, caches: list[Tensor], start: int, pads: Tensor) -> Tensor:
        """x [B, S, hidden] from position `start` of the left-padded batch on → last logits [B, V]."""
        batch, length, _ = x.shape
        end = start + length
        query = torch.arange(start, end)
        cos, sin = self._rotation((query - pads[:, None]).clamp(min=0), x.dtype)
        mask = None
        if length > 1 or bool(pads.any()):
            key = torch.arange(end)
            visible = key <= query[:, None]  # [S, T]
            real = key >= pads[:, None]  # [B, T]
            # A padding position sees itself: a row of nothing would be NaN, and NaN spreads by the values.
            mask = ((visible & real[:, None]) | (key == query[:, None]))[:, None]  # [B, 1, S, T]
        for layer, cache in zip(self.layers, caches, strict=True):
            h = linear(rms_norm(x, (self.hidden,), layer["input_norm"], self.eps), layer["qkv"])
            h = h.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
            q, k, v = h.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            cache[0, :, :, start:end] = _rotate(k, cos, sin)
            cache[1, :, :, start:end] = v
            attended = scaled_dot_product_attention(
                _rotate(q, cos, sin),
                cache[0, :, :, :end],
                cache[1, :, :, :end],
                attn_mask=mask,
                enable_gqa=self.kv_heads != self.heads,
            )
            x = x + linear(attended.transpose(1, 2).reshape(batch, length, -1), layer["out"])
            h = linear(rms_norm(x, (self.hidden,), layer["post_norm"], self.eps), layer["gate_up"])
            gate, up = h.chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, layer["down"])
        return linear(rms_norm(x[:, -1], (self.hidden,), self.norm, self.eps), self.lm_head).float()

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, S] → cos, sin [B, 1, S, head_dim] of the rotary embedding."""
        inverse = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        angles = positions[..., None].float() * inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _require(config: dict[str, Any], key: str, expected: Any) -> None:
    if config.get(key, expected) != expected:
        raise ValueError(f"config.json: the CPU decoder serves {key} {expected!r} only, got {config[key]!r}")
