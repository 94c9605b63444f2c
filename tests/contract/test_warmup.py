"""A release's warm-up is one that Triton can run: sizes of all required inputs, and a prompt for the decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.render import read_config
from sightline import release
from sightline.prompt import CaptionPrompt


@pytest.fixture(scope="module")
def models(releases_dir: Path) -> Path:
    return release.current(releases_dir) / "model_repository"


@pytest.mark.parametrize("model", ["tokenize", "embed", "score", "vision_encoder", "tensorrt_llm"])
def test_every_required_input_is_there(models: Path, model: str) -> None:
    config = read_config(models / model / "config.pbtxt")
    (sample,) = config.model_warmup
    assert (sample.batch_size, {t.name for t in config.input if not t.optional} - set(sample.inputs)) == (1, set())
    for tensor in config.input:
        if tensor.name in sample.inputs:
            entry = sample.inputs[tensor.name]
            assert entry.data_type == tensor.data_type
            assert all(given == size or size == -1 for given, size in zip(entry.dims, tensor.dims, strict=True))
            assert min(entry.dims) > 0
            assert entry.zero_data or (models / model / "warmup" / entry.input_data_file).exists()


def test_the_decoder_gets_the_prompt_of_one_image(models: Path) -> None:
    (sample,) = read_config(models / "tensorrt_llm" / "config.pbtxt").model_warmup
    tokens, hidden = read_config(models / "vision_encoder" / "config.pbtxt").output[0].dims
    assert list(sample.inputs["prompt_embedding_table"].dims) == [tokens, hidden]

    def value(name: str) -> list[int]:
        found: list[int] = np.fromfile(models / "tensorrt_llm" / "warmup" / name, np.int32).tolist()
        assert len(found) == sample.inputs[name].dims[0]
        return found

    ids = CaptionPrompt.from_pretrained(models / "caption" / "1").ids(tokens).tolist()
    assert (value("input_ids"), value("input_lengths"), value("prompt_vocab_size")) == (ids, [len(ids)], [tokens])
    assert value("request_output_len")[0] > 0


def test_models_that_write_or_call_others_are_not_warmed_up(models: Path) -> None:
    for model in ("caption", "rank_media"):
        assert not read_config(models / model / "config.pbtxt").model_warmup
