"""Python stand-in for the C++ tensorrtllm backend, used where `libtriton_tensorrtllm.so` is not installed.

It speaks the real backend's tensor contract: ids ≥ vocabulary size are rows of `prompt_embedding_table`;
output_ids is [batch, beams = 1, tokens], with the input in front unless `exclude_input_in_output` is true;
sequence_length counts output_ids without the end id. All requests of one dynamic batch are decoded together.
What it cannot do (beams, sampling, streaming) it refuses, and says so. It runs on the CPU unless the parameter
`device` in config.pbtxt is `cuda`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))
from decoder import Decoder, Prompt


class TritonPythonModel:
    """One decoder, one batch at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the folder that parameter `gpt_model_path` names, relative to the model's folder."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self.echo = parameters.get("exclude_input_in_output", "false").lower() != "true"
        try:
            if config.get("model_transaction_policy", {}).get("decoupled"):
                raise ValueError("decoupled (streaming) mode needs the C++ tensorrtllm backend")
            device = parameters.get("device", "cpu")
            self.decoder = Decoder(Path(args["model_repository"], parameters["gpt_model_path"]), device=device)
        except KeyError as error:
            raise pb_utils.TritonModelException(
                f"{config['name']}: expected {error} in config.pbtxt or the decoder folder"
            ) from error
        except Exception as error:
            raise pb_utils.TritonModelException(f"{config['name']}: {error}") from error
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        pb_utils.Logger.log_info(
            f"{config['name']}: served by the python stand-in for the tensorrtllm backend "
            f"(torch {torch.__version__}, {where})"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode the requests together; one that breaks the contract fails alone."""
        parsed: list[list[Prompt] | Exception] = []
        for request in requests:
            try:
                parsed.append(self._prompts(request))
            except ValueError as error:
                parsed.append(error)
        prompts = [prompt for entry in parsed if isinstance(entry, list) for prompt in entry]
        generated = iter(self.decoder.generate(prompts) if prompts else [])
        return [
            self._respond(entry, [next(generated) for _ in entry])
            if isinstance(entry, list)
            else pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(entry), pb_utils.TritonError.INVALID_ARG)
            )
            for entry in parsed
        ]

    def _prompts(self, request: Any) -> list[Prompt]:
        """The request's rows. Raises ValueError for what the stand-in, or the contract, does not allow."""

        def tensor(name: str) -> Any:
            found = pb_utils.get_input_tensor_by_name(request, name)
            return None if found is None else found.as_numpy()

        ids = tensor("input_ids")  # [B, L]
        rows = len(ids)

        def scalars(name: str, default: float) -> list[Any]:
            value = tensor(name)
            return [default] * rows if value is None else list(value.reshape(rows).tolist())

        top_k, top_p = scalars("runtime_top_k", 0), scalars("runtime_top_p", 0.0)
        if max(scalars("beam_width", 1)) > 1:
            raise ValueError("beam_width: the python stand-in decodes greedily, expected 1")
        if max(top_k) > 1 or any(k < 1 and p > 0 for k, p in zip(top_k, top_p, strict=True)):
            raise ValueError(
                "runtime_top_k, runtime_top_p: the python stand-in decodes greedily, expected "
                "runtime_top_k 1 or neither"
            )
        if any(penalty != 1 for penalty in scalars("repetition_penalty", 1.0)):
            raise ValueError("repetition_penalty: the python stand-in supports 1.0 only")
        if any(scalars("streaming", False)) or any(scalars("stop", False)):
            raise ValueError("streaming, stop: need the C++ tensorrtllm backend in decoupled mode")
        table = tensor("prompt_embedding_table")  # [B, R, hidden]
        if table is not None and any(
            size != table.shape[1] for size in scalars("prompt_vocab_size", table.shape[1])
        ):
            raise ValueError(f"prompt_vocab_size: expected the table's number of rows, {table.shape[1]}")
        extra = tensor("prompt_table_extra_ids")  # [B, L]
        if extra is not None:
            if extra.shape != ids.shape:
                raise ValueError(f"prompt_table_extra_ids: expected one per input id {ids.shape}, got {extra.shape}")
            if ((extra == 0) & (ids >= self.decoder.vocab_size)).any():
                raise ValueError(
                    "prompt_table_extra_ids: 0 at an id of the prompt table; with KV cache reuse, different images "
                    "would share cache blocks"
                )
        lengths, news, ends = (
            scalars("input_lengths", 0),
            scalars("request_output_len", 0),
            scalars("end_id", -1),
        )
        if min(lengths) < 1 or max(lengths) > ids.shape[1]:
            raise ValueError(
                f"input_lengths: expected 1 … {ids.shape[1]}, the length of input_ids, got {lengths}"
            )
        if min(news) < 1:
            raise ValueError(f"request_output_len: expected at least 1, got {news}")
        prompts = [
            Prompt(
                ids=ids[i, : lengths[i]],
                table=None if table is None else table[i],
                max_new=news[i],
                end_id=ends[i],
            )
            for i in range(rows)
        ]
        for prompt in prompts:
            self.decoder.check(prompt)
        return prompts

    def _respond(self, prompts: list[Prompt], generated: list[list[int]]) -> Any:
        rows = [
            [*prompt.ids.tolist(), *ids] if self.echo else ids
            for prompt, ids in zip(prompts, generated, strict=True)
        ]
        longest = max(1, *(len(row) for row in rows))  # an empty tensor would not travel
        output = np.zeros((len(rows), 1, longest), dtype=np.int32)
        for i, row in enumerate(rows):
            output[i, 0, : len(row)] = row
            output[i, 0, len(row) :] = prompts[i].end_id
        lengths = np.array([[len(row)] for row in rows], dtype=np.int32)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("output_ids", output),
                pb_utils.Tensor("sequence_length", lengths),
            ]
        )
