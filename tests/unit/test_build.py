"""Exports equal the checkpoint they come from, and a build refuses parts that were not made for each other."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from build import steps, vision_onnx
from build.assemble import build_release
from build.decoder import write_decoder
from build.engine import EngineOptions
from build.hardware import parse_gpus
from build.plan import ExportOptions, llmapi_plan
from build.vision_onnx import OUTPUTS, export_vision
from sightline import release
from sightline.errors import ConfigError, ReleaseError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt, captioner_version
from sightline.tokens import Kind
from tests.factories import tiny_captioner, tiny_ranker
from tests.fake_triton import load_model
from tests.media_files import clip, picture
from trainer.captioner_model import Encoder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def eager(captioner: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(captioner).eval()


@pytest.mark.parametrize("layer", [-2, -1, [-1, -2]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_encoder_is_the_models_own(eager: LlavaForConditionalGeneration, layer: int | list[int], strategy: str) -> None:
    """The module that is exported gives what `get_image_features` gives, whatever layers the checkpoint uses."""
    config = eager.config
    kept = (config.vision_feature_layer, config.vision_feature_select_strategy)
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    projector = eager.model.multi_modal_projector
    try:
        if isinstance(layer, list):
            eager.model.multi_modal_projector = type(projector)(config)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = eager.get_image_features(pixels).pooler_output
            got, pooled = Encoder(eager)(pixels)
            states = eager.model.vision_tower(pixels, output_hidden_states=True)
        assert got.shape[1] == (16 if strategy == "default" else 17)
        torch.testing.assert_close(got, torch.stack(list(expected)), rtol=0, atol=1e-6)
        read = states.last_hidden_state if layer == -1 else states.hidden_states[-2]
        torch.testing.assert_close(pooled, read[:, 1:].max(1).values, rtol=0, atol=1e-6)
    finally:
        eager.model.multi_modal_projector = projector
        config.vision_feature_layer, config.vision_feature_select_strategy = kept


def test_exported_vision_equals_eager(captioner: Path, eager: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    dims = export_vision(captioner, tmp_path / "model.onnx")
    assert (dims.height, dims.width, dims.tokens, dims.hidden, dims.pooled) == (32, 32, 16, 48, 32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = Encoder(eager)(pixels)
        got = session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()})
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_an_export_that_is_off_is_refused(captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_onnx, "TOLERANCE", 0.0)
    with pytest.raises(ReleaseError, match=r"model\.onnx: exported image_features differ"):
        export_vision(captioner, tmp_path / "model.onnx")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_served_captioning_equals_transformers(
    captioner: Path, eager: LlavaForConditionalGeneration, tmp_path: Path, kind: str
) -> None:
    """Image features as prompt-table rows through the CPU decoder, against `generate` of the checkpoint."""
    backend = load_model("backends/tensorrtllm/model.py")
    data = picture() if kind == "image" else clip(tmp_path / "v.mp4", [10, 80, 160, 240])
    pixels = torch.from_numpy(load(data, MediaSpec.from_pretrained(captioner)))
    prompt = CaptionPrompt.from_pretrained(captioner)
    write_decoder(captioner, tmp_path / "decoder")
    with torch.inference_mode():
        table = Encoder(eager)(pixels)[0].reshape(-1, 48).numpy()
        tokens = prompt.token_ids(len(table))
        expected = eager.generate(
            input_ids=torch.from_numpy(tokens)[None].long(), attention_mask=torch.ones(1, len(tokens)),
            pixel_values=pixels, max_new_tokens=12, do_sample=False, pad_token_id=prompt.pad_id,
        )[0, len(tokens) :].tolist()  # fmt: skip
    generated = backend.Decoder(tmp_path / "decoder").generate(
        [backend.Prompt(ids=prompt.ids(len(table)), table=table, max_new=12, end_id=prompt.end_id)]
    )[0]
    assert generated == [token for token in expected if token != prompt.end_id]


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(path: Path, **change: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captioner_version": "older"}, "captioner_version 'older', this build has 'test-captioner'"),
        ({"token_spec_version": "other"}, "token_spec_version 'other'"),
        ({"token_length": 99}, "token_length 99"),
        ({"context": [{"name": "position", "cardinality": 4}]}, "ranker.json: context is 1 long"),
    ],
)
def test_a_ranker_of_other_parts_is_refused(
    captioner: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    ranker = tiny_ranker(tmp_path / "ranker")
    rewrite(ranker / "ranker.json", **change)
    with pytest.raises(ReleaseError, match=message):
        build_release(captioner, ranker, tmp_path / "releases")
    assert not list((tmp_path / "releases").glob("*")), "a refused build leaves nothing"


def test_a_checkpoint_of_other_origin_has_its_hash_as_version(captioner: Path, tmp_path: Path) -> None:
    """A LLaVA folder without sightline.json is a captioner, too; but not the one that the ranker knows."""
    folder = copied(captioner, tmp_path)
    (folder / "sightline.json").unlink()
    version = captioner_version(folder)
    with pytest.raises(ReleaseError, match=f"'test-captioner', this build has '{version}'"):
        build_release(folder, tiny_ranker(tmp_path / "ranker"), tmp_path / "releases")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert captioner_version(folder) != version
    weights.unlink()
    with pytest.raises(ConfigError, match=r"expected a captioner: sightline\.json .* or a LLaVA checkpoint's"):
        captioner_version(folder)


def test_missing_parts_say_how_to_get_them(captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"nope: expected the folder of a ranker .*`sightline train ranker`"):
        build_release(captioner, tmp_path / "nope", tmp_path / "releases")


@pytest.mark.parametrize("file", ["model.pt", "items.parquet"])
def test_a_damaged_file_ends_the_build(captioner: Path, tmp_path: Path, file: str) -> None:
    ranker = tiny_ranker(tmp_path / "ranker")
    (ranker / file).write_bytes(b"")
    refused = rf"step ranker failed on {ranker}: .*; check that its files are whole\. The traceback is in (.*\.log)$"
    with pytest.raises(ReleaseError, match=refused) as error:
        build_release(captioner, ranker, tmp_path / "releases")
    log = re.search(refused, str(error.value))
    assert log is not None
    assert "Traceback" in Path(log[1]).read_text()
    assert not list((tmp_path / "releases").glob("*"))


def test_a_video_that_outgrows_the_language_model_is_refused(captioner: Path, tmp_path: Path) -> None:
    folder = copied(captioner, tmp_path)
    rewrite(folder / "sightline.json", video_frames=64)
    with pytest.raises(ReleaseError, match=r"video of 64 frames.*the language model has 512"):
        build_release(folder, tiny_ranker(tmp_path / "ranker"), tmp_path / "releases")


def test_frames_of_another_size_than_the_tower_takes_are_refused(captioner: Path, tmp_path: Path) -> None:
    folder = copied(captioner, tmp_path)
    rewrite(folder / "preprocessor_config.json", size={"height": 64, "width": 64})
    with pytest.raises(ReleaseError, match=r"frames of \(64, 64\), but the vision tower takes \(32, 32\)"):
        build_release(folder, tiny_ranker(tmp_path / "ranker"), tmp_path / "releases")


def test_a_classifier_of_another_tower_is_refused(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts / "captioner", tmp_path)
    with np.load(folder / "words.npz") as held:
        np.savez(folder / "words.npz", **{**held, "weight": held["weight"][:, :90]})
    for precision in ("fp16", "fp32"):
        with pytest.raises(ConfigError, match=r"words\.npz: made for a vision tower of width 30, this one has 32"):
            steps.run(["vision", str(folder), str(tmp_path / "out"), "--precision", precision])


@pytest.mark.parametrize(("families", "missing"), [
    (("confidence", "word"), "confidence"), (("semantic", "word", "sample"), "sample, semantic"),
])  # fmt: skip
def test_a_ranker_that_reads_what_is_not_served_is_refused(
    captioner: Path, tmp_path: Path, families: tuple[Kind, ...], missing: str
) -> None:
    """By a captioner without words.npz; nothing else stands between confidences and a release (`parts` is one)."""
    ranker = tiny_ranker(tmp_path / "ranker", families=families)
    with pytest.raises(ReleaseError, match=f"its families {missing} read what this release would not answer"):
        build_release(captioner, ranker, tmp_path / "releases")
    assert not list((tmp_path / "releases").glob("*"))


def test_the_llm_api_answers_no_confidences(parts: Path, tmp_path: Path) -> None:
    folder = copied(parts / "captioner", tmp_path)
    rewrite(folder / "config.json", model_type="llava_next", architectures=["LlavaNextForConditionalGeneration"])
    gpu, gpus = parse_gpus("h200")
    options = EngineOptions(gpu=gpu, gpus=gpus, batch=8, images=4)
    plan = llmapi_plan(folder, parts / "ranker", tmp_path / "build", ExportOptions(), options)
    with pytest.raises(ReleaseError, match="its families confidence read what this release would not answer"):
        build_release(folder, parts / "ranker", tmp_path / "releases", plan=plan)


def test_the_classifier_is_part_of_the_release(parts: Path, releases_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(release.current(releases_dir), folder)
    words = folder / "model_repository" / "caption" / "1" / "words.npz"
    assert words.read_bytes() == (parts / "captioner" / "words.npz").read_bytes()
    with np.load(words) as held:
        np.savez(words, **{**held, "rate": held["rate"] / 2})
    with pytest.raises(ReleaseError, match=r"model_repository/caption/1/words\.npz: changed"):
        release.verify(folder)
    manifest = release.read_manifest(folder)
    assert release.release_id("cpu", folder, manifest.release) != manifest.release


def test_an_interrupted_build_leaves_what_was_published(
    parts: Path, releases_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here" / "releases"
    shutil.copytree(releases_dir, folder, symlinks=True)
    before = sorted(path.name for path in folder.iterdir())

    def interrupted(ranker_dir: Path, out_dir: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "export_ranker", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_release(parts / "captioner", parts / "ranker", folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    release.verify(release.current(folder))


def test_the_same_parts_give_the_same_release(parts: Path, releases_dir: Path, tmp_path: Path) -> None:
    again = build_release(parts / "captioner", parts / "ranker", tmp_path)
    assert again == release.current(releases_dir).name


def test_manifest_names_versions_stand_ins_and_limits(parts: Path, releases_dir: Path) -> None:
    manifest = release.read_manifest(release.current(releases_dir))
    ranker = json.loads((parts / "ranker" / "ranker.json").read_text())
    assert manifest.components.model_dump() == {
        "captioner": "test-captioner", "token_spec": ranker["token_spec_version"], "ranker": "test-ranker",
    }  # fmt: skip
    assert [name.split()[0] for name in manifest.stand_ins] == ["onnxruntime", "tensorrtllm"]
    assert (manifest.limits.batch_size, manifest.limits.video_frames, manifest.limits.caption_tokens) == (32, 4, 12)
    assert manifest.limits.media_pixels == MediaSpec.from_pretrained(parts / "captioner").max_pixels
    assert {"sightline", "torch", "onnxruntime"} <= manifest.built_with.keys()
