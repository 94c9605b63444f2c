"""Sightline's own build steps, as programs: `python -m build.steps vision|decoder|ranker SOURCE OUT`.

A plan names them by exactly these command lines; a build in the same environment calls `run` with them, which
saves the start of another Python.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from build import precision
from build.decoder import write_decoder
from build.ranker_onnx import example_inputs, export_ranker
from build.vision_onnx import export_vision
from sightline.features import FEATURES
from sightline.lookup import Tables
from sightline.media import MediaSpec
from sightline.store.transfer import count_rows
from sightline.words import WordHead

SYNTHETIC = 8  # seeded random inputs where a folder has no check.npz


def run(argv: Sequence[str]) -> None:
    """Run one step.

    Raises:
        ReleaseError: an export differs from its model, or a lower precision costs too much.
        ConfigError: the captioner's words.npz is not of its vision tower.
    """
    parser = argparse.ArgumentParser(prog="python -m build.steps", description=__doc__)
    parser.add_argument("step", choices=["vision", "decoder", "ranker"])
    parser.add_argument("source", type=Path, help="folder of the captioner or the ranker")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp32", help="on a GPU node; fp16 is checked")
    parser.add_argument("--score-int8", action="store_true", help="quantise score.onnx dynamically")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    if given.step == "decoder":
        write_decoder(given.source, given.out)
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            if (given.source / name).exists():  # calibration reads text
                shutil.copyfile(given.source / name, given.out / name)
    elif given.step == "vision":
        _vision(given.source, given.out, given.precision)
    else:
        _ranker(given.source, given.out, given.precision, int8=given.score_int8)


def _vision(source: Path, out: Path, wanted: str) -> None:
    dims, words = export_vision(source, out / "model.onnx"), WordHead.from_pretrained(source)
    if words is not None:
        words.check(dims.pooled)
    record: dict[str, Any] = {
        "height": dims.height, "width": dims.width, "tokens": dims.tokens, "hidden": dims.hidden,
        "pooled": dims.pooled, "error": dims.error, "check": {"precision": "fp32"},
    }  # fmt: skip
    if wanted == "fp16":
        pixels, inputs = _pixels(source, dims.height, dims.width)
        record["check"] = precision.fp16_vision(out / "model.onnx", pixels, inputs, words)
    (out / "vision.json").write_text(json.dumps(record, indent=1) + "\n")


def _pixels(source: Path, height: int, width: int) -> tuple[NDArray[np.float32], str]:
    """Normalised frames [N, 3, H, W], and what they are."""
    path = source / "check.npz"
    if path.exists() and len(frames := np.load(path)["frames"]):
        spec = MediaSpec.from_pretrained(source)
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        normalised = (frames.astype(np.float32) / 255 - mean) / std
        return normalised.transpose(0, 3, 1, 2), "held-out frames"
    noise = np.random.default_rng(0).normal(size=(SYNTHETIC, 3, height, width)).astype(np.float32)
    return noise, "seeded noise (the folder has no check.npz of held-out frames)"


def _ranker(source: Path, out: Path, wanted: str, *, int8: bool) -> None:
    document = export_ranker(source, out)
    path = source / "check.npz"
    if path.exists():
        with np.load(path) as rows:
            feed = {name: rows[name] for name in rows.files}
        label, inputs = feed.pop("label"), "held-out rows"
    else:
        feed = {name: value.numpy() for name, value in example_inputs(document).items()}
        label, inputs = None, "seeded random rows (the folder has no check.npz)"
    checks: dict[str, Any] = {name: document[name] for name in document if name.endswith("_error")}
    if wanted == "fp16":
        checks["gpu"] = precision.fp16_ranker(out, feed, label, inputs)
    if int8:
        checks["score_int8"] = precision.int8_score(out, feed, label, inputs)
    (out / "ranker.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "checks.json").write_text(json.dumps(checks, indent=1) + "\n")
    for name in ("token_spec.json", "users.parquet", "items.parquet"):
        shutil.copyfile(source / name, out / name)
    shutil.copytree(source / FEATURES, out / FEATURES)
    # The server reads these tables at its start; better no release than one that does not load.
    Tables(out)
    for name in ("items", "users"):
        count_rows(out / FEATURES / f"{name}.parquet")


if __name__ == "__main__":
    import sys

    torch.set_grad_enabled(False)
    run(sys.argv[1:])
