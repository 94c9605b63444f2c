"""Media bytes → caption and word confidences: decode, encode, prompt, generate, detokenise, for all rows of a batch at
once.
"""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.annotation import Annotated
from sightline.caption_batch import Answer, DownstreamError, answer
from sightline.errors import MediaError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt
from sightline.words import WordHead

FEATURES = ("image_features", "pooled_features")  # of vision_encoder


class TritonPythonModel:
    """One instance; Triton runs two, so that one decodes media while the other waits for the decoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read tokenizer, prompt, preprocessing and, if there, the word classifier from the model's version folder."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        self.spec = MediaSpec.from_pretrained(folder)
        self.prompt = CaptionPrompt.from_pretrained(folder)
        self.words = WordHead.from_pretrained(folder)
        # vision_encoder's own max_batch_size, written here by the build.
        self.encoder_batch = int(config["parameters"]["vision_encoder_max_batch_size"]["string_value"])
        self.table_type: str = config["parameters"]["prompt_table_type"]["string_value"]
        self.max_batch: int = config["max_batch_size"]
        self.threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def finalize(self) -> None:
        """Stop the decoding threads."""
        self.threads.shutdown()

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Caption the rows of all requests together; MEDIA is BYTES [rows, 1] in each."""
        # Triton's async_exec waits in a thread of the loop's default executor. That has cores + 4: too few for
        # a batch to reach the decoder together. The loop, new in every call, shuts this one down.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(self.max_batch))
        return await answer(requests, self._caption, pb_utils)

    async def _caption(self, media: dict[str, bytes]) -> list[Answer]:
        """Content hash → bytes; one answer per item, in order."""
        loop = asyncio.get_running_loop()
        loaded = await asyncio.gather(
            *(loop.run_in_executor(self.threads, load, item, self.spec) for item in media.values()),
            return_exceptions=True,
        )
        for item in loaded:
            if isinstance(item, BaseException) and not isinstance(item, MediaError):
                raise item
        frames = [item for item in loaded if isinstance(item, np.ndarray)]  # each FP32 [n, 3, H, W]
        if not frames:
            return [self._rejected(item) for item in loaded]
        ends = np.cumsum([len(item) for item in frames])[:-1]
        features, pooled = (np.split(output, ends) for output in await self._encode(np.concatenate(frames)))
        seen = [digest for digest, item in zip(media, loaded, strict=True) if isinstance(item, np.ndarray)]
        captions = await asyncio.gather(*map(self._generate, features, seen))
        levels: list[dict[str, int]] = self.words(pooled) if self.words else [{} for _ in pooled]
        answers = (
            Answer(Annotated(caption, confidences=known).to_text())
            for caption, known in zip(captions, levels, strict=True)
        )
        return [next(answers) if isinstance(item, np.ndarray) else self._rejected(item) for item in loaded]

    @staticmethod
    def _rejected(error: Any) -> Answer:
        return Answer(error=error.reason)

    async def _encode(self, pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Frames [N, 3, H, W] → image features [N, P, D] and pooled features [N, width], in chunks of what
        vision_encoder takes."""
        chunks = [pixels[i : i + self.encoder_batch] for i in range(0, len(pixels), self.encoder_batch)]
        outputs = await asyncio.gather(
            *(_call("vision_encoder", {"pixel_values": chunk}, list(FEATURES)) for chunk in chunks)
        )
        return [np.concatenate([output[name] for output in outputs]) for name in FEATURES]

    async def _generate(self, features: NDArray[Any], digest: str) -> str:
        """Image features [frames, P, D] of one item with content hash `digest` → caption.

        The features are the rows of its prompt table. Their ids are the same for every item, so the decoder's KV
        cache tells items apart by an extra id per position: the hash's first 64 bits, 0 for text.
        """
        table = features.reshape(1, -1, features.shape[-1])
        ids = self.prompt.ids(table.shape[1])
        scalars = {
            "input_lengths": len(ids),
            "request_output_len": self.prompt.max_new_tokens,
            "end_id": self.prompt.end_id,
            "pad_id": self.prompt.pad_id,
            "prompt_vocab_size": table.shape[1],
        }
        extra = np.where(ids >= self.prompt.vocab_size, np.uint64(int(digest[:16], 16) or 1), np.uint64(0))
        output = await _call(
            "tensorrt_llm",
            {
                "input_ids": ids[None],
                "prompt_embedding_table": _typed(table, self.table_type),
                "prompt_table_extra_ids": extra[None],
            }
            | {name: np.array([[value]], dtype=np.int32) for name, value in scalars.items()},
            ["output_ids", "sequence_length"],
        )
        length = int(output["sequence_length"].flat[0])
        return self.prompt.text(output["output_ids"].reshape(-1)[:length])


async def _call(model: str, inputs: dict[str, Any], outputs: list[str]) -> dict[str, NDArray[Any]]:
    """One inference through another model of this server. Raises DownstreamError with its message."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=[_tensor(name, value) for name, value in inputs.items()],
        requested_output_names=outputs,
    )
    response = await request.async_exec()
    if response.has_error():
        raise DownstreamError(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _typed(table: NDArray[Any], data_type: str) -> Any:
    """FP32 array as `data_type` wants it; numpy has no bfloat16, so that one is a torch tensor."""
    if data_type == "TYPE_BF16":
        import torch

        return torch.from_numpy(table).to(torch.bfloat16)
    return table.astype({"TYPE_FP16": np.float16, "TYPE_FP32": np.float32}[data_type], copy=False)


def _tensor(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return pb_utils.Tensor(name, np.ascontiguousarray(value))
    return pb_utils.Tensor.from_dlpack(name, value)
