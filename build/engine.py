"""An engine's options, its `trtllm-build` arguments, and what must hold between them, the checkpoint and the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.checkpoint import Checkpoint
from build.hardware import Gpu
from build.records import check_argv
from sightline.errors import ConfigError
from sightline.node import TENSORRT_LLM

QUANTS = ("fp16", "bf16", "int8", "int4", "awq", "fp8")
GROUP = 128  # inputs per AWQ scale
# TensorRT-LLM's own default; more tokens per step cost activations and bring little.
NUM_TOKENS = 8192
# Spellings of an own argument that `extra` may use.
ALIASES = {"--max_prompt_embedding_table_size": "--max_multimodal_len", "--max_decoder_seq_len": "--max_seq_len"}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is built for.

    Attributes:
        gpu, gpus: kind, and number for tensor parallelism.
        batch: sequences decoded at once.
        images: images per request; a video counts one per sampled frame.
        quant: of the decoder, one of `QUANTS`.
        kv_dtype: `auto` (the engine's) or `fp8`.
        vision_batch: images that the vision tower takes at once.
        new_tokens: longest caption in tokens; None: the checkpoint's own.
        ensemble_batch: rows per request of the ensemble; None: as many as `batch` and the source allow.
        calibration: samples for AWQ and FP8.
        kv_reuse: keep KV blocks of equal prompts and images.
        dry_run: run `trtllm-build --dry_run` before anything expensive.
        extra: more `trtllm-build` options (`--flag=value`), which replace the plan's own.
    """

    gpu: Gpu
    gpus: int = 1
    batch: int = 16
    images: int = 1
    quant: str = "fp16"
    kv_dtype: str = "auto"
    vision_batch: int = 16
    new_tokens: int | None = None
    ensemble_batch: int | None = None
    calibration: int = 32
    kv_reuse: bool = True
    dry_run: bool = False
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "images", "vision_batch", "calibration"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if self.new_tokens is not None and self.new_tokens < 1:
            raise ConfigError(f"--new-tokens is {self.new_tokens}; expected at least 1")
        if self.quant not in QUANTS:
            raise ConfigError(f"--quant is {self.quant!r}; expected one of {', '.join(QUANTS)}")
        if self.kv_dtype not in ("auto", "fp8"):
            raise ConfigError(f"--kv-dtype is {self.kv_dtype!r}; expected auto or fp8")
        if self.kv_dtype == "fp8" and self.quant not in ("awq", "fp8"):
            raise ConfigError(
                f"--kv-dtype fp8 with --quant {self.quant}: its scales come from calibration, "
                "which only awq and fp8 have; use one of these or --kv-dtype auto"
            )

    @property
    def dtype(self) -> str:
        """Of everything that is not quantised, as TensorRT-LLM spells it."""
        return "bfloat16" if self.quant == "bf16" else "float16"


def limits_of(c: Checkpoint, options: EngineOptions, source_batch: int) -> dict[str, int]:
    """Sizes that bind vision tower, engine and server together."""
    new_tokens = options.new_tokens or c.max_new_tokens
    needed = c.prompt_tokens + options.images * c.image_tokens
    return {
        "batch": options.batch,
        "image_tokens": c.image_tokens,
        "images": options.images,
        "input_tokens": needed,
        "new_tokens": new_tokens,
        "ensemble_batch": options.ensemble_batch or min(options.batch, source_batch),
        "source_batch": source_batch,
    }


def engine_arguments(c: Checkpoint, options: EngineOptions, limits: Mapping[str, int]) -> list[str]:
    """`trtllm-build` arguments without its input and output folders."""
    own = {
        "--gemm_plugin": "fp8" if options.quant == "fp8" else options.dtype,
        "--gpt_attention_plugin": options.dtype,
        "--max_batch_size": options.batch,
        "--max_input_len": limits["input_tokens"],
        "--max_seq_len": limits["input_tokens"] + limits["new_tokens"],
        "--max_num_tokens": max(NUM_TOKENS, limits["input_tokens"]),
        "--max_multimodal_len": options.batch * options.images * c.image_tokens,
        "--kv_cache_type": "paged",
        "--remove_input_padding": "enable",
        "--context_fmha": "enable",
        "--use_paged_context_fmha": "enable",
        "--use_fp8_context_fmha": "enable" if options.quant == "fp8" else "disable",
        "--use_fused_mlp": "enable" if options.quant in ("fp16", "bf16") else "disable",
        "--workers": options.gpus,
        "--log_level": "info",
    }
    for text in options.extra:
        flag = text.partition("=")[0]
        own.pop(ALIASES.get(flag, flag), None)
    return [*(word for flag, value in own.items() for word in (flag, str(value))), *options.extra]


def check_engine(
    c: Checkpoint, options: EngineOptions, limits: Mapping[str, int], arguments: Sequence[str]
) -> dict[str, Any]:
    """Hold the final `trtllm-build` arguments to the recorded options and to what binds them; returns them parsed.

    Raises:
        ConfigError: for the first thing that cannot work.
    """
    a = check_argv("trtllm-build", arguments)
    gpu, gpus, quant = options.gpu, options.gpus, options.quant

    def number(flag: str) -> int:
        return int(a[flag])

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    # what the GPU can do
    require(
        gpu.capability >= (8, 0),
        f"--gpu {gpu.name}: compute capability {_dotted(gpu)}; TensorRT-LLM {TENSORRT_LLM} needs 8.0 (Ampere) or newer",
    )
    require(
        gpu.fp8 or quant != "fp8",
        f"--quant fp8 on {gpu.name}: compute capability {_dotted(gpu)} has no FP8 tensor cores, 8.9 is the first; "
        "use int8 or awq",
    )
    require(
        gpu.fp8 or options.kv_dtype != "fp8",
        f"--kv-dtype fp8 on {gpu.name}: needs compute capability 8.9, this is {_dotted(gpu)}; use auto",
    )
    # what tensor parallelism divides
    for what, size in (("attention heads", c.heads), ("key-value heads", c.kv_heads), ("MLP width", c.intermediate)):
        require(size % gpus == 0, f"{gpus} GPUs do not divide the decoder's {size} {what}; use a divisor of it")
    if quant == "awq":
        require(
            c.hidden % GROUP == 0 and (c.intermediate // gpus) % GROUP == 0,
            f"--quant awq: groups of {GROUP} do not divide a row of {c.hidden} or {c.intermediate // gpus} "
            f"({gpus} GPUs); use int4 or fewer GPUs",
        )
    # lengths
    needed, new = limits["input_tokens"], limits["new_tokens"]
    require(
        number("--max_input_len") >= needed,
        f"--max_input_len {number('--max_input_len')}: the prompt's {c.prompt_tokens} tokens and {options.images} "
        f"images of {c.image_tokens} need {needed}",
    )
    require(
        number("--max_seq_len") >= number("--max_input_len") + new,
        f"--max_seq_len {number('--max_seq_len')}: --max_input_len {number('--max_input_len')} and {new} new tokens "
        f"need {number('--max_input_len') + new}",
    )
    require(
        number("--max_seq_len") <= c.positions,
        f"--max_seq_len {number('--max_seq_len')}: the decoder was trained on {c.positions} positions; "
        "use fewer images, a shorter prompt or fewer new tokens",
    )
    table = number("--max_prompt_embedding_table_size")  # the name under which its alias is recorded
    expected = options.batch * options.images * c.image_tokens
    require(
        table == expected,
        f"--max_multimodal_len {table}: batch {options.batch} x {c.image_tokens} image tokens x {options.images} "
        f"images need exactly {expected}",
    )
    chunked = a.get("--use_paged_context_fmha") == "enable"
    require(
        number("--max_num_tokens") >= (1 if chunked else number("--max_input_len")),
        f"--max_num_tokens {number('--max_num_tokens')}: below --max_input_len {number('--max_input_len')} a prompt "
        "needs chunked context; set --use_paged_context_fmha=enable or raise it",
    )
    # batches
    require(
        number("--max_batch_size") == options.batch,
        f"--max_batch_size {number('--max_batch_size')}: differs from --batch {options.batch}, for which everything "
        "else is planned; change --batch",
    )
    smallest = min(options.batch, limits["source_batch"])
    require(
        limits["ensemble_batch"] <= smallest,
        f"--ensemble-batch {limits['ensemble_batch']}: an ensemble takes no more rows than its smallest model, "
        f"{smallest} (engine {options.batch}, models around it {limits['source_batch']})",
    )
    # modes that exclude each other
    require(
        a.get("--use_fused_mlp", "disable") == "disable" or quant in ("fp16", "bf16"),
        f"--use_fused_mlp=enable with --quant {quant}: the fused MLP has no quantised form here; disable it",
    )
    fp8_attention = a.get("--use_fp8_context_fmha", "disable") == "enable"
    require(
        not fp8_attention or quant == "fp8",
        f"--use_fp8_context_fmha=enable with --quant {quant}: its scales come from an FP8 checkpoint; use --quant fp8",
    )
    require(
        not fp8_attention or a.get("--use_paged_context_fmha") == "enable",
        "--use_fp8_context_fmha=enable needs --use_paged_context_fmha=enable",
    )
    require(
        a.get("--kv_cache_type") == "paged" and a.get("--paged_kv_cache", "enable") != "disable",
        f"--kv_cache_type {a.get('--kv_cache_type')}: in-flight batching needs paged",
    )
    require(
        a.get("--remove_input_padding") == "enable",
        "--remove_input_padding=disable: in-flight batching needs packed input; enable it",
    )
    require(
        a.get("--gpt_attention_plugin", options.dtype) in ("auto", options.dtype),
        f"--gpt_attention_plugin {a.get('--gpt_attention_plugin')}: the engine computes in {options.dtype}",
    )
    require(
        not options.kv_reuse or a.get("--use_paged_context_fmha") == "enable",
        "KV cache reuse needs --use_paged_context_fmha=enable; enable it or give --no-kv-reuse",
    )
    require(
        int(a.get("--max_beam_width", 1)) == 1,
        f"--max_beam_width {a.get('--max_beam_width')}: captions are decoded greedily, beams only cost memory; use 1",
    )
    require(
        "--speculative_decoding_mode" not in a and not int(a.get("--max_draft_len", 0)),
        "--speculative_decoding_mode: the caption model sends no draft tokens; leave it away",
    )
    return a


def _dotted(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability))


# --- conversion ---------------------------------------------------------------------------------------------------


def convert(examples: str) -> tuple[str, str]:
    return ("python3", f"{examples}/models/core/llama/convert_checkpoint.py")


def convert_arguments(decoder: Path, out: Path, options: EngineOptions) -> list[str]:
    weight_only = {"int8": ["--use_weight_only", "--weight_only_precision", "int8"],
                   "int4": ["--use_weight_only", "--weight_only_precision", "int4"]}.get(options.quant, [])  # fmt: skip
    return ["--model_dir", str(decoder), "--output_dir", str(out), "--dtype", options.dtype,
            "--tp_size", str(options.gpus), "--workers", str(options.gpus), *weight_only]  # fmt: skip


def converter(
    c: Checkpoint, options: EngineOptions, examples: str
) -> tuple[str, Callable[[Path, Path], list[str]]]:
    """Which program makes the TensorRT-LLM checkpoint: its recorded name, and its command line."""
    if options.quant not in ("awq", "fp8"):
        return "convert_checkpoint", lambda decoder, out: [
            *convert(examples), *convert_arguments(decoder, out, options)
        ]  # fmt: skip
    kv = ["--kv_cache_dtype", "fp8"] if options.kv_dtype == "fp8" else []
    group = ["--awq_block_size", str(GROUP)] if options.quant == "awq" else []
    return "quantize", lambda decoder, out: [
        "python3", f"{examples}/quantization/quantize.py", "--model_dir", str(decoder), "--output_dir", str(out),
        "--dtype", options.dtype, "--qformat", {"awq": "int4_awq", "fp8": "fp8"}[options.quant], *group, *kv,
        "--calib_size", str(options.calibration), "--tp_size", str(options.gpus),
    ]  # fmt: skip
