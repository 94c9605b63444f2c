"""Media bytes → caption: decode, encode, prompt, generate, detokenise, for all rows of a batch at once.

Equal bytes within a batch are captioned once. A row that cannot be used is `rejected` with a reason while the
other rows are answered; a request with no usable row fails with INVALID_ARG and the reasons.
"""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.errors import MediaError
from sightline.media import MediaSpec, content_hash, load
from sightline.prompt import CaptionPrompt


class Answer(NamedTuple):
    """What one row gets; `error` is empty when `caption` is the model's."""

    caption: str = ""
    error: str = ""


class DownstreamError(Exception):
    """vision_encoder or tensorrt_llm failed: neither the caller's fault nor that of one row's media."""


class TritonPythonModel:
    """One instance; Triton runs two, so that one decodes media while the other waits for the decoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read tokenizer, prompt and preprocessing from the model's version folder."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        self.spec = MediaSpec.from_pretrained(folder)
        self.prompt = CaptionPrompt.from_pretrained(folder)
        # vision_encoder's own max_batch_size, written here by the build.
        self.encoder_batch = int(config["parameters"]["vision_encoder_max_batch_size"]["string_value"])
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
        rows = [
            [bytes(row) for row in pb_utils.get_input_tensor_by_name(request, "MEDIA").as_numpy().reshape(-1)]
            for request in requests
        ]
        hashes = [[content_hash(row) for row in request] for request in rows]
        unique = {
            digest: row
            for batch, digests in zip(rows, hashes, strict=True)
            for digest, row in zip(digests, batch, strict=True)
        }
        try:
            answers = dict(zip(unique, await self._caption(list(unique.values())), strict=True))
        except DownstreamError as error:
            failure = pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        return [self._respond([answers[digest] for digest in digests]) for digests in hashes]

    async def _caption(self, media: list[bytes]) -> list[Answer]:
        """One answer per item, in order."""
        loop = asyncio.get_running_loop()
        loaded = await asyncio.gather(
            *(loop.run_in_executor(self.threads, load, item, self.spec) for item in media),
            return_exceptions=True,
        )
        for item in loaded:
            if isinstance(item, BaseException) and not isinstance(item, MediaError):
                raise item
        frames = [item for item in loaded if isinstance(item, np.ndarray)]  # each FP32 [n, 3, H, W]
        if not frames:
            return [self._rejected(item) for item in loaded]
        features = await self._encode(np.concatenate(frames))  # [frames, P, D]
        parts = np.split(features, np.cumsum([len(item) for item in frames])[:-1])
        captions = iter(await asyncio.gather(*(self._generate(part) for part in parts)))
        return [
            Answer(next(captions)) if isinstance(item, np.ndarray) else self._rejected(item)
            for item in loaded
        ]

    @staticmethod
    def _rejected(error: Any) -> Answer:
        return Answer(error=error.reason)

    async def _encode(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        """Frames [N, 3, H, W] → image features [N, P, D], in chunks of what vision_encoder takes."""
        chunks = [pixels[i : i + self.encoder_batch] for i in range(0, len(pixels), self.encoder_batch)]
        outputs = await asyncio.gather(
            *(_call("vision_encoder", {"pixel_values": chunk}, ["image_features"]) for chunk in chunks)
        )
        return np.concatenate([output["image_features"] for output in outputs])

    async def _generate(self, features: NDArray[Any]) -> str:
        """Image features [frames, P, D] of one item → caption. They are the rows of its prompt table."""
        table = features.reshape(1, -1, features.shape[-1])
        ids = self.prompt.ids(table.shape[1])
        scalars = {
            "input_lengths": len(ids),
            "request_output_len": self.prompt.max_new_tokens,
            "end_id": self.prompt.end_id,
            "pad_id": self.prompt.pad_id,
            "prompt_vocab_size": table.shape[1],
        }
        output = await _call(
            "tensorrt_llm",
            {"input_ids": ids[None], "prompt_embedding_table": table}
            | {name: np.array([[value]], dtype=np.int32) for name, value in scalars.items()},
            ["output_ids", "sequence_length"],
        )
        length = int(output["sequence_length"].flat[0])
        return self.prompt.text(output["output_ids"].reshape(-1)[:length])

    @staticmethod
    def _respond(answers: list[Answer]) -> Any:
        errors = [answer.error for answer in answers]
        if answers and all(errors):
            reasons = "; ".join(dict.fromkeys(errors))
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(
                    f"MEDIA: no row can be used: {reasons}", pb_utils.TritonError.INVALID_ARG
                )
            )
        columns = {
            "CAPTION": [answer.caption for answer in answers],
            "CAPTION_SOURCE": ["rejected" if error else "model" for error in errors],
            "CAPTION_ERROR": errors,
        }
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.array([[value.encode()] for value in values], dtype=object))
                for name, values in columns.items()
            ]
        )


async def _call(model: str, inputs: dict[str, NDArray[Any]], outputs: list[str]) -> dict[str, NDArray[Any]]:
    """One inference through another model of this server. Raises DownstreamError with its message."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
        requested_output_names=outputs,
    )
    response = await request.async_exec()
    if response.has_error():
        raise DownstreamError(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}
