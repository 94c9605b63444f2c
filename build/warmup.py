"""`model_warmup` of a release's config.pbtxt: one inference of each model before Triton counts it as loaded.

The first inference of a python-based backend takes a tenth of a second: threads start, memory is mapped, kernels are
chosen. What a GPU node warms up is in build/gpu_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from numpy.typing import NDArray

from build.render import read_config
from sightline.prompt import CaptionPrompt

__all__ = ["warm_up", "warm_up_decoder"]

NEW_TOKENS = 2  # a prefill and one further step


def warm_up(models: Path, names: list[str]) -> None:
    """Zeros, or empty texts, for models all of whose inputs have a size by now."""
    for name in names:
        _write(models / name, {})


def warm_up_decoder(models: Path, prompt: CaptionPrompt, image_tokens: int) -> None:
    """The prompt of one image whose features [image_tokens, hidden] are 0."""
    ids = prompt.ids(image_tokens)
    scalars = {
        "input_lengths": len(ids), "request_output_len": NEW_TOKENS, "end_id": prompt.end_id, "pad_id": prompt.pad_id,
        "prompt_vocab_size": image_tokens,
    }  # fmt: skip
    values = {name: np.array([value], np.int32) for name, value in scalars.items()}
    _write(models / "tensorrt_llm", {"input_ids": ids} | values, {"prompt_embedding_table": image_tokens})


def _write(
    model: Path, values: Mapping[str, NDArray[np.int32]], rows: Mapping[str, int] | None = None
) -> None:  # fmt: skip
    """Add a sample to config.pbtxt: `values` from files, `rows` of zeros, and zeros for all that is not optional."""
    path, rows = model / "config.pbtxt", rows or {}
    config = read_config(path)
    sample = config.model_warmup.add(name="one row", batch_size=1)
    for tensor in config.input:
        if tensor.optional and tensor.name not in {*values, *rows}:
            continue
        entry = sample.inputs[tensor.name]
        entry.data_type = tensor.data_type
        entry.dims[:] = tensor.dims
        if tensor.name in values:
            folder = model / "warmup"
            folder.mkdir(exist_ok=True)
            (folder / tensor.name).write_bytes(values[tensor.name].tobytes())
            entry.dims[:] = values[tensor.name].shape
            entry.input_data_file = tensor.name
        else:
            entry.zero_data = True
            if tensor.name in rows:
                entry.dims[0] = rows[tensor.name]
    path.write_text(text_format.MessageToString(config))
