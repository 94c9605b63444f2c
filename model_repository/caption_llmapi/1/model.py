"""Media bytes → caption through TensorRT-LLM's LLM API, behind the same contract as the engine's caption model.

The LLM API batches by itself: every item becomes one `generate_async`, all are awaited together.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from sightline.caption_jobs import DownstreamError, Job
from sightline.caption_service import CaptionService
from sightline.errors import MediaError
from sightline.media import MediaSpec, decode
from sightline.node import BASE_IMAGE, TENSORRT_LLM
from sightline.prompt import IMAGE, CaptionPrompt, captioner_version
from sightline.words import WORDS

try:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig
except ImportError as error:
    MISSING = str(error)  # Triton's exceptions are not there yet while this file is imported
else:
    MISSING = ""


class TritonPythonModel:
    """Reads `checkpoint/` of its version folder: a Hugging Face model that the LLM API supports."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; the LLM API compiles what it needs."""
        if MISSING:
            raise pb_utils.TritonModelException(
                f"caption: a release of lane llmapi needs tensorrt_llm {TENSORRT_LLM} ({MISSING}); serve it in "
                f"{BASE_IMAGE} with `sightline serve --target gpu`, or build a release of another lane"
            )
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"])
        self.spec = MediaSpec.from_pretrained(folder)
        self.prompt = CaptionPrompt.from_pretrained(folder)
        self.llm = LLM(
            model=str(folder / "checkpoint"),
            tensor_parallel_size=int(parameters["tensor_parallel_size"]),
            dtype=parameters["dtype"],
            max_batch_size=config["max_batch_size"],
            kv_cache_config=KvCacheConfig(enable_block_reuse=True, dtype=parameters["kv_cache_dtype"]),
        )
        # temperature 0: greedy, as the engine's captions are.
        self.sampling = SamplingParams(max_tokens=self.prompt.max_new_tokens, temperature=0.0)
        self.threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        version = captioner_version(folder)
        if (folder / WORDS).exists():
            version += "-plain"  # the other lanes keep levels of words with their captions
        self.service = CaptionService(pb_utils, args, version, self._caption)

    def finalize(self) -> None:
        """End what is under way, stop the LLM's workers and the decoding threads."""
        self.service.close()
        self.llm.shutdown()
        self.threads.shutdown()

    def execute(self, requests: list[Any]) -> None:
        """Take requests with MEDIA BYTES [rows, 1]; they are answered later."""
        self.service.execute(requests)

    async def _caption(self, jobs: Sequence[Job]) -> None:
        """Each by itself, all at once."""
        await asyncio.gather(*map(self._one, jobs))

    async def _one(self, job: Job) -> None:
        try:
            frames = await asyncio.get_running_loop().run_in_executor(self.threads, decode, job.data, self.spec)
        except MediaError as error:
            return job.reject(error.reason)
        if not job.wanted:
            return
        # The checkpoint's own processor resizes, so the frames go in as they are, one placeholder for each.
        text = self.prompt.template.replace(IMAGE, IMAGE * len(frames))
        try:
            result = await self.llm.generate_async(
                {"prompt": text, "multi_modal_data": {"image": frames}}, sampling_params=self.sampling
            ).aresult()
        except Exception as error:
            job.fail(DownstreamError(f"caption: the LLM API failed: {type(error).__name__}: {error}"))
        else:
            job.caption(self.prompt.text(result.outputs[0].token_ids))
