"""Vision tower and projector of a LLaVA checkpoint → ONNX, checked against the eager model."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import LlavaForConditionalGeneration

from sightline.errors import ReleaseError
from trainer.captioner_model import Encoder

# Relative to the features' RMS: FP32 sums in another order, across ~24 layers, stay an order of magnitude below.
TOLERANCE = 1e-4
OUTPUTS = ("image_features", "pooled_features")


@dataclass(frozen=True, kw_only=True)
class VisionDims:
    """Sizes of the graph.

    pixel_values FP32 [N, 3, height, width] → image_features FP32 [N, tokens, hidden], pooled_features FP32 [N, pooled].

    `error`: largest difference from the eager model, over the features' RMS; of both outputs the larger one.
    """

    height: int
    width: int
    tokens: int
    hidden: int
    pooled: int
    error: float


def export_vision(captioner_dir: Path, path: Path) -> VisionDims:
    """Write `path` (ONNX, dynamic batch) from a LLaVA folder and hold it to the eager model.

    Raises:
        ReleaseError: one of the ONNX graph's outputs differs from the eager model's by more than 1e-4 of its RMS.
    """
    model = LlavaForConditionalGeneration.from_pretrained(captioner_dir, dtype=torch.float32).eval()
    encoder = Encoder(model)
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    # Weights go into the one file unless protobuf's limit of 2 GiB forbids it.
    external = sum(p.numel() * p.element_size() for p in encoder.parameters()) > 1_900_000_000
    # The exporter warns and logs about its own internals (torchvision absent, …): not ours to act on.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder, (pixels,), path, input_names=["pixel_values"], output_names=list(OUTPUTS),
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
            external_data=external,
        )  # fmt: skip
    with torch.inference_mode():
        # A batch of another size than the traced one, so that a frozen batch dimension cannot pass.
        probe = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
        eager = [output.numpy() for output in encoder(probe)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exported = session.run(list(OUTPUTS), {"pixel_values": probe.numpy()})
    errors = {
        name: float(np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2)))
        for name, ours, theirs in zip(OUTPUTS, exported, eager, strict=True)
    }
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ReleaseError(
                f"{path.name}: exported {name} differ from the eager model by {error:.2e} of their RMS, "
                f"expected at most {TOLERANCE:.0e}; this is a bug in the export"
            )
    tokens, hidden = eager[0].shape[1:]
    return VisionDims(
        height=side, width=side, tokens=tokens, hidden=hidden, pooled=eager[1].shape[1], error=max(errors.values())
    )
