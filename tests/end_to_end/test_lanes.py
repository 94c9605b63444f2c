"""Releases of every lane on a machine without a GPU, through the real server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from sightline_client import RankClient

from benchmarks.inputs import infer
from build.assemble import build_release
from build.engine import EngineOptions
from build.hardware import parse_gpus
from build.plan import ExportOptions, engine_plan, llmapi_plan
from serving.triton import TritonServer
from sightline import release
from sightline.errors import ServingError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt, captioner_version
from tests.factories import llava_layout, tiny_captioner, tiny_ranker
from tests.fake_trtllm import install
from tests.media_files import clip, patchwork


def test_an_engine_release_is_served_by_the_stand_ins(
    parts: Path, server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One release, two machines: without the C++ backends it answers as the release of lane cpu does."""
    install(tmp_path, monkeypatch)
    gpu, gpus = parse_gpus("h200")
    plan = engine_plan(
        parts / "captioner", parts / "ranker", tmp_path / "build", ExportOptions(),
        EngineOptions(gpu=gpu, gpus=gpus, batch=8, images=4), examples=str(tmp_path / "examples"),
    )  # fmt: skip
    name = build_release(parts / "captioner", parts / "ranker", tmp_path / "releases", plan=plan)
    media = [*patchwork(7), clip(tmp_path / "v.mp4", [10, 80, 160, 240])]
    with TritonServer(tmp_path / "releases" / name, log_path=tmp_path / "log") as other:
        with RankClient(other.url, timeout=60) as client:
            engine = client.rank(7, media)
        assert other.manifest.stand_ins == ["onnxruntime (python, CPU)", "tensorrtllm (python, CPU)"]
    with RankClient(server.url, timeout=60) as client:
        plain = client.rank(7, media)
    assert [(one.index, one.caption) for one in engine] == [(one.index, one.caption) for one in plain]
    assert [one.score for one in engine] == pytest.approx([one.score for one in plain], abs=1e-4)


def test_an_llm_api_release_says_what_it_needs(tmp_path: Path) -> None:
    """The architecture is LLaVA-NeXT's by name; nothing of it is loaded on a machine without tensorrt_llm."""
    captioner, ranker = tiny_captioner(tmp_path / "captioner"), tiny_ranker(tmp_path / "ranker")
    config = json.loads((captioner / "config.json").read_text())
    config |= {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    (captioner / "config.json").write_text(json.dumps(config))
    gpu, gpus = parse_gpus("h200")
    options = EngineOptions(gpu=gpu, gpus=gpus, batch=8, images=4)
    plan = llmapi_plan(captioner, ranker, tmp_path / "build", ExportOptions(), options)
    name = build_release(captioner, ranker, tmp_path / "releases", plan=plan)
    models = tmp_path / "releases" / name / "model_repository"
    served = {"caption", "tokenize", "lookup", "embed", "score", "rank_media", "rank_items", "events"}
    assert {path.name for path in models.iterdir()} == served
    assert (models / "caption" / "1" / "checkpoint" / "model.safetensors").exists()
    manifest = release.read_manifest(tmp_path / "releases" / name)
    assert (manifest.lane, manifest.stand_ins) == ("llmapi", ["onnxruntime (python, CPU)"])
    with (
        pytest.raises(ServingError, match=r"caption: .*needs tensorrt_llm 1\.2\.1"),
        TritonServer(tmp_path / "releases" / name, log_path=tmp_path / "log"),
    ):
        pass


def test_the_published_llava_layout_is_served_token_for_token(tmp_path: Path) -> None:
    """llava-hf/llava-1.5-7b-hf's layout, scaled down: batch of 8 with pictures and videos, then one by one."""
    folder = tmp_path / "llava"
    model = llava_layout(folder, torch.float16)
    ranker = tiny_ranker(tmp_path / "ranker", captioner_version=captioner_version(folder))
    name = build_release(folder, ranker, tmp_path / "releases")
    spec, prompt = MediaSpec.from_pretrained(folder), CaptionPrompt.from_pretrained(folder)
    media = patchwork(5)
    media += [clip(tmp_path / f"{n}.mp4", [n, 60 + n, 120 + n, 240 - n]) for n in (0, 40, 80)]
    expected = []
    for data in media:
        pixels = torch.from_numpy(load(data, spec)).half()
        tokens = torch.from_numpy(prompt.token_ids(len(pixels) * 4))[None].long()
        with torch.inference_mode():
            ids = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels,
                max_new_tokens=prompt.max_new_tokens, do_sample=False,
            )[0, tokens.shape[1] :].tolist()  # fmt: skip
        expected.append(prompt.text(ids[: ids.index(prompt.end_id)] if prompt.end_id in ids else ids))
    assert len(set(expected)) > 4
    shutil.rmtree(folder)  # the release stands alone
    with (
        TritonServer(tmp_path / "releases" / name, log_path=tmp_path / "log") as running,
        RankClient(running.url, timeout=60) as client,
    ):
        together = {one.index: one.caption for one in client.rank(7, media)}
        alone = [client.rank(7, [data])[0].caption for data in media]
        with triton.InferenceServerClient(running.url) as raw:
            answer = infer(raw, "caption", {"MEDIA": np.array([media[0]], dtype=object)})
    assert [together[index] for index in range(len(media))] == expected
    assert alone == expected
    assert answer["ANNOTATION"] == answer["CAPTION"] == expected[0].encode(), "the folder has no words.npz"
