"""The LLM API's caption model, with a package in tensorrt_llm's place that takes only what the record allows."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from build.records import load
from sightline.prompt import CaptionPrompt
from tests.factories import tiny_captioner
from tests.fake_triton import Request, load_model
from tests.media_files import clip, encoded, picture

MODEL = "model_repository/caption_llmapi/1/model.py"
RECORD = load("llm_api")


def bound(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a recorded callable, by name; a TypeError where its signature does not take them."""
    kinds = {
        "positional_or_keyword": inspect.Parameter.POSITIONAL_OR_KEYWORD,
        "keyword_only": inspect.Parameter.KEYWORD_ONLY,
        "var_keyword": inspect.Parameter.VAR_KEYWORD,
    }
    parameters = [
        inspect.Parameter(
            entry["name"], kinds[entry["kind"]],
            default=inspect.Parameter.empty if entry.get("required") or "var" in entry["kind"] else entry["default"],
        )
        for entry in RECORD["callables"][name]["parameters"]
    ]  # fmt: skip
    return dict(inspect.Signature(parameters).bind(*args, **kwargs).arguments)


def fields(name: str) -> set[str]:
    """Fields of a recorded class that stand in versions on both sides of the pinned one."""
    return {key for key, entry in RECORD["classes"][name]["fields"].items() if entry["in"] != "newer only"}


def recorded(name: str) -> Any:
    def make(**given: Any) -> SimpleNamespace:
        unknown = set(given) - fields(name)
        assert not unknown, f"{name} has no {unknown}"
        return SimpleNamespace(**given)

    return make


class Output:
    """What `generate_async` returns."""

    def __init__(self, ids: list[int]) -> None:
        self.outputs = [SimpleNamespace(token_ids=ids)]

    async def aresult(self) -> Output:
        assert "tensorrt_llm.llmapi.RequestOutput.aresult" in RECORD["callables"]
        await asyncio.sleep(0.01)
        return self


class LLM:
    made: list[LLM]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = bound("tensorrt_llm.LLM.__init__", *args, **kwargs)
        arguments = fields("tensorrt_llm.llmapi.llm_args.BaseLlmArgs") | fields("tensorrt_llm.llmapi.TorchLlmArgs")
        assert set(given.pop("kwargs", {})) <= arguments
        self.given, self.calls, self.running, self.most = kwargs, [], 0, 0
        self.prompt = CaptionPrompt.from_pretrained(Path(kwargs["model"]).parent)
        LLM.made.append(self)

    def generate_async(self, *args: Any, **kwargs: Any) -> Output:
        call = bound("tensorrt_llm.LLM.generate_async", *args, **kwargs)
        form = RECORD["prompt_forms"]["TextPrompt"]
        assert set(form["required"]) <= set(call["inputs"]) <= {*form["required"], *form["optional"]}
        self.calls.append(call)
        frames = call["inputs"]["multi_modal_data"]["image"]
        if frames[0].size == (3, 3):
            raise RuntimeError("no room for the request")
        return Output(self.prompt.tokenizer.encode(f"{len(frames)} mugs", add_special_tokens=False).ids)

    def shutdown(self) -> None:
        self.given["down"] = True


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    LLM.made = []
    package, inner = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    package.LLM = LLM  # type: ignore[attr-defined]
    package.SamplingParams = recorded("tensorrt_llm.llmapi.SamplingParams")  # type: ignore[attr-defined]
    inner.KvCacheConfig = recorded("tensorrt_llm.llmapi.KvCacheConfig")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", inner)
    tiny_captioner(tmp_path / "1")
    (tmp_path / "1" / "checkpoint").mkdir()
    parameters = {
        "tensor_parallel_size": "2", "dtype": "bfloat16", "kv_cache_dtype": "auto", "reserve_ms": "10",
        "max_waiting_rows": "64",
    }  # fmt: skip
    config = {
        "max_batch_size": 8, "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }  # fmt: skip
    made = load_model(MODEL).TritonPythonModel()
    made.initialize({
        "model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1",
    })  # fmt: skip
    yield made
    made.finalize()


def captions(model: Any, *requests: list[bytes]) -> list[Any]:
    asked = [Request(["CAPTION"], MEDIA=np.array([[data] for data in media], dtype=object)) for media in requests]
    assert model.execute(asked) is None
    return [request.sender.response.result(timeout=60) for request in asked]


def test_it_is_made_as_the_release_says(model: Any) -> None:
    (llm,) = LLM.made
    assert llm.given["model"].endswith("/1/checkpoint")
    assert (llm.given["tensor_parallel_size"], llm.given["dtype"], llm.given["max_batch_size"]) == (2, "bfloat16", 8)
    assert llm.given["kv_cache_config"].enable_block_reuse
    assert (model.sampling.max_tokens, model.sampling.temperature) == (12, 0.0)


def test_images_and_videos_of_two_requests_go_in_together(model: Any, tmp_path: Path) -> None:
    video = clip(tmp_path / "v.mp4", [10, 80, 160, 240])
    one, two = captions(model, [picture(), video], [picture(), b"not a picture"])
    assert one.tensors["CAPTION"].reshape(-1).tolist() == [b"1 mugs", b"4 mugs"]
    assert two.tensors["CAPTION"].reshape(-1).tolist() == [b"1 mugs", b""]
    for response in (one, two):
        assert response.tensors["ANNOTATION"].tolist() == response.tensors["CAPTION"].tolist()
    assert two.tensors["CAPTION_SOURCE"].reshape(-1).tolist() == [b"model", b"rejected"]
    calls = LLM.made[0].calls
    assert len(calls) == 2, "the picture that both requests have is captioned once"
    texts = [call["inputs"]["prompt"] for call in calls]
    assert [text.count("<image>") for text in texts] == [1, 4]
    assert all(call["sampling_params"] is model.sampling for call in calls)


def test_a_request_without_usable_media_is_refused(model: Any) -> None:
    (response,) = captions(model, [b"", b"text"])
    assert response.error.code == "INVALID_ARG"
    assert response.error.message.startswith("MEDIA: no row can be used: empty: 0 bytes; ")


def test_a_failing_llm_fails_the_requests_with_its_reason(model: Any) -> None:
    (response,) = captions(model, [encoded(Image.new("RGB", (3, 3)), "PNG")])
    assert response.error.code == "INTERNAL"
    assert response.error.message == "caption: the LLM API failed: RuntimeError: no room for the request"


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"needs tensorrt_llm 1\.2\.1 .*nvcr\.io/nvidia/tritonserver:26\.07-trtllm"):
        load_model(MODEL).TritonPythonModel().initialize({})
