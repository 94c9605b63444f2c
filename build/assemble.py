"""Captioner + ranker → one published release."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import pyarrow.parquet as pq
from transformers.utils import logging as transformers_logging

from build.decoder import write_decoder
from build.ranker_onnx import export_ranker
from build.render import render
from build.vision_onnx import export_vision
from sightline import __version__, release
from sightline.errors import ReleaseError
from sightline.media import MediaSpec
from sightline.prompt import CaptionPrompt
from sightline.release import Components, Limits, Manifest
from sightline.tokens import TokenSpec

SOURCE = Path(__file__).parents[1] / "model_repository"
# What the caption model reads of a captioner folder; weights go to vision_encoder and tensorrt_llm.
CAPTION_FILES = (
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sightline.json",
)
STAND_INS = ["onnxruntime (python, CPU)", "tensorrtllm (python, CPU)"]
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "nvidia-pytriton")


def build_release(
    captioner_dir: str | Path,
    ranker_dir: str | Path,
    releases_dir: str | Path,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> str:
    """Export both parts, put them into a model repository, publish it; returns the release id.

    An interrupted or refused build leaves nothing but what was published before.

    Raises:
        ReleaseError: the parts were not made for each other, or an export does not equal its eager model.
    """
    captioner_dir, ranker_dir, releases_dir = Path(captioner_dir), Path(ranker_dir), Path(releases_dir)
    components, ranker = _components(captioner_dir, ranker_dir)
    media, prompt = MediaSpec.from_pretrained(captioner_dir), CaptionPrompt.from_pretrained(captioner_dir)
    transformers_logging.disable_progress_bar()
    with release.staging(releases_dir) as staged:
        models = staged / "model_repository"
        shutil.copytree(SOURCE, models, ignore=shutil.ignore_patterns("__pycache__"))
        for model in models.iterdir():
            (model / "1").mkdir(exist_ok=True)  # Triton wants a version folder of an ensemble, too
        progress("vision tower and projector → ONNX")
        vision = export_vision(captioner_dir, models / "vision_encoder" / "1" / "model.onnx")
        progress("language model → decoder of the CPU backend")
        decoder = write_decoder(captioner_dir, models / "tensorrt_llm" / "1" / "decoder")
        progress("ranker → ONNX")
        _place_ranker(ranker_dir, models, staged)
        for name in CAPTION_FILES:
            if (captioner_dir / name).exists():
                shutil.copy(captioner_dir / name, models / "caption" / "1" / name)

        dims = _ranker_dims(models, ranker) | {
            "pixel_values": [3, vision.height, vision.width],
            "image_features": [vision.tokens, vision.hidden],
            "prompt_embedding_table": [-1, decoder.hidden_size],
        }
        if (vision.height, vision.width) != media.size:
            raise ReleaseError(
                f"{captioner_dir}/preprocessor_config.json: frames of {media.size}, but the vision tower "
                f"takes {(vision.height, vision.width)}"
            )
        longest = len(prompt.ids(media.frames * vision.tokens)) + prompt.max_new_tokens
        if longest > decoder.max_position_embeddings:
            raise ReleaseError(
                f"{captioner_dir}/sightline.json: a video of {media.frames} frames, the prompt and the "
                f"caption take {longest} positions, the language model has "
                f"{decoder.max_position_embeddings}; lower video_frames or max_new_tokens"
            )
        configs = {path.parent.name: render(path, dims) for path in models.glob("*/config.pbtxt")}
        encoder_batch = configs["vision_encoder"].max_batch_size
        render(models / "caption" / "config.pbtxt", {}, {"vision_encoder_max_batch_size": str(encoder_batch)})
        for path in staged.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # a server may run as somebody else
        ensemble = models / "rank_media" / "config.pbtxt"
        render(ensemble, {}, {"context": json.dumps(ranker["context"])})
        identity = release.release_id("cpu", staged)
        render(ensemble, {}, {"release": identity})
        manifest = Manifest(
            release=identity, created_at=datetime.now(UTC), lane="cpu",
            stand_ins=STAND_INS, components=components,
            limits=Limits(
                batch_size=configs["rank_media"].max_batch_size, media_bytes=media.max_bytes,
                media_pixels=media.max_pixels, video_frames=media.frames,
                caption_tokens=prompt.max_new_tokens,
            ),
            built_with={"sightline": __version__} | {package: version(package) for package in PACKAGES},
            files=release.hash_files(staged),
        )  # fmt: skip
        (staged / release.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        progress(f"publishing {identity}")
        return release.publish(staged, releases_dir)


def _components(captioner_dir: Path, ranker_dir: Path) -> tuple[Components, dict[str, Any]]:
    """Versions of the parts, and `ranker.json`; the ranker must have been trained with exactly these."""
    captioner = _read_json(captioner_dir / "sightline.json").get("version")
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


def _place_ranker(ranker_dir: Path, models: Path, staged: Path) -> None:
    exports = staged / "exports"
    exports.mkdir()
    export_ranker(ranker_dir, exports)
    for model in ("embed", "score"):
        (exports / f"{model}.onnx").rename(models / model / "1" / "model.onnx")
    shutil.rmtree(exports)
    shutil.copy(ranker_dir / "token_spec.json", models / "tokenize" / "1")
    for table in ("users.parquet", "items.parquet"):
        shutil.copy(ranker_dir / table, models / "lookup" / "1")


def _ranker_dims(models: Path, ranker: dict[str, Any]) -> dict[str, Sequence[int]]:
    """Sizes from the exported graphs, held against `ranker.json` and the user table."""
    dims: dict[str, Sequence[int]] = {}
    for model in ("embed", "score"):
        path = models / model / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for tensor in (*session.get_inputs(), *session.get_outputs()):
            exact = tensor.shape[1:]
            if dims.setdefault(tensor.name, exact) != exact:
                raise ReleaseError(
                    f"{model}.onnx: {tensor.name} is {exact}, embed.onnx gives {dims[tensor.name]}"
                )
    row = pq.read_table(models / "lookup" / "1" / "users.parquet").slice(0, 1).to_pylist()[0]
    for tensor, source, expected in (
        ("CONTEXT", "ranker.json: context", len(ranker["context"])),
        ("ITEM_TOKENS", "ranker.json: token_length", ranker["token_length"]),
        ("PROFILE_TOKENS", "users.parquet: profile_tokens", len(row["profile_tokens"])),
        ("PROFILE_WEIGHTS", "users.parquet: profile_weights", len(row["profile_weights"])),
        ("DENSE", "users.parquet: dense", len(row["dense"])),
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
