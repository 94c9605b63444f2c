"""Vision tower and projector of a LLaVA checkpoint → ONNX, checked against the eager model."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from sightline.errors import ReleaseError

# Relative to the features' RMS: FP32 sums in another order, across ~24 layers, stay an order of magnitude below.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class VisionDims:
    """Sizes of the graph: pixel_values FP32 [N, 3, height, width] → image_features [N, tokens, hidden].

    `error`: largest difference from the eager model, over the features' RMS.
    """

    height: int
    width: int
    tokens: int
    hidden: int
    error: float


class Encoder(nn.Module):
    """`LlavaForConditionalGeneration.get_image_features` as one module: pixels [N, 3, H, W] → [N, P, D]."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        layer = model.config.vision_feature_layer
        self.layers: list[int] = [layer] if isinstance(layer, int) else list(layer)
        self.drop_class_token = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The tower's chosen hidden states, projected; without class token where the checkpoint says so."""
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[layer][:, 1:] if self.drop_class_token else states[layer] for layer in self.layers]
        features: Tensor = self.projector(torch.cat(chosen, dim=-1))
        return features


def export_vision(captioner_dir: Path, path: Path) -> VisionDims:
    """Write `path` (ONNX, dynamic batch) from a LLaVA folder and hold it to the eager model.

    Raises:
        ReleaseError: the ONNX graph's features differ from the eager model's by more than 1e-4 of their RMS.
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
            encoder, (pixels,), path, input_names=["pixel_values"], output_names=["image_features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
            external_data=external,
        )  # fmt: skip
    with torch.inference_mode():
        # A batch of another size than the traced one, so that a frozen batch dimension cannot pass.
        probe = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
        eager = encoder(probe).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exported = session.run(["image_features"], {"pixel_values": probe.numpy()})[0]
    error = float(np.abs(exported - eager).max() / np.sqrt(np.mean(eager**2)))
    if not error <= TOLERANCE:
        raise ReleaseError(
            f"{path.name}: exported image features differ from the eager model by {error:.2e} of their RMS, "
            f"expected at most {TOLERANCE:.0e}; this is a bug in the export"
        )
    return VisionDims(height=side, width=side, tokens=eager.shape[1], hidden=eager.shape[2], error=error)
