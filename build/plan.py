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
from typing import Literal

from build.budget import Budget, engine_budget
from build.checkpoint import Checkpoint
from build.engine import (
    EngineOptions,
    check_engine,
    convert,
    convert_arguments,
    converter,
    engine_arguments,
    limits_of,
)  # fmt: skip
from build.records import check_argv, load
from sightline import __version__
from sightline.errors import ConfigError
from sightline.node import BASE_IMAGE, PROBE, TENSORRT, TENSORRT_LLM
from sightline.release import Engine

LANES = ("cpu", "trtllm", "llmapi")
ENGINE_ARCHITECTURE = "LlavaForConditionalGeneration"
LENGTHS = {"max_input_len": "--max_input_len", "max_seq_len": "--max_seq_len", "max_num_tokens": "--max_num_tokens"}
LARGE = 2**26  # bytes; files above are hashed once and remembered
# Versions that change what an own step writes.
EXPORTING = ("build", "trainer/captioner_model.py", "trainer/ranker_model.py",
             "trainer/item_graphs.py")  # what the exported graphs come from  # fmt: skip
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "torchrec")
# The step that looks at the node: the engine is for what stands in the plan.
NODE = "node"
# The user that a container step runs as has no home of its own in the image.
CONTAINER_ENV = {"HOME": "/tmp"}


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
class Step:
    """One program of a build.

    Attributes:
        name: unique in its plan.
        argv: what runs, with real paths.
        where: `here` (this environment) or `container` (TensorRT-LLM's).
        inputs, output: folders read, folder written.
        env: set beside the environment.
        key: hash of everything that decides the output.
    """

    name: str
    argv: tuple[str, ...]
    where: Literal["here", "container"]
    inputs: tuple[Path, ...]
    output: Path
    env: Mapping[str, str] = field(default_factory=dict)
    key: str

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
        options, budget, limits, engine: None or empty where the lane builds no engine.
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
    engine: Engine | None = None
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
        where: Literal["here", "container"] = "here", target: str = "",
    ) -> Path:  # fmt: skip
        """Append a step; `argv` gets its output folder, which is returned. `target`: what else decides the output."""
        env = CONTAINER_ENV if where == "container" else {}
        versions = _own_versions() if where == "here" else {"container": BASE_IMAGE, "tensorrt_llm": TENSORRT_LLM}
        placeholders = {str(path): f"<{self._key(path)}>" for path in inputs}
        words = [placeholders.get(word, word) for word in argv(Path("<output>"))]
        identity = [name, words, sorted(placeholders.values()), sorted(env.items()), sorted(versions.items()), target]
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
        if not path.is_file() or "__pycache__" in path.parts:
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
    root = Path(__file__).parents[1]
    return {"sightline": __version__, "code": " ".join(hash_folder(root / name) for name in EXPORTING)} | packages


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
        if not (ranker / "ranker.json").exists():
            raise ConfigError(
                f"--ranker {ranker}: expected a folder with ranker.json; make one with `sightline train ranker`"
            )
        ranker = ranker.resolve()
        int8 = ("--score-int8",) * export.score_int8
        steps.add("ranker", lambda out: _own("ranker", str(ranker), str(out), *export.flags, *int8), [ranker])


# --- lanes ----------------------------------------------------------------------------------------------------


def cpu_plan(checkpoint: str | Path, ranker: Path | None, work: Path, export: ExportOptions) -> Plan:
    """Plan of a release without an engine: exports only."""
    shape = _read(checkpoint)
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
    c = _read(checkpoint)
    if c.architecture != ENGINE_ARCHITECTURE:
        other = c.architecture in load("llm_api")["multimodal_models"]
        raise ConfigError(
            f"{c.folder}: {c.architecture}; TensorRT-LLM {TENSORRT_LLM}'s engine flow compiles "
            f"{ENGINE_ARCHITECTURE} with a LLaMA decoder here; "
            + ("use --lane llmapi" if other else "no lane compiles it, serve it with --lane cpu")
        )
    limits = limits_of(c, options, source_batch)
    arguments = engine_arguments(c, options, limits)
    parsed = check_engine(c, options, limits, arguments)
    budget = engine_budget(
        c, options.gpu, options.gpus, quant=options.quant, kv_dtype=options.kv_dtype, batch=options.batch,
        images=options.images, vision_batch=options.vision_batch, max_num_tokens=int(parsed["--max_num_tokens"]),
        max_seq_len=int(parsed["--max_seq_len"]), ranker_bytes=_size(ranker / "model.pt") if ranker else 0,
    )  # fmt: skip

    engine = Engine(
        gpu=options.gpu.name, gpus=options.gpus, capability=".".join(map(str, options.gpu.capability)),
        tensorrt_llm=TENSORRT_LLM, tensorrt=TENSORRT, quantization=options.quant, dtype=options.dtype,
        max_batch_size=options.batch, max_input_len=int(parsed["--max_input_len"]),
        max_seq_len=int(parsed["--max_seq_len"]), images=options.images,
    )  # fmt: skip

    steps = _Steps(work)
    # First, so that a build on another node ends before it costs anything.
    node = steps.add(
        NODE, lambda out: ["python3", "-c", PROBE], [], where="container", target=f"{engine.gpus} x {engine.gpu}"
    )
    _add_vision(steps, c.folder, export)
    decoder = _add_decoder(steps, c.folder)
    _add_ranker(steps, ranker, export)
    folder = examples or load("containers")["examples"]
    program, arguments_of = converter(c, options, folder)
    check_argv(program, arguments_of(decoder, Path("OUT"))[2:])
    if options.dry_run:
        shape = steps.add(
            "engine-config",
            lambda out: [*convert(folder), *convert_arguments(decoder, out, options), "--save_config_only"],
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
        [converted, node], where="container",
    )  # fmt: skip
    return Plan(
        lane="trtllm", steps=tuple(steps.steps), work=work, checkpoint=c, export=export, options=options,
        engine=engine, budget=budget, limits=limits | {name: int(parsed[flag]) for name, flag in LENGTHS.items()},
        notes=(
            *_notes(c, ranker),
            "The vision tower needs no engine step: Triton's onnxruntime backend compiles vision.onnx with TensorRT "
            "at its first start and keeps the result.",
            *(
                ["Calibration reads a public data set in the container: it needs the network."]
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
    c = _read(checkpoint)
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
        limits=limits_of(c, options, options.batch), notes=tuple(_notes(c, ranker)),
    )  # fmt: skip


def _read(checkpoint: str | Path) -> Checkpoint:
    try:
        return Checkpoint.read(checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--checkpoint {checkpoint}: one of its files cannot be read: {error}") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _notes(checkpoint: Checkpoint, ranker: Path | None) -> list[str]:
    notes = []
    if not checkpoint.weights:
        notes.append(f"{checkpoint.folder} has no weights: this plan can be read, not run.")
    if ranker is None:
        notes.append("No --ranker: the plan ends before a release is put together.")
    return notes
