"""Engine plans: what a build will run, and whether it can work, said before any GPU time is spent.

    sightline build plan --lane trtllm --checkpoint DIR --gpu h200 --batch 16 --quant fp16

A plan is a list of steps. Each step's key is a hash of what it does, of its versions and of its sources, so its
output folder is known beforehand, and a step whose folder exists need not run again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from build.budget import Budget, engine_budget
from build.checkpoint import Checkpoint
from build.hardware import Gpu
from build.records import check_argv, load
from sightline import __version__
from sightline.errors import ConfigError
from sightline.node import BASE_IMAGE, TENSORRT_LLM

LANES = ("cpu", "trtllm", "llmapi")
QUANTS = ("fp16", "bf16", "int8", "int4", "awq", "fp8")
ENGINE_ARCHITECTURE = "LlavaForConditionalGeneration"
GROUP = 128  # inputs per AWQ scale
# TensorRT-LLM's own default; more tokens per step cost activations and bring little.
NUM_TOKENS = 8192
LENGTHS = {"max_input_len": "--max_input_len", "max_seq_len": "--max_seq_len", "max_num_tokens": "--max_num_tokens"}
# Spellings of an own argument that `extra` may use.
ALIASES = {"--max_prompt_embedding_table_size": "--max_multimodal_len", "--max_decoder_seq_len": "--max_seq_len"}
LARGE = 2**26  # bytes; files above are hashed once and remembered
# Versions that change what an own step writes.
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "torchrec")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How the ONNX parts are made.

    Attributes:
        precision: of vision_encoder, embed and score on a GPU node, `fp16` (checked) or `fp32`.
        score_int8: quantise `score` dynamically, on every machine.
    """

    precision: str = "fp16"
    score_int8: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", "fp32"):
            raise ConfigError(f"--precision is {self.precision!r}; expected fp16 or fp32")

    @property
    def flags(self) -> tuple[str, ...]:
        """Of `build.steps`."""
        return "--precision", self.precision


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


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program of a build.

    Attributes:
        name: unique in its plan.
        argv: what runs, with real paths.
        where: `here` (this environment) or `container` (TensorRT-LLM's).
        inputs, output: folders read, folder written.
        env: set beside the environment.
        key: hash of everything that decides the output; None: runs every time.
    """

    name: str
    argv: tuple[str, ...]
    where: Literal["here", "container"]
    inputs: tuple[Path, ...]
    output: Path
    env: Mapping[str, str] = field(default_factory=dict)
    key: str | None

    def command(self) -> str:
        """As a shell would take it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of one release, checked.

    Attributes:
        lane: one of `LANES`.
        steps: in order.
        work: folder of the steps' outputs.
        options, budget, limits: None or empty where the lane builds no engine.
        notes: what the reader of the plan should know.
    """

    lane: str
    steps: tuple[Step, ...]
    work: Path
    checkpoint: Checkpoint
    export: ExportOptions
    options: EngineOptions | None = None
    budget: Budget | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)


# --- own steps, the same in every lane ----------------------------------------------------------------------


class _Steps:
    """Collects steps, each keyed by its own command and by the keys of what it reads."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()  # a container sees the same paths, and has another working folder
        self.steps: list[Step] = []
        self._keys: dict[Path, str] = {}

    def add(
        self, name: str, argv: Callable[[Path], Sequence[str]], inputs: Sequence[Path], *,
        where: Literal["here", "container"] = "here", env: Mapping[str, str] | None = None,
    ) -> Path:  # fmt: skip
        """Append a step; `argv` gets its output folder, which is returned."""
        env = dict(env or {})
        versions = _own_versions() if where == "here" else {"container": BASE_IMAGE, "tensorrt_llm": TENSORRT_LLM}
        placeholders = {str(path): f"<{self._key(path)}>" for path in inputs}
        words = [placeholders.get(word, word) for word in argv(Path("<output>"))]
        identity = [name, words, sorted(placeholders.values()), sorted(env.items()), sorted(versions.items())]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        output = self.work / f"{name}-{key}"
        self._keys[output] = key
        self.steps.append(
            Step(
                name=name, argv=tuple(argv(output)), where=where, inputs=tuple(inputs), output=output, env=env, key=key
            )
        )  # fmt: skip
        return output

    def _key(self, path: Path) -> str:
        """Of a step's output: its key. Of a source folder: a hash of its files."""
        if path not in self._keys:
            self._keys[path] = hash_folder(path, self.work / "hashes.json")
        return self._keys[path]


def hash_folder(folder: Path, remember: Path | None = None) -> str:
    """Hash of the names and contents of a folder's files (of a file: of its content), 16 digits.

    With `remember`, a JSON file, large files whose size and time of change are known there are not read again.
    """
    known: dict[str, str] = {}
    if remember is not None and remember.exists():
        known = json.loads(remember.read_text())
    before = len(known)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if not path.is_file():
            continue
        stat = path.stat()
        identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        content = known.get(identity)
        if content is None:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            if stat.st_size > LARGE:
                known[identity] = content
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    if remember is not None and len(known) > before:
        remember.parent.mkdir(parents=True, exist_ok=True)
        remember.write_text(json.dumps(known, indent=1))
    return digest.hexdigest()[:16]


def _own_versions() -> dict[str, str]:
    """Versions of the packages, and of the exporting code itself."""
    packages = {package: version(package) for package in PACKAGES}
    return {"sightline": __version__, "code": hash_folder(Path(__file__).parent)} | packages


def _own(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "build.steps", *words)


def _add_vision(steps: _Steps, checkpoint: Path, export: ExportOptions) -> Path:
    return steps.add(
        "vision", lambda out: _own("vision", str(checkpoint), str(out), *export.flags), [checkpoint]
    )


def _add_decoder(steps: _Steps, checkpoint: Path) -> Path:
    return steps.add("decoder", lambda out: _own("decoder", str(checkpoint), str(out)), [checkpoint])


def _add_ranker(steps: _Steps, ranker: Path | None, export: ExportOptions) -> None:
    if ranker is not None:
        ranker = ranker.resolve()
        int8 = ("--score-int8",) * export.score_int8
        steps.add("ranker", lambda out: _own("ranker", str(ranker), str(out), *export.flags, *int8), [ranker])


# --- lanes ----------------------------------------------------------------------------------------------------


def cpu_plan(checkpoint: str | Path, ranker: Path | None, work: Path, export: ExportOptions) -> Plan:
    """Plan of a release without an engine: exports only."""
    shape = Checkpoint.read(checkpoint)
    steps = _Steps(work)
    _add_vision(steps, shape.folder, export)
    _add_decoder(steps, shape.folder)
    _add_ranker(steps, ranker, export)
    return Plan(
        lane="cpu", steps=tuple(steps.steps), work=work, checkpoint=shape, export=export,
        notes=tuple(_notes(shape, ranker)),
    )  # fmt: skip


def engine_plan(
    checkpoint: str | Path, ranker: Path | None, work: Path, export: ExportOptions, options: EngineOptions, *,
    source_batch: int = 32, examples: str | None = None,
) -> Plan:  # fmt: skip
    """Plan of a release whose decoder is a TensorRT-LLM engine.

    `source_batch` is the largest batch that every model around the decoder takes; `examples` the folder of
    TensorRT-LLM's examples in the container.

    Raises:
        ConfigError: the plan cannot work; the message says why, with the numbers, and what to change.
    """
    c = Checkpoint.read(checkpoint)
    if c.architecture != ENGINE_ARCHITECTURE:
        other = c.architecture in load("llm_api")["multimodal_models"]
        raise ConfigError(
            f"{c.folder}: {c.architecture}; TensorRT-LLM {TENSORRT_LLM}'s engine flow compiles "
            f"{ENGINE_ARCHITECTURE} with a LLaMA decoder here; "
            + ("use --lane llmapi" if other else "no lane compiles it, serve it with --lane cpu")
        )
    limits = _limits(c, options, source_batch)
    arguments = engine_arguments(c, options, limits)
    parsed = check_engine(c, options, limits, arguments)
    budget = engine_budget(
        c, options.gpu, options.gpus, quant=options.quant, kv_dtype=options.kv_dtype, batch=options.batch,
        images=options.images, vision_batch=options.vision_batch, max_num_tokens=int(parsed["--max_num_tokens"]),
        max_seq_len=int(parsed["--max_seq_len"]), ranker_bytes=_size(ranker / "model.pt") if ranker else 0,
    )  # fmt: skip

    steps = _Steps(work)
    _add_vision(steps, c.folder, export)
    decoder = _add_decoder(steps, c.folder)
    _add_ranker(steps, ranker, export)
    folder = examples or load("containers")["examples"]
    program, arguments_of = _converter(c, options, folder)
    check_argv(program, arguments_of(decoder, Path("OUT"))[2:])
    if options.dry_run:
        shape = steps.add(
            "engine-config",
            lambda out: [*_convert(folder), *_convert_arguments(decoder, out, options), "--save_config_only"],
            [decoder], where="container",
        )  # fmt: skip
        steps.add(
            "engine-dry-run",
            lambda out: ["trtllm-build", "--model_config", str(shape / "config.json"), "--output_dir", str(out),
                         *arguments, "--dry_run"],
            [shape], where="container",
        )  # fmt: skip
    converted = steps.add(
        "convert", lambda out: arguments_of(decoder, out), [decoder], where="container"
    )
    steps.add(
        "engine",
        lambda out: ["trtllm-build", "--checkpoint_dir", str(converted), "--output_dir", str(out), *arguments],
        [converted], where="container",
    )  # fmt: skip
    return Plan(
        lane="trtllm", steps=tuple(steps.steps), work=work, checkpoint=c, export=export, options=options,
        budget=budget, limits=limits | {name: int(parsed[flag]) for name, flag in LENGTHS.items()},
        notes=(
            *_notes(c, ranker),
            "The vision tower needs no engine step: Triton's onnxruntime backend compiles vision.onnx with TensorRT "
            "at its first start and keeps the result.",
            *(
                ["Calibration reads a public data set in the container: it needs the network, or --calib_dataset."]
                if options.quant in ("awq", "fp8")
                else []
            ),
        ),
    )  # fmt: skip


def llmapi_plan(
    checkpoint: str | Path, ranker: Path | None, work: Path, export: ExportOptions, options: EngineOptions
) -> Plan:
    """Plan of a release whose captioner runs through TensorRT-LLM's LLM API: nothing is compiled beforehand.

    Raises:
        ConfigError: the LLM API does not list the architecture.
    """
    c = Checkpoint.read(checkpoint)
    models = load("llm_api")["multimodal_models"]
    if c.architecture not in models:
        raise ConfigError(
            f"{c.folder}: {c.architecture} is not among the multimodal models of TensorRT-LLM's LLM API "
            f"({', '.join(sorted(models))})"
            + ("; use --lane trtllm, which compiles it" if c.architecture == ENGINE_ARCHITECTURE else "")
        )
    if options.quant not in ("fp16", "bf16"):
        raise ConfigError(
            f"--quant {options.quant}: the LLM API takes a checkpoint that is already quantised; "
            "give that one as --checkpoint, with --quant fp16 or bf16"
        )
    steps = _Steps(work)
    _add_ranker(steps, ranker, export)
    return Plan(
        lane="llmapi", steps=tuple(steps.steps), work=work, checkpoint=c, export=export, options=options,
        limits=_limits(c, options, options.batch), notes=tuple(_notes(c, ranker)),
    )  # fmt: skip


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _notes(checkpoint: Checkpoint, ranker: Path | None) -> list[str]:
    notes = []
    if not checkpoint.weights:
        notes.append(f"{checkpoint.folder} has no weights: this plan can be read, not run.")
    if ranker is None:
        notes.append("No --ranker: the plan ends before a release is put together.")
    return notes


# --- engine arguments and what must hold between them ---------------------------------------------------------


def _limits(c: Checkpoint, options: EngineOptions, source_batch: int) -> dict[str, int]:
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


def _convert(examples: str) -> tuple[str, str]:
    return ("python3", f"{examples}/models/core/llama/convert_checkpoint.py")


def _convert_arguments(decoder: Path, out: Path, options: EngineOptions) -> list[str]:
    weight_only = {"int8": ["--use_weight_only", "--weight_only_precision", "int8"],
                   "int4": ["--use_weight_only", "--weight_only_precision", "int4"]}.get(options.quant, [])  # fmt: skip
    return ["--model_dir", str(decoder), "--output_dir", str(out), "--dtype", options.dtype,
            "--tp_size", str(options.gpus), "--workers", str(options.gpus), *weight_only]  # fmt: skip


def _converter(
    c: Checkpoint, options: EngineOptions, examples: str
) -> tuple[str, Callable[[Path, Path], list[str]]]:
    """Which program makes the TensorRT-LLM checkpoint: its recorded name, and its command line."""
    if options.quant not in ("awq", "fp8"):
        return "convert_checkpoint", lambda decoder, out: [
            *_convert(examples), *_convert_arguments(decoder, out, options)
        ]  # fmt: skip
    kv = ["--kv_cache_dtype", "fp8"] if options.kv_dtype == "fp8" else []
    group = ["--awq_block_size", str(GROUP)] if options.quant == "awq" else []
    return "quantize", lambda decoder, out: [
        "python3", f"{examples}/quantization/quantize.py", "--model_dir", str(decoder), "--output_dir", str(out),
        "--dtype", options.dtype, "--qformat", {"awq": "int4_awq", "fp8": "fp8"}[options.quant], *group, *kv,
        "--calib_size", str(options.calibration), "--tp_size", str(options.gpus),
    ]  # fmt: skip

