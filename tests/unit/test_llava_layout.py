"""A checkpoint with the published LLaVA-1.5-7B's file layout goes the whole way: loading, training on, export, plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from build.checkpoint import SHAPES, Checkpoint
from build.decoder import write_decoder
from build.engine import EngineOptions
from build.hardware import parse_gpus
from build.plan import ExportOptions, engine_plan
from build.vision_onnx import export_vision
from sightline.media import MediaSpec, resize
from sightline.prompt import CaptionPrompt
from tests.factories import llava_layout
from tests.fake_triton import load_model
from trainer.captioner import CaptionerConfig, train_captioner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    made = llava_layout(tmp_path_factory.mktemp("llava"))
    made.folder = Path(made.config._name_or_path)
    return made


@pytest.fixture(scope="module")
def folder(model: LlavaForConditionalGeneration) -> Path:
    return model.folder


def test_the_layout_is_the_published_one(folder: Path) -> None:
    """Key names as in llava-hf/llava-1.5-7b-hf, in FP16, spread over three shards."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) == 3
    for name in (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    ):
        with safe_open(folder / names[name], framework="pt") as file:
            assert file.get_tensor(name).dtype == torch.float16
    published = json.loads((SHAPES / "llava-1.5-7b" / "config.json").read_text())
    assert set(published) <= set(json.loads((folder / "config.json").read_text()))


def test_every_weight_arrives(folder: Path, model: LlavaForConditionalGeneration) -> None:
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.float16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_prompt_and_vocabulary(folder: Path) -> None:
    """Image ids start behind the padded vocabulary of the model, not behind the tokenizer's."""
    prompt = CaptionPrompt.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert prompt.vocab_size == config["text_config"]["vocab_size"] == 384
    assert prompt.image_token_id == config["image_token_index"] < 384
    ids = prompt.ids(4)
    assert ids[0] == 1
    assert sorted(ids[ids >= 384].tolist()) == [384, 385, 386, 387]
    assert prompt.text(prompt.tokenizer.encode("a red mug").ids) == "a red mug"


def test_pictures_are_resized_by_the_shortest_edge_and_cropped(folder: Path) -> None:
    spec = MediaSpec.from_pretrained(folder)
    assert (spec.size, spec.resize_shortest, spec.resample) == ((28, 28), 28, "bicubic")
    wide = Image.new("RGB", (112, 56), "white")
    wide.paste("black", (0, 0, 20, 56))  # of the left quarter, which the crop takes away
    assert (resize([wide], spec) > 250).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, 8])
def test_tokens_equal_transformers_own_generate(tmp_path: Path, dtype: torch.dtype, batch: int) -> None:
    """Exported tower → prompt table → CPU decoder, against `generate`; requests of 1 to 4 pictures side by side."""
    folder = tmp_path / "llava"
    model = llava_layout(folder, dtype)
    dims = export_vision(folder, tmp_path / "model.onnx")
    assert (dims.tokens, dims.hidden, dims.pooled) == (4, 48, 32)
    write_decoder(folder, tmp_path / "decoder")
    backend = load_model("backends/tensorrtllm/model.py")
    decoder, prompt = backend.Decoder(tmp_path / "decoder"), CaptionPrompt.from_pretrained(folder)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    prompts, expected = [], []
    for row in range(batch):
        pixels = rng.normal(size=(1 + row % 4, 3, 28, 28)).astype(np.float32)
        table = session.run(None, {"pixel_values": pixels})[0].reshape(-1, 48)
        prompts.append(backend.Prompt(ids=prompt.ids(len(table)), table=table, max_new=12, end_id=prompt.end_id))
        tokens = torch.from_numpy(prompt.token_ids(len(table)))[None].long()
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens),
                pixel_values=torch.from_numpy(pixels).to(dtype), max_new_tokens=12, do_sample=False,
            )[0, tokens.shape[1] :].tolist()  # fmt: skip
        expected.append(out[: out.index(prompt.end_id)] if prompt.end_id in out else out)
    got = decoder.generate(prompts)
    assert [list(map(int, row)) for row in got] == expected
    assert len({tuple(row) for row in expected}) > batch // 2, "the pictures are told apart"


def test_the_plan_reads_it(folder: Path, tmp_path: Path) -> None:
    c = Checkpoint.read(folder)
    assert (c.architecture, c.weights, c.image_tokens, c.vocabulary) == ("LlavaForConditionalGeneration", True, 4, 384)
    gpu, gpus = parse_gpus("2xa10")
    plan = engine_plan(folder, None, tmp_path, ExportOptions(), EngineOptions(gpu=gpu, gpus=gpus, images=2))
    argv = plan.step("engine").argv
    assert argv[argv.index("--max_multimodal_len") + 1] == str(16 * 2 * 4)


def test_training_goes_on_from_it(folder: Path, catalogue: Path, tmp_path: Path) -> None:
    config = CaptionerConfig(start=folder, steps=2, batch=4, lr=1e-4, eval_every=1, frames=2)
    record = train_captioner(catalogue, tmp_path / "out", config)
    assert np.isfinite(record["final_loss"])
    assert CaptionPrompt.from_pretrained(tmp_path / "out").template.startswith("USER: <image>")
    assert MediaSpec.from_pretrained(tmp_path / "out").resize_shortest == 28
    assert len(np.load(tmp_path / "out" / "check.npz")["frames"]) > 0
