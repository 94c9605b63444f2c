"""What this machine could do at best: the work of one request against measured arithmetic and bandwidth.

A ceiling leaves out everything but the unavoidable, so nothing reaches it; its use is to tell a model that is
near the hardware from one that spends its time elsewhere.
    vision_encoder, score   2 operations per weight and token
    tensorrt_llm            the same over prompt and caption; alone, each step also reads all weights once
    embed                   rows × dimension × 4 bytes from memory
    tokenize, media         the bare function, timed in this process
    lookup                  no work to speak of: what it takes is what a python model costs
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import onnx
from safetensors import safe_open

from benchmarks.inputs import Tensors
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt
from sightline.tokens import TokenSpec

ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured in this process: float32 operations and bytes per second over all cores."""

    flops: float
    bandwidth: float
    cores: int

    @classmethod
    def measure(cls) -> Machine:
        square = np.ones((1536, 1536), dtype=np.float32)
        block = np.ones(2**27, dtype=np.uint8)
        target = np.empty_like(block)
        return cls(
            flops=2 * len(square) ** 3 / _best(lambda: square @ square),
            bandwidth=2 * block.nbytes / _best(lambda: np.copyto(target, block)),  # read and written
            cores=len(os.sched_getaffinity(0)),
        )


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """At best: requests per second with perfect batching, and milliseconds for one request alone."""

    per_second: float
    alone_ms: float


def ceilings(machine: Machine, release: Path, inputs: dict[str, list[Tensors]]) -> dict[str, Ceiling]:
    """Ceilings of the models of `release` for `inputs` (model → rows); lookup does no work and has none."""
    models = release / "model_repository"
    captioner = models / "caption" / "1"
    media, prompt = MediaSpec.from_pretrained(captioner), CaptionPrompt.from_pretrained(captioner)
    spec = TokenSpec.load(models / "tokenize" / "1" / "token_spec.json")
    captions = [row["CAPTION"][0].decode() for row in inputs["tokenize"]]

    def work(operations: float, nbytes: float = 0.0) -> float:
        return operations / machine.flops + nbytes / machine.bandwidth

    frames = len(inputs["vision_encoder"]) / len(inputs["rank_media"])
    image_tokens = mean(len(row["prompt_embedding_table"]) for row in inputs["tensorrt_llm"]) / frames
    vision = work(2 * _onnx_weights(models / "vision_encoder" / "1" / "model.onnx") * image_tokens)

    body, head, nbytes = _decoder_weights(models / "tensorrt_llm" / "1" / "decoder" / "model.safetensors")
    prompt_tokens = mean(len(row["input_ids"]) for row in inputs["tensorrt_llm"])
    new_tokens = mean(len(prompt.tokenizer.encode(caption).ids) + 1 for caption in captions)  # and the end
    generate = work(2 * body * (prompt_tokens + new_tokens) + 2 * head * new_tokens)
    generate_alone = generate + work(0, nbytes * new_tokens)

    ids = sum(value.size for value in inputs["embed"][0].values() if value.dtype == np.int64)
    embed = work(0, 4 * ids * inputs["score"][0]["FEATURES"].shape[-1])
    score = work(2 * _onnx_weights(models / "score" / "1" / "model.onnx"))

    requests = [row["MEDIA"][0] for row in inputs["caption"]]
    decode = _best(lambda: [load(data, media) for data in requests]) / len(requests)
    tokenize = _best(lambda: spec.encode_batch(captions)) / len(captions)
    python, graphs = decode + tokenize, embed + score
    return {
        "vision_encoder": Ceiling(per_second=1 / vision, alone_ms=vision * 1e3),
        "tensorrt_llm": Ceiling(per_second=1 / generate, alone_ms=generate_alone * 1e3),
        "caption": Ceiling(per_second=1 / (decode / machine.cores + frames * vision + generate),
                           alone_ms=(decode + frames * vision + generate_alone) * 1e3),
        "tokenize": Ceiling(per_second=1 / tokenize, alone_ms=tokenize * 1e3),
        "embed": Ceiling(per_second=1 / embed, alone_ms=embed * 1e3),
        "score": Ceiling(per_second=1 / score, alone_ms=score * 1e3),
        "rank_media": Ceiling(per_second=1 / (python / machine.cores + frames * vision + generate + graphs),
                              alone_ms=(python + frames * vision + generate_alone + graphs) * 1e3),
    }


def _onnx_weights(path: Path) -> int:
    """Elements of all matrices and kernels of a graph."""
    graph = onnx.load(path, load_external_data=False).graph
    return sum(math.prod(tensor.dims) for tensor in graph.initializer if len(tensor.dims) >= 2)


def _decoder_weights(path: Path) -> tuple[int, int, int]:
    """Elements of the layers' matrices, elements of the output head, bytes of both."""
    body = head = nbytes = 0
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_slice(name)
            size = math.prod(tensor.get_shape())
            if "embed_tokens" in name:
                continue
            nbytes += size * ELEMENT_BYTES[tensor.get_dtype()]
            if name.startswith("lm_head"):
                head += size
            else:
                body += size
    return body, head, nbytes


def _best(function: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
