"""What a lower precision costs, measured on held-out inputs before it is allowed into a release.

FP16: a GPU node runs the ONNX parts through TensorRT in FP16. Where ONNX Runtime has TensorRT, that is measured;
elsewhere a graph converted to FP16, which rounds after every operator as FP16 hardware does and accumulates less
exactly, so its error bounds what to expect. INT8: dynamic quantisation of `score`, which the CPU runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from sklearn.metrics import roc_auc_score

from build.vision_onnx import OUTPUTS
from sightline.errors import ReleaseError
from sightline.words import WordHead

# Relative RMS error of image features and of pooled features. FP16 carries 2^-11 per rounding; random errors of some
# hundred operators in a row stay below one in a hundred, which changes a greedy caption only at ties.
VISION_TOLERANCE = 1e-2
# Largest change of one SCORE, a probability, and loss of AUC where labels are at hand.
SCORE_TOLERANCE = 5e-3
AUC_TOLERANCE = 1e-3

Feed = Mapping[str, NDArray[Any]]


def fp16_vision(path: Path, pixels: NDArray[np.float32], inputs: str, head: WordHead | None = None) -> dict[str, Any]:
    """Error of the vision graph `path` in FP16 on pixels [N, 3, H, W]; `inputs` says what they are.

    With the captioner's `head` also `levels_changed`: the share of word levels, of those that either precision gives
    a frame, that the other does not.

    Raises:
        ReleaseError: an output above `VISION_TOLERANCE`.
    """
    how, session = _fp16(path)
    reference = _session(path)
    squared, total = np.zeros(len(OUTPUTS)), np.zeros(len(OUTPUTS))
    pooled: list[list[NDArray[np.float32]]] = []
    for row in pixels:  # one at a time: activations of a large tower fill memory
        exact, rough = (
            [output.astype(np.float32) for output in one.run(list(OUTPUTS), {"pixel_values": row[None]})]
            for one in (reference, session)
        )
        squared += [float(((ours - theirs) ** 2).sum()) for ours, theirs in zip(rough, exact, strict=True)]
        total += [float((theirs**2).sum()) for theirs in exact]
        pooled.append([exact[1], rough[1]])
    errors = dict(zip(OUTPUTS, np.sqrt(squared / total).tolist(), strict=True))
    for name, error in errors.items():
        if not error <= VISION_TOLERANCE:
            raise ReleaseError(
                f"{path.name}: {name} in FP16 are off by {error:.1%} (relative RMS, {how}), expected at most "
                f"{VISION_TOLERANCE:.1%}; build with --precision fp32"
            )
    found = {"precision": "fp16", "relative_rms": errors, "tolerance": VISION_TOLERANCE, "rows": len(pixels),
             "inputs": inputs, "how": how}  # fmt: skip
    if head is not None:
        levels = [[set(one.items()) for one in head(both)] for both in pooled]
        either = sum(len(exact | rough) for exact, rough in levels)
        found["levels_changed"] = sum(len(exact ^ rough) for exact, rough in levels) / max(1, either)
    return found


def fp16_ranker(folder: Path, feed: Feed, label: NDArray[Any] | None, inputs: str) -> dict[str, Any]:
    """Error of `embed.onnx` and `score.onnx` together in FP16, on rows of their graph inputs.

    Raises:
        ReleaseError: a score moves by more than `SCORE_TOLERANCE`, or AUC falls by more than `AUC_TOLERANCE`.
    """
    how, embed = _fp16(folder / "embed.onnx")
    _, score = _fp16(folder / "score.onnx")
    exact = _scores(_session(folder / "embed.onnx"), _session(folder / "score.onnx"), feed)
    return _judge("FP16", exact, _scores(embed, score, feed), label, SCORE_TOLERANCE) | {
        "precision": "fp16", "inputs": inputs, "how": how,
    }  # fmt: skip


def int8_score(folder: Path, feed: Feed, label: NDArray[Any] | None, inputs: str) -> dict[str, Any]:
    """Replace `score.onnx` by its dynamically quantised form (INT8 weights and activations, FP32 in and out).

    Activations get one scale per batch, so a row's score then depends a little on the rows beside it.

    Raises:
        ReleaseError: AUC falls by more than `AUC_TOLERANCE`; the file is then as it was.
    """
    if label is None:
        raise ReleaseError(
            f"{folder}: --score-int8 needs held-out rows with labels (check.npz of the ranker) to measure its loss of "
            "AUC; train the ranker again"
        )
    quantised = folder / "score.int8.onnx"
    quantize_dynamic(folder / "score.onnx", quantised, weight_type=QuantType.QInt8)
    embed = _session(folder / "embed.onnx")
    exact = _scores(embed, _session(folder / "score.onnx"), feed)
    try:
        result = _judge("INT8", exact, _scores(embed, _session(quantised), feed), label, None)
    except ReleaseError:
        quantised.unlink()
        raise
    quantised.replace(folder / "score.onnx")
    return result | {"precision": "int8", "inputs": inputs, "how": "dynamic quantisation, ONNX Runtime on CPU"}


def _judge(
    what: str, exact: NDArray[Any], rough: NDArray[Any], label: NDArray[Any] | None, tolerance: float | None
) -> dict[str, Any]:
    error = float(np.abs(exact - rough).max())
    found: dict[str, Any] = {"largest_change": error, "tolerance": tolerance, "rows": len(exact)}
    if tolerance is not None and not error <= tolerance:
        raise ReleaseError(
            f"score.onnx: a score changes by {error:.2e} in {what}, expected at most {tolerance:.0e}; "
            "build with --precision fp32"
        )
    if label is not None and 0 < label.sum() < len(label):
        found["auc_loss"] = float(roc_auc_score(label, exact) - roc_auc_score(label, rough))
        found["auc_tolerance"] = AUC_TOLERANCE
        if not found["auc_loss"] <= AUC_TOLERANCE:
            raise ReleaseError(
                f"score.onnx: {what} loses {found['auc_loss']:.4f} of AUC on {len(label)} held-out rows, expected at "
                f"most {AUC_TOLERANCE}; leave it at FP32"
            )
    return found


def _scores(embed: Any, score: Any, feed: Feed) -> NDArray[np.float32]:
    names = [tensor.name for tensor in embed.get_inputs()]
    features = embed.run(["FEATURES"], {name: feed[name] for name in names})[0]
    return np.asarray(score.run(["SCORE"], {"FEATURES": features, "DENSE": feed["DENSE"]})[0], np.float32)[:, 0]


def _session(path: Path | bytes) -> Any:
    source = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def _fp16(path: Path) -> tuple[str, Any]:
    """How FP16 is measured here, and a session that does it."""
    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        options = {"trt_fp16_enable": True}
        return "TensorRT", onnxruntime.InferenceSession(
            str(path), providers=[("TensorrtExecutionProvider", options), "CUDAExecutionProvider"]
        )
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    model = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    if model.ByteSize() > 1_900_000_000:
        raise ReleaseError(f"{path.name}: too large to be converted in memory; build with --precision fp32")
    return "FP16-converted graph, ONNX Runtime on CPU", _session(model.SerializeToString())
