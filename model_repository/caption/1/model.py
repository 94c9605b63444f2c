"""Media bytes → caption and word confidences: decode, encode, prompt, generate, detokenise, for media that are missing
in the store, several at once.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.annotation import Annotated
from sightline.caption_jobs import DownstreamError, Job
from sightline.caption_service import CaptionService
from sightline.errors import MediaError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt, captioner_version
from sightline.words import WordHead

FEATURES = ("image_features", "pooled_features")  # of vision_encoder


class TritonPythonModel:
    """Answers requests as `CaptionService` does."""

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
        self.threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        self.service = CaptionService(pb_utils, args, captioner_version(folder), self._caption)

    def finalize(self) -> None:
        """End what is under way."""
        self.service.close()
        self.threads.shutdown()

    def execute(self, requests: list[Any]) -> None:
        """Take requests with MEDIA BYTES [rows, 1]; they are answered later."""
        self.service.execute(requests)

    async def _caption(self, jobs: Sequence[Job]) -> None:
        """Caption media together; before each step those that nobody waits for any more are left out."""
        loop = asyncio.get_running_loop()
        loaded = await asyncio.gather(
            *(loop.run_in_executor(self.threads, load, job.data, self.spec) for job in jobs), return_exceptions=True
        )
        seen: list[tuple[Job, NDArray[np.float32]]] = []  # with its frames [n, 3, H, W]
        for job, item in zip(jobs, loaded, strict=True):
            if isinstance(item, MediaError):
                job.reject(item.reason)
            elif isinstance(item, BaseException):
                raise item
            elif job.wanted:
                seen.append((job, item))
        if not seen:
            return
        ends = np.cumsum([len(frames) for _, frames in seen])[:-1]
        encoded = await self._encode(np.concatenate([frames for _, frames in seen]))
        features, pooled = (np.split(output, ends) for output in encoded)
        levels: list[dict[str, int]] = self.words(pooled) if self.words else [{} for _ in pooled]
        rows = [(job, *row) for (job, _), *row in zip(seen, features, levels, strict=True) if job.wanted]
        rows.sort(key=_length)
        await asyncio.gather(*(self._generate(list(group)) for _, group in groupby(rows, _length)))

    async def _encode(self, pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Frames [N, 3, H, W] → image features [N, P, D] and pooled features [N, width], in chunks of what
        vision_encoder takes."""
        chunks = [pixels[i : i + self.encoder_batch] for i in range(0, len(pixels), self.encoder_batch)]
        outputs = await asyncio.gather(
            *(_call("vision_encoder", {"pixel_values": chunk}, list(FEATURES)) for chunk in chunks)
        )
        return [np.concatenate([output[name] for output in outputs]) for name in FEATURES]

    async def _generate(self, rows: list[tuple[Job, NDArray[Any], dict[str, int]]]) -> None:
        """Jobs with image features [frames, P, D], all of as many frames, and levels of words → their captions.

        The features are the rows of an item's prompt table. Their ids are the same for every item, so the decoder's KV
        cache tells items apart by an extra id per position: the hash's first 64 bits, 0 for text.
        """
        tables = np.stack([features.reshape(-1, features.shape[-1]) for _, features, _ in rows])
        ids = np.tile(self.prompt.ids(tables.shape[1]), (len(rows), 1))
        scalars = {
            "input_lengths": ids.shape[1],
            "request_output_len": self.prompt.max_new_tokens,
            "end_id": self.prompt.end_id,
            "pad_id": self.prompt.pad_id,
            "prompt_vocab_size": tables.shape[1],
        }
        own = np.array([[int(job.digest[:16], 16) or 1] for job, _, _ in rows], np.uint64)
        inputs = {
            "input_ids": ids,
            "prompt_embedding_table": _typed(tables, self.table_type),
            "prompt_table_extra_ids": np.where(ids >= self.prompt.vocab_size, own, np.uint64(0)),
        } | {name: np.full((len(rows), 1), value, np.int32) for name, value in scalars.items()}
        try:
            output = await _call("tensorrt_llm", inputs, ["output_ids", "sequence_length"])
        except DownstreamError as error:
            for job, _, _ in rows:
                job.fail(error)
            return
        ends = output["sequence_length"].reshape(-1)
        for (job, _, levels), written, end in zip(rows, output["output_ids"], ends, strict=True):
            caption = self.prompt.text(written.reshape(-1)[:end])
            job.caption(Annotated(caption, confidences=levels).to_text())


def _length(row: tuple[Job, NDArray[Any], dict[str, int]]) -> int:
    return len(row[1])


async def _call(model: str, inputs: dict[str, Any], outputs: list[str]) -> dict[str, NDArray[Any]]:
    """One inference through another model of this server. Raises DownstreamError with its message."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=[_tensor(name, value) for name, value in inputs.items()],
        requested_output_names=outputs,
    )
    response = await request.async_exec()
    if response.has_error():
        error = response.error()
        raise DownstreamError(
            f"{model}: {error.message()}", unavailable=error.code() == pb_utils.TritonError.UNAVAILABLE
        )
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
