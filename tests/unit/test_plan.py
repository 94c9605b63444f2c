"""Engine plans: the numbers of a right one, and a message of its own for every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

from build import plan as planning
from build.checkpoint import SHAPES, Checkpoint
from build.engine import EngineOptions
from build.hardware import GIB, parse_gpus
from build.plan import ExportOptions, Plan, Step, cpu_plan, engine_plan, hash_folder, llmapi_plan
from build.records import check_argv, load
from build.steps import run as run_step
from sightline.cli import app
from sightline.errors import ConfigError
from tests.factories import tiny_captioner, tiny_ranker

LLAVA = "llava-1.5-7b"


def options(gpu: str = "h200", **change: Any) -> EngineOptions:
    kind, gpus = parse_gpus(gpu)
    return EngineOptions(gpu=kind, gpus=gpus, **change)


def plan(tmp_path: Path, checkpoint: str | Path = LLAVA, gpu: str = "h200", **change: Any) -> Plan:
    return engine_plan(checkpoint, None, tmp_path, ExportOptions(), options(gpu, **change))


def flags(step: Step, program: str) -> dict[str, Any]:
    return check_argv(program, step.argv[1 if program == "trtllm-build" else 2 :])


# --- what a plan knows of a checkpoint --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.mark.parametrize("which", [LLAVA, "tiny"])
def test_parameter_counts_are_the_models_own(which: str, captioner: Path) -> None:
    folder = SHAPES / which if which == LLAVA else captioner
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder))
    c = Checkpoint.read(folder)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert c.linears + c.embeddings + c.norms == count(model.model.language_model)
    assert c.head == model.lm_head.weight.numel()
    assert c.tower == count(model.model.vision_tower) + count(model.model.multi_modal_projector)


def test_a_shape_without_tokenizer_counts_bytes(captioner: Path) -> None:
    shape, real = Checkpoint.read(LLAVA), Checkpoint.read(captioner)
    assert (shape.image_tokens, shape.weights, shape.positions) == (576, False, 4096)
    assert shape.prompt_tokens > 50
    assert real.weights
    assert (real.image_tokens, real.frames, real.max_new_tokens) == (16, 4, 12)
    assert real.prompt_tokens < 10


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--checkpoint nope: expected a folder .* a recorded shape \(llava-1.5-7b\)"):
        Checkpoint.read("nope")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="expected text_config and vision_config"):
        Checkpoint.read(tmp_path)


# --- a right plan -------------------------------------------------------------------------------------------------


def test_llava_7b_on_one_h200(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.budget is not None
    # 2 (K and V) x 32 layers x 32 heads x 128 x 2 bytes
    assert made.budget.kv_per_token == 524_288
    lines = {line.name: line.bytes for line in made.budget.lines}
    assert lines["decoder weights"] == 2 * 6_738_939_904
    assert lines["KV cache"] == 16 * 524_288 * (59 + 576 + 64)
    assert made.budget.total == sum(lines.values()) < made.budget.memory
    engine = flags(made.step("engine"), "trtllm-build")
    assert engine["--max_prompt_embedding_table_size"] == str(16 * 576)
    assert int(engine["--max_seq_len"]) == int(engine["--max_input_len"]) + 64
    assert engine["--use_fused_mlp"] == "enable"
    convert = flags(made.step("convert"), "convert_checkpoint")
    assert (convert["--dtype"], convert["--tp_size"]) == ("float16", "1")
    assert [(step.name, step.where, dict(step.env)) for step in made.steps] == [
        ("node", "container", {"HOME": "/tmp"}), ("vision", "here", {}), ("decoder", "here", {}),
        ("convert", "container", {"HOME": "/tmp"}), ("engine", "container", {"HOME": "/tmp"}),
    ]  # fmt: skip


def test_tensor_parallelism_divides_what_it_can(tmp_path: Path) -> None:
    one, two = plan(tmp_path).budget, plan(tmp_path, gpu="2xa10").budget
    assert one is not None
    assert two is not None
    assert two.kv_per_token * 2 == one.kv_per_token
    weights = [next(line.bytes for line in b.lines if line.name == "decoder weights") for b in (one, two)]
    embedding = 2 * 131_334_144 + 2 * 266_240  # every rank keeps the embedding and the norms
    assert weights[1] == (weights[0] - embedding) / 2 + embedding
    assert flags(plan(tmp_path, gpu="2xa10").step("convert"), "convert_checkpoint")["--tp_size"] == "2"


@pytest.mark.parametrize(
    ("quant", "gpu", "share", "program"),
    [("int8", "a10", 0.52, "convert_checkpoint"), ("int4", "a10", 0.28, "convert_checkpoint"),
     ("awq", "a10", 0.29, "quantize"), ("fp8", "h100", 0.52, "quantize"), ("bf16", "a10", 1.0, "convert_checkpoint")],
)  # fmt: skip
def test_quantised_plans(tmp_path: Path, quant: str, gpu: str, share: float, program: str) -> None:
    made = plan(tmp_path, gpu=gpu, quant=quant, batch=8)
    assert made.budget is not None
    weights = next(line.bytes for line in made.budget.lines if line.name == "decoder weights")
    assert weights / (2 * 6_738_939_904) == pytest.approx(share, abs=0.01)
    engine, convert = flags(made.step("engine"), "trtllm-build"), flags(made.step("convert"), program)
    assert engine["--use_fused_mlp"] == ("enable" if quant == "bf16" else "disable")
    assert engine["--use_fp8_context_fmha"] == ("enable" if quant == "fp8" else "disable")
    assert convert["--dtype"] == ("bfloat16" if quant == "bf16" else "float16")
    if program == "quantize":
        assert convert["--qformat"] == {"awq": "int4_awq", "fp8": "fp8"}[quant]
    elif quant != "bf16":
        assert (convert["--use_weight_only"], convert["--weight_only_precision"]) == (True, quant)


def test_the_share_of_the_kv_cache_leaves_room_for_the_rest(tmp_path: Path) -> None:
    for gpu, batch in (("h200", 16), ("a10", 16), ("2xa10", 60)):
        budget = plan(tmp_path, gpu=gpu, batch=batch).budget
        assert budget is not None
        lines = {line.name: line.bytes for line in budget.lines}
        loaded = lines["decoder weights"] + lines["activations"] + lines["reserve"]
        taken = budget.kv_fraction * (budget.memory - loaded)
        assert batch * budget.kv_per_sequence <= taken <= budget.memory - loaded - lines["vision tower"]


def test_a_dry_run_needs_no_converted_weights(tmp_path: Path) -> None:
    made = plan(tmp_path, dry_run=True)
    names = [step.name for step in made.steps]
    assert names.index("engine-config") < names.index("engine-dry-run") < names.index("convert")
    assert flags(made.step("engine-config"), "convert_checkpoint")["--save_config_only"] is True
    dry, real = (flags(made.step(name), "trtllm-build") for name in ("engine-dry-run", "engine"))
    assert dry["--dry_run"] is True
    assert dry["--model_config"] == str(made.step("engine-config").output / "config.json")
    limits = [flag for flag in real if flag.startswith("--max")]
    assert {flag: dry[flag] for flag in limits} == {flag: real[flag] for flag in limits}


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_change_reaches_every_step_that_depends_on_it(tmp_path: Path, captioner: Path) -> None:
    def keys(**change: Any) -> dict[str, str]:
        return {step.name: step.key for step in plan(tmp_path, captioner, images=4, **change).steps}

    base = keys()
    assert keys() == base
    batch = keys(batch=8)
    assert {name for name in base if base[name] != batch[name]} == {"engine"}
    quant = keys(quant="int8")
    assert {name for name in base if base[name] != quant[name]} == {"convert", "engine"}
    gpu = keys(gpu="b200")
    assert {name for name in base if base[name] != gpu[name]} == {"node", "engine"}, "one engine per kind of GPU"
    config = captioner / "generation_config.json"
    before = config.read_text()
    try:
        config.write_text(before + "\n")
        changed = keys()
        assert {name for name in base if base[name] != changed[name]} == set(base) - {"node"}
    finally:
        config.write_text(before)
    assert keys() == base


def test_bytecode_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text("1")
    before = hash_folder(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "step.cpython-311.pyc").write_bytes(b"anything")
    assert hash_folder(tmp_path) == before
    (tmp_path / "step.py").write_text("2")
    assert hash_folder(tmp_path) != before


# --- wrong plans ----------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"gpu": "h300"}, "--gpu is 'h300'; expected NAME or COUNTxNAME"),
    ({"gpu": "0xh200"}, "--gpu is '0xh200'"),
    ({"gpu": "t4"}, "compute capability 7.5; TensorRT-LLM 1.2.1 needs 8.0"),
    ({"batch": 0}, "--batch is 0; expected at least 1"),
    ({"images": 0}, "--images is 0"),
    ({"new_tokens": 0}, "--new-tokens is 0"),
    ({"quant": "int3"}, "--quant is 'int3'; expected one of fp16, bf16"),
    ({"quant": "fp8", "gpu": "a10"}, "--quant fp8 on a10: compute capability 8.6 has no FP8"),
    ({"kv_dtype": "fp8"}, "--kv-dtype fp8 with --quant fp16: its scales come from calibration"),
    ({"kv_dtype": "int8"}, "--kv-dtype is 'int8'; expected auto or fp8"),
    ({"kv_dtype": "fp8", "quant": "awq", "gpu": "a10"}, "--kv-dtype fp8 on a10: needs compute capability 8.9"),
    ({"gpu": "3xh200"}, "3 GPUs do not divide the decoder's 32 attention heads"),
    ({"gpu": "a10", "batch": 17}, r"17 needs 22.6 GiB .*KV cache 5.80.* largest batch that fits is about 16"),
    ({"gpu": "l4", "images": 4, "batch": 8}, "largest batch that fits is about 4"),
    ({"images": 8}, "--max_seq_len 4731: the decoder was trained on 4096 positions"),
    ({"extra": ("--max_input_len=600",)}, "--max_input_len 600: the prompt's 59 tokens and 1 images of 576 need 635"),
    ({"extra": ("--max_seq_len=690",)}, "--max_seq_len 690: --max_input_len 635 and 64 new tokens need 699"),
    ({"extra": ("--max_decoder_seq_len=690",)}, "--max_seq_len 690"),
    ({"extra": ("--max_multimodal_len=576",)}, "--max_multimodal_len 576: batch 16 x 576 .* need exactly 9216"),
    ({"extra": ("--max_prompt_embedding_table_size=10000",)}, "--max_multimodal_len 10000"),
    ({"extra": ("--max_num_tokens=512", "--use_paged_context_fmha=disable"), "kv_reuse": False},
     "--max_num_tokens 512: below --max_input_len 635 a prompt needs chunked context"),
    ({"extra": ("--max_batch_size=8",)}, "--max_batch_size 8: differs from --batch 16"),
    ({"ensemble_batch": 17}, "--ensemble-batch 17: an ensemble takes no more rows than its smallest model, 16"),
    ({"batch": 64, "ensemble_batch": 33}, r"smallest model, 32 \(engine 64, models around it 32\)"),
    ({"quant": "int8", "extra": ("--use_fused_mlp=enable",)}, "--use_fused_mlp=enable with --quant int8"),
    ({"extra": ("--use_fp8_context_fmha=enable",)}, "--use_fp8_context_fmha=enable with --quant fp16"),
    ({"quant": "fp8", "kv_reuse": False, "extra": ("--use_paged_context_fmha=disable",)},
     "--use_fp8_context_fmha=enable needs --use_paged_context_fmha=enable"),
    ({"extra": ("--use_paged_context_fmha=disable",)}, "KV cache reuse needs --use_paged_context_fmha=enable"),
    ({"extra": ("--kv_cache_type=continuous",)}, "--kv_cache_type continuous: in-flight batching needs paged"),
    ({"extra": ("--remove_input_padding=disable",)}, "in-flight batching needs packed input"),
    ({"extra": ("--gpt_attention_plugin=float32",)}, "--gpt_attention_plugin float32: the engine computes in float16"),
    ({"extra": ("--max_beam_width=4",)}, "--max_beam_width 4: captions are decoded greedily"),
    ({"extra": ("--speculative_decoding_mode=medusa",)}, "the caption model sends no draft tokens"),
    ({"extra": ("--gemm_plugins=float16",)}, "trtllm-build has no option '--gemm_plugins'; near it: --gemm"),
    ({"extra": ("--gemm_plugin=half",)}, "trtllm-build --gemm_plugin: expected one of auto, float16"),
    ({"extra": ("--max_num_tokens=many",)}, "trtllm-build --max_num_tokens: expected int, got 'many'"),
    ({"extra": ("--strip_plan=yes",)}, "trtllm-build --strip_plan: takes no value, got 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_a_wrong_plan_is_refused_by_its_own_message(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **change)
    assert not list(tmp_path.glob("engine-*"))


def test_awq_needs_rows_of_whole_groups(tmp_path: Path, captioner: Path) -> None:
    with pytest.raises(ConfigError, match="groups of 128 do not divide a row of 48 or 96"):
        plan(tmp_path, captioner, images=4, quant="awq")


def write_shape(folder: Path, model_type: str, architecture: str) -> Path:
    document = json.loads((SHAPES / LLAVA / "config.json").read_text())
    folder.mkdir()
    document |= {"model_type": model_type, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def test_each_lane_names_the_one_that_can(tmp_path: Path) -> None:
    following = write_shape(tmp_path / "next", "llava_next", "LlavaNextForConditionalGeneration")
    with pytest.raises(ConfigError, match=r"LlavaNextForConditionalGeneration; .* use --lane llmapi"):
        plan(tmp_path, following)
    export = ExportOptions()
    assert llmapi_plan(following, None, tmp_path, export, options()).lane == "llmapi"
    with pytest.raises(ConfigError, match=r"is not among the multimodal models .*; use --lane trtllm, which compiles"):
        llmapi_plan(LLAVA, None, tmp_path, export, options())
    with pytest.raises(ConfigError, match="--quant int8: the LLM API takes a checkpoint that is already quantised"):
        llmapi_plan(following, None, tmp_path, export, options(quant="int8"))
    with pytest.raises(ConfigError, match="--precision is 'fp4'"):
        ExportOptions(precision="fp4")


# --- records ----------------------------------------------------------------------------------------------------------

RECORDS = sorted(path.stem for path in Path("build/records").glob("*.json"))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_names_its_source(name: str) -> None:
    table = load(name)
    assert table["source"]
    for source in table["source"]:
        assert source["file"]
        assert source["version"]
        assert (source["url"] or "https://").startswith("https://")


def test_arguments_are_read_in_both_spellings() -> None:
    assert check_argv("trtllm-build", ["--max_batch_size", "4", "--max_multimodal_len=7", "--dry_run"]) == {
        "--max_batch_size": "4", "--max_prompt_embedding_table_size": "7", "--dry_run": True,
    }  # fmt: skip
    for wrong, message in (
        (["--max_batch_size"], "expected a value"),
        (["--max_batch_size", "--dry_run"], "expected a value"),
        (["--max_batch"], "has no option '--max_batch'"),  # a prefix, which argparse would complete
        (["--dry_run=1"], "takes no value"),
        (["stray"], "has no option 'stray'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_argv("trtllm-build", wrong)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_prints_tables_and_json(tmp_path: Path, captioner: Path) -> None:
    ranker = tiny_ranker(tmp_path / "ranker")
    argv = ["build", "plan", "--lane", "trtllm", "--checkpoint", str(captioner), "--ranker", str(ranker),
            "--gpu", "2xa10", "--images", "4", "--releases", str(tmp_path / "releases")]  # fmt: skip
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    document = json.loads(result.output.splitlines()[-1])
    assert [step["name"] for step in document["steps"]] == ["node", "vision", "decoder", "ranker", "convert", "engine"]
    assert document["budget"]["total"] < document["budget"]["memory"] == 23028 * 2**20
    assert document["target"]["gpus"] == 2
    assert "Memory of the fullest GPU" in result.output
    assert f"of {23028 / 1024:.2f}" in result.output
    assert GIB == 2**30
    assert not (tmp_path / "releases").exists()


def test_own_steps_are_programs(tmp_path: Path, captioner: Path) -> None:
    """The argv that a plan prints is what the build runs: parsed by the same program."""
    ranker = tiny_ranker(tmp_path / "ranker")
    for step in cpu_plan(captioner, ranker, tmp_path, ExportOptions()).steps:
        run_step(step.argv[3:])
        assert any(step.output.iterdir())


def test_the_code_of_exported_graphs_is_part_of_a_step():
    assert all((Path(planning.__file__).parents[1] / name).exists() for name in planning.EXPORTING)
    assert {"trainer/captioner_model.py", "trainer/ranker_model.py"} < set(planning.EXPORTING)
    assert len(planning._own_versions()["code"].split()) == len(planning.EXPORTING)
