"""A LLaMA decoder on the CPU or one CUDA device: greedy, batched, with a KV cache. It needs torch and nothing more.

Importing transformers' LlamaForCausalLM costs three times the start-up of torch, and its layers a multiple of
the time per token for small models; LLaMA-2 fits on this page. A test holds it to LlamaForCausalLM.

A CPU attends to what the cache holds so far. A GPU would wait for the launches of hundreds of kernels per token: there,
the step for one token has constant shapes (it attends to the whole cache, masked) and is replayed as a CUDA graph.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu

Steps = Literal["dynamic", "static", "graph"]

# With constant shapes, caches have a multiple of so many slots and batches are powers of two: few graphs, little waste.
SLOTS = 64
# To look whether all rows have ended, the device waits for the host, say 0.05 ms; who looks every k steps decodes
# (k - 1) / 2 for nothing. For captions of 25 tokens that makes k = 1 best at 4 ms a step (7B) and k = 3 at 0.3 ms.
# (Estimated, not measured.)
CHECK_EVERY = 2


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sequence to continue.

    Attributes:
        ids: int [L]; an id ≥ the vocabulary size is row `id - vocabulary size` of `table`.
        table: float [R, hidden], array or tensor, or None where every id is a token's.
        max_new: number of ids to generate at most.
        end_id: the id that ends the sequence; it is not part of the result. -1: none.
    """

    ids: NDArray[Any]
    table: NDArray[Any] | Tensor | None
    max_new: int
    end_id: int


@dataclass(frozen=True, kw_only=True)
class State:
    """A left-padded batch between two steps; its tensors change in place.

    Attributes:
        cache: [layers, B, 2 (keys, values), key-value heads, T, head_dim].
        pads: int64 [B]; slots in front of each row's first id.
        tokens: int64 [B]; the newest ids, not in the cache yet.
        position: int64 [1]; the slot that they take.
    """

    cache: Tensor
    pads: Tensor
    tokens: Tensor
    position: Tensor

    def narrow(self, batch: int) -> State:
        """The first `batch` rows, in the same memory."""
        return State(
            cache=self.cache[:, :batch], pads=self.pads[:batch], tokens=self.tokens[:batch], position=self.position
        )


class Decoder:
    """Weights of one `LlamaForCausalLM` folder (`config.json`, `model.safetensors`). Not for use by two threads.

    Args:
        folder: of the configuration and, unless `weights` are given, the weights.
        device: cpu or cuda.
        steps: how single tokens are decoded. dynamic (the default on the CPU): over what the cache holds so far;
            static: with constant shapes; graph (the default on CUDA): static, as replayed CUDA graphs. An attribute
            that may change between two batches.
        weights: tensors named as in `model.safetensors`, for a model that is on no disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        steps: Steps | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device: cuda asked for, but torch {torch.__version__} sees no CUDA device; choose cpu, or a machine "
                "with a GPU and a CUDA build of torch"
            )
        self.device = torch.device(device)
        self.steps: Steps = steps or ("graph" if device == "cuda" else "dynamic")
        if self.steps == "graph" and device == "cpu":
            raise ValueError("steps: graph needs device cuda; on cpu, expected dynamic or static")
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
        # Computed on the CPU for every device, so that the angles are the same to the bit.
        inverse = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        self.inverse = inverse.to(self.device)  # [head_dim / 2]
        if weights is None:
            with safe_open(folder / "model.safetensors", framework="pt", device=device) as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.lm_head = weights.get("lm_head.weight", self.embedding)
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config["num_hidden_layers"])]
        # What the states are views of, one after the other: caches [layers, elements], pads and tokens [2, B].
        self._memory, self._ids = torch.empty(len(self.layers), 0), torch.empty(2, 0)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

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
        state, _ = self.prefill(prompts)
        results: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # rows[b]: the prompt that row b of the state belongs to
        done = [prompt.max_new <= 0 for prompt in prompts]
        generated = [state.tokens]  # ids [B] of each step since the last look at them
        while True:
            for tokens in torch.stack(generated).tolist():
                for row, token in zip(rows, tokens, strict=False):  # rows that only fill the batch up come last
                    if not done[row]:
                        if token == prompts[row].end_id:
                            done[row] = True
                        else:
                            results[row].append(token)
                            done[row] = len(results[row]) >= prompts[row].max_new
            going = [b for b, row in enumerate(rows) if not done[row]]
            if not going:
                return results
            # Moving rows of the cache costs about a step: worth it when it halves the steps' width.
            if self._width(len(going)) <= len(state.tokens) // 2:
                for b, source in enumerate(going):  # source ≥ b: no row is overwritten before it has moved
                    for tensor in (state.cache.transpose(0, 1), state.pads, state.tokens):
                        tensor[b] = tensor[source]
                state = state.narrow(self._width(len(going)))
                rows = [rows[b] for b in going]
            left = max(prompts[row].max_new - len(results[row]) for row in rows if not done[row])
            generated = []
            for _ in range(1 if self.steps == "dynamic" else min(CHECK_EVERY, left)):
                self.step(state)
                generated.append(state.tokens.clone())

    @torch.inference_mode()
    def prefill(self, prompts: list[Prompt]) -> tuple[State, Tensor]:
        """The prompts' state, valid until the next call, and the logits [B, V] that chose its tokens.

        Behind the prompts' rows there may be others, which fill the batch up and mean nothing.
        """
        inputs = [self._embed(prompt) for prompt in prompts]  # each [L, hidden]
        longest = max(len(x) for x in inputs)
        state = self._state(len(prompts), longest + max(prompt.max_new for prompt in prompts))
        state.position.fill_(longest)
        real = state.narrow(len(prompts))
        real.pads.copy_(torch.tensor([longest - len(x) for x in inputs]))
        x = torch.stack([pad(x, (0, 0, longest - len(x), 0)) for x in inputs])  # [B, S, hidden]
        logits = self._forward(x, real, torch.arange(longest, device=self.device), longest)
        real.tokens.copy_(logits.argmax(-1))
        return state, logits

    @torch.inference_mode()
    def step(self, state: State) -> Tensor:
        """One token on: reads `state.tokens` and leaves the next ones there; the logits [B, V] that chose them.

        The logits are valid until the next call.
        """
        if self.steps != "graph":
            return self._step(state)
        shape = len(state.tokens), state.cache.shape[-2]
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(state)
        graph, logits = self._graphs[shape]
        graph.replay()
        return logits

    def _step(self, state: State) -> Tensor:
        # The position's value is known on the CPU only; a GPU would have to wait for it.
        slots = int(state.position) + 1 if self.steps == "dynamic" else state.cache.shape[-2]
        logits = self._forward(self.embedding[state.tokens].unsqueeze(1), state, state.position, slots)
        state.tokens.copy_(logits.argmax(-1))
        state.position.add_(1)
        return logits

    def _capture(self, state: State) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """`_step` on these very tensors as a CUDA graph, and the logits that a replay writes."""
        tokens, position = state.tokens.clone(), state.position.clone()
        # The first use of a kernel may load it and make its workspace, which a capture forbids; and what warms up for a
        # capture must not run on the stream that everything waits for. (torch's notes on CUDA graphs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(state)
        torch.cuda.current_stream().wait_stream(side)
        # The slot that was written need not be restored: the first replay writes the same into it.
        state.tokens.copy_(tokens)
        state.position.copy_(position)
        graph = torch.cuda.CUDAGraph()
        # One pool for all graphs: they never run at the same time, and no logits outlive the next step.
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._step(state)
        return graph, logits

    def _width(self, batch: int) -> int:
        """Rows of the state of a batch."""
        return batch if self.steps == "dynamic" else 1 << (batch - 1).bit_length()

    def _state(self, batch: int, slots: int) -> State:
        """A state for at least `batch` rows of at least `slots`, in the memory of the one before.

        The memory grows to the largest batch and stays: graphs are bound to its addresses.
        """
        width = self._width(batch)
        if self.steps != "dynamic":
            slots = -(-slots // SLOTS) * SLOTS
        row = (2, self.kv_heads, slots, self.head_dim)
        size = width * math.prod(row)  # of one layer
        if size > self._memory.shape[1] or width > self._ids.shape[1]:
            self._graphs.clear()
            size_now, width_now = max(size, self._memory.shape[1]), max(width, self._ids.shape[1])
            self._memory = self._memory.new_empty(len(self.layers), 0)  # let go before there is a larger one
            self._memory = torch.empty(len(self.layers), size_now, dtype=self.embedding.dtype, device=self.device)
            self._ids = torch.zeros(2, width_now, dtype=torch.int64, device=self.device)
            self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        cache = self._memory[:, :size].view(len(self.layers), width, *row)
        if self.steps != "dynamic":
            # Slots that are masked have weight 0, but 0 × NaN is NaN, and who knows what the memory holds.
            cache.zero_()
        return State(cache=cache, pads=self._ids[0, :width], tokens=self._ids[1, :width], position=self._position)

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
        ids = torch.tensor(prompt.ids, dtype=torch.int64, device=self.device)
        x = self.embedding[ids.clamp(max=self.vocab_size - 1)]
        if prompt.table is not None:
            table = prompt.table if isinstance(prompt.table, Tensor) else torch.tensor(prompt.table)
            virtual = ids >= self.vocab_size
            x[virtual] = table.to(x)[ids[virtual] - self.vocab_size]
        return x

    def _forward(self, x: Tensor, state: State, positions: Tensor, slots: int) -> Tensor:
        """x [B, S, hidden] at `positions` [S] → logits [B, V] behind it; attention is over the first `slots` slots."""
        batch, length, _ = x.shape
        cos, sin = self._rotation((positions - state.pads[:, None]).clamp(min=0), x.dtype)
        mask = None
        if length > 1 or self.steps != "dynamic" or bool(state.pads.any()):
            key, query = torch.arange(slots, device=self.device), positions[:, None]
            # A padding position sees itself: a row of nothing would be NaN, and NaN spreads by the values.
            seen = (key <= query) & (key >= state.pads[:, None, None]) | (key == query)  # [B, S, T]
            mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, float("-inf"))[:, None]  # [B, 1, S, T]
        for layer, cache in zip(self.layers, state.cache, strict=True):
            keys, values = cache.unbind(1)  # [B, key-value heads, T, head_dim]
            h = linear(rms_norm(x, (self.hidden,), layer["input_norm"], self.eps), layer["qkv"])
            h = h.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
            q, k, v = h.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            keys.index_copy_(2, positions, _rotate(k, cos, sin))
            values.index_copy_(2, positions, v)
            attended = scaled_dot_product_attention(
                _rotate(q, cos, sin),
                keys[:, :, :slots],
                values[:, :, :slots],
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
        angles = positions[..., None].float() * self.inverse
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _require(config: dict[str, Any], key: str, expected: Any) -> None:
    if config.get(key, expected) != expected:
        raise ValueError(f"config.json: the decoder serves {key} {expected!r} only, got {config[key]!r}")
