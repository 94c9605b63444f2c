"""Plan → steps → one published release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

from build.execute import execute
from build.gpu_config import write_engine_config, write_onnx_configs
from build.plan import NODE, ExportOptions, Plan, cpu_plan
from build.render import read_config, render
from build.warmup import warm_up, warm_up_decoder
from sightline import __version__, release
from sightline.errors import ReleaseError
from sightline.features import FEATURES
from sightline.media import MediaSpec
from sightline.node import TENSORRT_LLM
from sightline.prompt import CaptionPrompt, captioner_version
from sightline.release import Components, Limits, Manifest
from sightline.tokens import Kind, TokenSpec
from sightline.words import WORDS

SOURCE = Path(__file__).parents[1] / "model_repository"
# What the caption model reads of a captioner folder; weights go to vision_encoder and tensorrt_llm.
CAPTION_FILES = (
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    WORDS,
)
# Token families that read more than a caption (sightline/annotation.py).
ANNOTATED: frozenset[Kind] = frozenset({"semantic", "confidence", "sample"})
# Models of each lane that another lane does not have.
ENGINE_MODELS, LLMAPI_CAPTION = ("vision_encoder", "tensorrt_llm"), "caption_llmapi"
STAND_INS = {"onnxruntime": "onnxruntime (python, CPU)", "tensorrtllm": "tensorrtllm (python, CPU)"}
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "nvidia-pytriton")
PROFILE = ("PROFILE_TOKENS", "PROFILE_WEIGHTS", "PROFILE_NEGATIVE_TOKENS", "PROFILE_NEGATIVE_WEIGHTS")
# Rows of one ranking request that TensorRT optimises `embed` and `score` for.
RANKER_BATCH = 256


def build_release(
    captioner_dir: str | Path,
    ranker_dir: str | Path,
    releases_dir: str | Path,
    *,
    plan: Plan | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> str:
    """Run the plan, by default that of lane `cpu`, put its parts into a model repository, publish it.

    Steps that ran before with the same inputs and versions are not run again. An interrupted or refused build leaves
    what was published as it was.

    Returns:
        The release id.

    Raises:
        ReleaseError: the parts were not made for each other, or an export does not equal its eager model.
    """
    captioner_dir, ranker_dir, releases_dir = Path(captioner_dir), Path(ranker_dir), Path(releases_dir)
    components, ranker = _components(captioner_dir, ranker_dir)
    plan = plan or cpu_plan(captioner_dir, ranker_dir, work_folder(releases_dir), ExportOptions())
    _check_annotations(plan, captioner_dir, ranker_dir)
    parts = execute(plan, progress=progress)
    media, prompt = MediaSpec.from_pretrained(captioner_dir), CaptionPrompt.from_pretrained(captioner_dir)
    with release.staging(releases_dir) as staged:
        models = staged / "model_repository"
        llmapi = plan.lane == "llmapi"
        shutil.copytree(SOURCE, models, ignore=_ignored(llmapi))
        if llmapi:
            (models / LLMAPI_CAPTION).rename(models / "caption")
        for model in models.iterdir():
            (model / "1").mkdir(exist_ok=True)  # Triton wants a version folder of an ensemble, too
        for name in CAPTION_FILES:
            if (captioner_dir / name).exists():
                shutil.copy(captioner_dir / name, models / "caption" / "1" / name)
        frames = plan.options.images if plan.options else media.frames
        own = {"version": components.captioner, "prompt": prompt.template, "video_frames": frames,
               "max_new_tokens": plan.limits.get("new_tokens", prompt.max_new_tokens)}  # fmt: skip
        (models / "caption" / "1" / "sightline.json").write_text(json.dumps(own, indent=2))
        _place_ranker(parts["ranker"], models)
        checks: dict[str, Any] = {"ranker": json.loads((parts["ranker"] / "checks.json").read_text())}
        if NODE in parts:
            checks["node"] = json.loads((parts[NODE] / "node.json").read_text())
        dims = _ranker_dims(models, ranker)
        if llmapi:
            _link(captioner_dir, models / "caption" / "1" / "checkpoint")
        else:
            vision = json.loads((parts["vision"] / "vision.json").read_text())
            checks["vision_encoder"] = {key: vision[key] for key in ("error", "check")}
            dims |= _place_captioner(plan, parts, vision, models, media, prompt, frames)
        configs = {path.parent.name: render(path, dims) for path in models.glob("*/config.pbtxt")}
        batch = plan.limits.get("ensemble_batch", configs["rank_media"].max_batch_size)
        batches = {"caption": batch, "rank_media": batch}
        if plan.lane == "trtllm":
            batches["vision_encoder"] = plan.options.vision_batch
        for model, rows in batches.items():
            configs[model] = render(models / model / "config.pbtxt", {}, max_batch_size=rows)
        render(models / "caption" / "config.pbtxt", {}, _caption_parameters(plan, configs))
        if not llmapi:
            render(models / "retrieve" / "config.pbtxt", {}, _caption_parameters(plan, configs))
        entries = [models / model / "config.pbtxt" for model in ("rank_media", "rank_items")]
        for entry in entries:
            render(entry, {}, {"context": json.dumps(ranker["context"])})
        _write_gpu_configs(plan, models)
        warm_up(models, [name for name in ("tokenize", "embed", "score", "vision_encoder") if name in configs])
        if not llmapi:
            warm_up_decoder(models, prompt, vision["tokens"])
        for path in staged.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a server may run as somebody else
        backends = {config.backend for config in configs.values()}
        identity = release.release_id(plan.lane, staged)
        for entry in entries:
            render(entry, {}, {"release": identity})
        manifest = Manifest(
            release=identity, created_at=datetime.now(UTC), lane=plan.lane, components=components,
            stand_ins=[name for backend, name in STAND_INS.items() if backend in backends],
            limits=Limits(
                batch_size=batch, media_bytes=media.max_bytes, media_pixels=media.max_pixels,
                video_frames=frames, caption_tokens=own["max_new_tokens"],
            ),
            engine=plan.engine, checks=checks,
            built_with={"sightline": __version__} | {package: version(package) for package in PACKAGES},
            files=release.hash_files(staged),
        )  # fmt: skip
        (staged / release.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        progress(f"publishing {identity}")
        return release.publish(staged, releases_dir)


def work_folder(releases_dir: Path) -> Path:
    """Where steps keep their outputs: beside the releases, so that large files can be linked and not copied."""
    return releases_dir.parent / "build"


def source_batch() -> int:
    """Rows that the ensemble takes around the decoder: the smallest `max_batch_size` of its steps and its own."""
    ensemble = read_config(SOURCE / "rank_media" / "config.pbtxt")
    steps = (read_config(SOURCE / step.model_name / "config.pbtxt") for step in ensemble.ensemble_scheduling.step)
    return min(config.max_batch_size for config in (ensemble, *steps))


def _ignored(llmapi: bool) -> Callable[[Any, list[str]], set[str]]:
    others = ("caption", *ENGINE_MODELS, "retrieve") if llmapi else (LLMAPI_CAPTION,)

    def ignored(folder: Any, names: list[str]) -> set[str]:
        top = Path(folder) == SOURCE
        return {name for name in names if name == "__pycache__" or (top and name in others)}

    return ignored


def _link(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where the file system can: engines and decoders take gigabytes."""

    def link(one: str, other: str) -> None:
        try:
            Path(other).hardlink_to(one)
        except OSError:
            shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns("step.json"))


def _components(captioner_dir: Path, ranker_dir: Path) -> tuple[Components, dict[str, Any]]:
    """Versions of the parts, and `ranker.json`; the ranker must have been trained with exactly these."""
    if not (ranker_dir / "ranker.json").exists():
        raise ReleaseError(
            f"{ranker_dir}: expected the folder of a ranker with ranker.json; make one with `sightline train ranker`, "
            "or give another --ranker"
        )
    captioner = captioner_version(captioner_dir)
    ranker = _read_json(ranker_dir / "ranker.json")
    spec = TokenSpec.load(ranker_dir / "token_spec.json")
    for what, got, expected in (
        ("captioner_version", captioner, ranker["captioner_version"]),
        ("token_spec_version", spec.version, ranker["token_spec_version"]),
        ("token_length", spec.length, ranker["token_length"]),
    ):
        if got != expected:
            raise ReleaseError(
                f"{ranker_dir}/ranker.json: trained with {what} {expected!r}, this build has {got!r}; "
                "a release holds only parts that were made for each other"
            )
    return Components(captioner=captioner, token_spec=spec.version, ranker=ranker["version"]), ranker


def _check_annotations(plan: Plan, captioner_dir: Path, ranker_dir: Path) -> None:
    """What the ranker's tokens are made of must be there when it is served, too."""
    kinds = {family.kind for family in TokenSpec.load(ranker_dir / "token_spec.json").families}
    served = {"confidence"} if plan.lane != "llmapi" and (captioner_dir / WORDS).exists() else set()
    if missing := ", ".join(sorted((ANNOTATED & kinds) - served)):
        raise ReleaseError(
            f"{ranker_dir}/token_spec.json: its families {missing} read what this release would not answer. It "
            f"answers confidences, in lanes cpu and trtllm, if the captioner has {WORDS}, as one trained from scratch "
            "does; train a ranker without these families, or take such a captioner and lane"
        )


def _place_captioner(
    plan: Plan, parts: Mapping[str, Path], vision: Mapping[str, Any], models: Path, media: MediaSpec,
    prompt: CaptionPrompt, frames: int,
) -> dict[str, Sequence[int]]:  # fmt: skip
    """Vision tower, decoder of the CPU backend and, where there is one, engine. Returns their tensors' sizes."""
    c = plan.checkpoint
    _link(parts["vision"], models / "vision_encoder" / "1" / "vision")
    for path in (models / "vision_encoder" / "1" / "vision").glob("model.onnx*"):
        path.rename(path.parents[1] / path.name)
    shutil.rmtree(models / "vision_encoder" / "1" / "vision")
    _link(parts["decoder"], models / "tensorrt_llm" / "1" / "decoder")
    if (vision["height"], vision["width"]) != media.size:
        raise ReleaseError(
            f"{c.folder}/preprocessor_config.json: frames of {media.size}, but the vision tower "
            f"takes {(vision['height'], vision['width'])}"
        )
    longest = len(prompt.ids(frames * vision["tokens"])) + prompt.max_new_tokens
    if longest > c.positions:
        raise ReleaseError(
            f"{c.folder}/sightline.json: a video of {frames} frames, the prompt and the "
            f"caption take {longest} positions, the language model has "
            f"{c.positions}; lower video_frames or max_new_tokens"
        )
    if "engine" in parts:
        check_built_engine(parts["engine"], plan)
        _link(parts["engine"], models / "tensorrt_llm" / "1" / "engine")
    return {
        "pixel_values": [3, vision["height"], vision["width"]],
        "image_features": [vision["tokens"], vision["hidden"]],
        "pooled_features": [vision["pooled"]],
        "VECTOR": [vision["pooled"]],
        "prompt_embedding_table": [-1, c.hidden],
    }


def check_built_engine(folder: Path, plan: Plan) -> None:
    """Hold what trtllm-build wrote to the plan.

    Raises:
        ReleaseError: another version, a missing rank, or other limits than planned.
    """
    assert plan.options is not None
    config = _read_json(folder / "config.json")
    if config.get("version") != TENSORRT_LLM:
        raise ReleaseError(
            f"{folder}/config.json: built by TensorRT-LLM {config.get('version')}, expected {TENSORRT_LLM}"
        )
    ranks = [f"rank{rank}.engine" for rank in range(plan.options.gpus)]
    missing = [name for name in ranks if not (folder / name).exists()]
    if missing:
        raise ReleaseError(f"{folder}: trtllm-build left no {', '.join(missing)}; its log is {folder}.log")
    built = config.get("build_config", {})
    planned = {**plan.limits, "max_batch_size": plan.options.batch}
    for name in ("max_batch_size", "max_input_len", "max_seq_len"):
        wanted = planned[name]
        if built.get(name) != wanted:
            raise ReleaseError(f"{folder}/config.json: {name} is {built.get(name)}, the plan has {wanted}")


def _caption_parameters(plan: Plan, configs: Mapping[str, Any]) -> dict[str, str]:
    if plan.lane != "llmapi":
        return {"vision_encoder_max_batch_size": str(configs["vision_encoder"].max_batch_size)}
    assert plan.options is not None
    return {
        "tensor_parallel_size": str(plan.options.gpus), "dtype": plan.options.dtype,
        "kv_cache_dtype": plan.options.kv_dtype,
    }  # fmt: skip


def _write_gpu_configs(plan: Plan, models: Path) -> None:
    batches = {"embed": RANKER_BATCH, "score": RANKER_BATCH}
    if plan.lane != "llmapi":
        batches["vision_encoder"] = plan.options.vision_batch if plan.options else 8
    write_onnx_configs(models, batches, plan.export.precision)
    if plan.lane == "trtllm":
        write_engine_config(models, plan)


def _place_ranker(part: Path, models: Path) -> None:
    for model in ("embed", "score"):
        shutil.copy(part / f"{model}.onnx", models / model / "1" / "model.onnx")
    shutil.copy(part / "token_spec.json", models / "tokenize" / "1")
    for name in ("ranker.json", "token_spec.json"):
        shutil.copy(part / name, models / "events" / "1")
    for model in ("lookup", "rank_items"):
        for name in ("ranker.json", "users.parquet", "items.parquet"):
            shutil.copy(part / name, models / model / "1")
    for graph in ("items.onnx", "rank.onnx"):
        shutil.copy(part / graph, models / "rank_items" / "1")
    shutil.copytree(part / FEATURES, models.parent / FEATURES)


def _ranker_dims(models: Path, ranker: dict[str, Any]) -> dict[str, Sequence[int]]:
    """Sizes from the exported graphs, held against `ranker.json` and the user table."""
    dims: dict[str, Sequence[int]] = {}
    for model in ("embed", "score"):
        path = models / model / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        served = {tensor.name for tensor in read_config(models / model / "config.pbtxt").input}
        if unserved := {tensor.name for tensor in session.get_inputs()} - served:
            raise ReleaseError(
                f"{model}.onnx takes {', '.join(sorted(unserved))}, which nothing in the ensemble makes; a ranker with "
                "item_vector is for comparisons, build a release from one without"
            )
        for tensor in (*session.get_inputs(), *session.get_outputs()):
            exact = tensor.shape[1:]
            if dims.setdefault(tensor.name, exact) != exact:
                raise ReleaseError(
                    f"{model}.onnx: {tensor.name} is {exact}, embed.onnx gives {dims[tensor.name]}"
                )
    length = ranker["profile"]["length"]
    for tensor, source, expected in (
        ("CONTEXT", "ranker.json: context", len(ranker["context"])),
        ("ITEM_TOKENS", "ranker.json: token_length", ranker["token_length"]),
        *((name, "ranker.json: profile length", length) for name in PROFILE),
        ("DENSE", "ranker.json: dense", len(ranker["dense"])),
    ):
        if list(dims[tensor]) != [expected]:
            raise ReleaseError(
                f"{source} is {expected} long, the exported graphs take {tensor} {list(dims[tensor])}"
            )
    return dims


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{path}: expected a JSON object: {error}") from error
    return content
