"""GPU memory that an engine plan needs, line by line, before a GPU is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from build.checkpoint import Checkpoint
from build.hardware import GIB, Gpu
from sightline.errors import ConfigError

# Bytes per parameter of the decoder's linear layers, scales included: int4 has one FP16 scale per output
# channel (lost in the sum), AWQ one per group of 128 inputs and a zero-free layout.
LINEAR_BYTES = {"fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5, "awq": 0.5 + 2 / 128, "fp8": 1.0}
DTYPE_BYTES = 2  # whatever is not quantised: FP16 or BF16
# CUDA contexts of the server and its python models, cuBLAS workspaces, and with several GPUs NCCL's buffers.
# An allowance, not a measurement.
RESERVE, RESERVE_PER_PEER = 2 * GIB, GIB // 2
# Share of what is free after loading that the KV cache may have at most: the rest absorbs fragmentation.
KV_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Line:
    """One use of memory on the fullest GPU: `bytes`, and how they come about."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Memory of the fullest GPU (rank 0, which also runs vision tower and ranker).

    Attributes:
        lines: all uses, in order.
        total: their sum in bytes.
        memory: of the GPU in bytes.
        kv_per_token, kv_per_sequence: bytes of the KV cache on one GPU.
        kv_fraction: `kv_cache_free_gpu_mem_fraction` that leaves the other lines their room.
        sequences: how many of full length fit at once.
    """

    lines: tuple[Line, ...]
    memory: int
    kv_per_token: int
    kv_per_sequence: int
    kv_fraction: float
    sequences: int

    @property
    def total(self) -> int:
        return sum(line.bytes for line in self.lines)


def engine_budget(
    checkpoint: Checkpoint, gpu: Gpu, gpus: int, *, quant: str, kv_dtype: str, batch: int, images: int,
    vision_batch: int, max_num_tokens: int, max_seq_len: int, ranker_bytes: int,
) -> Budget:  # fmt: skip
    """Memory of an engine with `gpus`-fold tensor parallelism.

    Weights and KV cache follow from the checkpoint exactly; activations are bounds from the largest tensors
    alive at once; the reserve is an allowance. Units: bytes.

    Raises:
        ConfigError: the batch does not fit; the message has every line and the largest batch that would.
    """
    c = checkpoint
    weights = math.ceil(
        c.linears * LINEAR_BYTES[quant] / gpus
        + (c.embeddings + c.norms) * DTYPE_BYTES  # on every rank
        + c.head * DTYPE_BYTES / gpus
    )
    kv_token = 2 * c.layers * (c.kv_heads // gpus) * c.head_dim * (1 if kv_dtype == "fp8" else 2)
    kv_sequence = kv_token * max_seq_len
    row = 2 * c.hidden + max((c.heads + 2 * c.kv_heads) * c.head_dim, 2 * c.intermediate) // gpus
    activations = 2 * max_num_tokens * row * DTYPE_BYTES + batch * c.vocabulary * 4 * 2
    table = batch * images * c.image_tokens * c.hidden * DTYPE_BYTES
    positions = c.image_tokens + 1
    seen = vision_batch * positions * (4 * c.tower_width + 2 * c.tower_intermediate)
    scores = vision_batch * c.tower_heads * positions**2
    tower = (c.tower + 2 * seen + scores) * DTYPE_BYTES + vision_batch * 3 * c.pixels**2 * 4
    reserve = RESERVE + (gpus - 1) * RESERVE_PER_PEER
    lines = (
        Line(name="decoder weights", bytes=weights,
             how=f"{c.linears / 1e9:.2f} G parameters in layers at {LINEAR_BYTES[quant]:.3g} B / {gpus}, "
                 f"embedding {c.embeddings / 1e6:.0f} M and head {c.head / 1e6:.0f} M at {DTYPE_BYTES} B"),
        Line(name="KV cache", bytes=batch * kv_sequence,
             how=f"{batch} sequences x {max_seq_len} tokens x {kv_token / 1024:.0f} KiB"),
        Line(name="vision tower", bytes=tower,
             how=f"{c.tower / 1e6:.0f} M parameters at {DTYPE_BYTES} B, activations of {vision_batch} images (bound)"),
        Line(name="activations", bytes=activations,
             how=f"{max_num_tokens} tokens x {row} values x {DTYPE_BYTES} B x 2 alive, logits of {batch} rows (bound)"),
        Line(name="prompt table", bytes=table,
             how=f"{batch} x {images} images x {c.image_tokens} rows x {c.hidden} x {DTYPE_BYTES} B"),
        Line(name="ranker", bytes=ranker_bytes, how="embedding tables and dense layers, FP32"),
        Line(name="reserve", bytes=reserve, how="CUDA contexts, workspaces, communication (allowance)"),
    )  # fmt: skip
    kv_room = gpu.memory - sum(line.bytes for line in lines if line.name != "KV cache")
    free = gpu.memory - weights - activations - reserve
    fraction = max(0.0, math.floor(100 * min(KV_SHARE, kv_room / free)) / 100) if free > 0 else 0.0
    budget = Budget(
        lines=lines, memory=gpu.memory, kv_per_token=kv_token, kv_per_sequence=kv_sequence, kv_fraction=fraction,
        sequences=max(0, int(fraction * free)) // kv_sequence if free > 0 else 0,
    )  # fmt: skip
    if budget.sequences < batch:
        parts = ", ".join(f"{line.name} {line.bytes / GIB:.2f}" for line in lines)
        raise ConfigError(
            f"{gpus} x {gpu.name} with {gpu.memory / GIB:.1f} GiB each: batch {batch} needs {budget.total / GIB:.1f} "
            f"GiB ({parts}; KV cache at most {KV_SHARE:.0%} of what is free); the largest batch that fits is about "
            f"{budget.sequences}; use fewer sequences, shorter ones, a smaller --quant or more GPUs"
        )
    return budget
