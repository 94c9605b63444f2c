"""The GPU node that releases are built for: its pinned software, and where a release lies on it.

Engines load only with the TensorRT-LLM and on the kind of GPU that they were built with, so these belong together
and change together. 1.2.1 is the last stable TensorRT-LLM that compiles LLaVA-1.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sightline.errors import ReleaseError

if TYPE_CHECKING:
    from sightline.release import Engine

BASE_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
TENSORRT_LLM, TENSORRT, PYTHON = "1.2.1", "10.14.1", "3.12"
# Where the container finds the release, and where it keeps what TensorRT compiles at the first start.
MOUNT, CACHE = "/release", "/var/cache/sightline"


def require_node(engine: Engine, *, capabilities: list[str], tensorrt_llm: str, tensorrt: str) -> None:
    """Refuse an engine that was built for another node.

    Args:
        capabilities: compute capability of each GPU here, e.g. `9.0`.
        tensorrt_llm, tensorrt: versions installed here.

    Raises:
        ReleaseError: names what the engine was built for and what is here.
    """
    rebuild = "build it on this node with `make build-engines LANE=trtllm`"
    if len(capabilities) < engine.gpus or any(c != engine.capability for c in capabilities[: engine.gpus]):
        here = ", ".join(capabilities) or "none"
        raise ReleaseError(
            f"the engine was built for {engine.gpus} x {engine.gpu} (compute capability {engine.capability}), GPUs "
            f"here have {here}; {rebuild}"
        )
    for what, built, here in (
        ("TensorRT-LLM", engine.tensorrt_llm, tensorrt_llm), ("TensorRT", engine.tensorrt, tensorrt)
    ):  # fmt: skip
        if built.split(".")[:3] != here.split(".")[:3]:  # a fourth part counts rebuilds
            raise ReleaseError(f"the engine was built with {what} {built}, here is {here}; {rebuild}")
