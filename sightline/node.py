"""The GPU node that releases are built for: its pinned software, and where a release lies on it.

Engines load only with the TensorRT-LLM and on the kind of GPU that they were built with, so these belong together
and change together. 1.2.1 is the last stable TensorRT-LLM that compiles LLaVA-1.5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sightline.errors import ReleaseError

if TYPE_CHECKING:
    from sightline.release import Engine

BASE_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
TENSORRT_LLM, TENSORRT, PYTHON = "1.2.1", "10.14.1", "3.12"
# Where the container finds the release, and where it keeps what TensorRT compiles at the first start.
MOUNT, CACHE = "/release", "/var/cache/sightline"
# And features and nearline queue, unless they are on a Redis server.
STATE = "/var/lib/sightline"
# For the image's own python3 (`python3 -c`), whose packages this environment does not see; `Node.parse` reads it.
PROBE = """
import json, subprocess, sys
from importlib.metadata import version
smi = "nvidia-smi --query-gpu=name,compute_cap,memory.total --format=csv,noheader,nounits"
said = subprocess.run(smi, shell=True, capture_output=True, text=True)
if said.returncode:
    sys.exit((said.stderr or said.stdout).strip())
gpus = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
print(json.dumps([version("tensorrt_llm"), version("tensorrt"), gpus]))
"""
REBUILD = "build it on this node with `make build-engines LANE=trtllm`"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU: its name for people, compute capability (e.g. `9.0`), memory in MiB, 0 where the driver tells none."""

    name: str
    capability: str
    mib: int


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node has, seen from inside the image: versions, and GPUs in the driver's order."""

    tensorrt_llm: str
    tensorrt: str
    gpus: tuple[Device, ...]

    @classmethod
    def parse(cls, output: str) -> Node:
        """From what `PROBE` printed; lines before its own may be anybody's.

        Raises:
            ReleaseError: its line is not there.
        """
        line = (output.splitlines() or [""])[-1]
        try:
            tensorrt_llm, tensorrt, rows = json.loads(line)
            gpus = [Device(name=name, capability=c, mib=int(mib) if mib.isdigit() else 0) for name, c, mib in rows]
        except ValueError as error:
            raise ReleaseError(f"expected versions and GPUs of this node as JSON, got {line[:200]!r}") from error
        return cls(tensorrt_llm=tensorrt_llm, tensorrt=tensorrt, gpus=tuple(gpus))

    @property
    def capabilities(self) -> list[str]:
        return [gpu.capability for gpu in self.gpus]


def require_node(
    engine: Engine, *, capabilities: list[str], tensorrt_llm: str, tensorrt: str, was: str = "was built",
    remedy: str = REBUILD,
) -> None:  # fmt: skip
    """Refuse an engine that was built, or is planned, for another node.

    Args:
        capabilities: compute capability of each GPU here, e.g. `9.0`.
        tensorrt_llm, tensorrt: versions installed here.
        was, remedy: words of the message: what was done with the engine, what to do now.

    Raises:
        ReleaseError: names what the engine was built for and what is here.
    """
    if len(capabilities) < engine.gpus or any(c != engine.capability for c in capabilities[: engine.gpus]):
        here = ", ".join(capabilities) or "none"
        raise ReleaseError(
            f"the engine {was} for {engine.gpus} x {engine.gpu} (compute capability {engine.capability}), GPUs "
            f"here have {here}; {remedy}"
        )
    for what, built, here in (
        ("TensorRT-LLM", engine.tensorrt_llm, tensorrt_llm), ("TensorRT", engine.tensorrt, tensorrt)
    ):  # fmt: skip
        if built.split(".")[:3] != here.split(".")[:3]:  # a fourth part counts rebuilds
            raise ReleaseError(f"the engine {was} with {what} {built}, here is {here}; {remedy}")
