"""GPUs that a plan can be made for, with what a plan needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

from sightline.errors import ConfigError

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        capability: compute capability; an engine runs on this one only.
        memory: bytes that the driver reports as total (nvidia-smi), error correction on.
        bandwidth: of its memory, bytes per second (data sheet).
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float

    @property
    def bf16(self) -> bool:
        """Tensor cores for bfloat16 came with Ampere."""
        return self.capability >= (8, 0)

    @property
    def fp8(self) -> bool:
        """Tensor cores for FP8 came with Ada and Hopper."""
        return self.capability >= (8, 9)


# Name → compute capability, MiB in nvidia-smi, GB/s in NVIDIA's data sheet.
_FACTS = {
    "t4": ((7, 5), 15360, 320),
    "a10": ((8, 6), 23028, 600),
    "a30": ((8, 0), 24576, 933),
    "a100-40gb": ((8, 0), 40960, 1555),
    "a100-80gb": ((8, 0), 81920, 2039),
    "l4": ((8, 9), 23034, 300),
    "l40s": ((8, 9), 46068, 864),
    "h100": ((9, 0), 81559, 3350),
    "h200": ((9, 0), 143771, 4800),
    "b200": ((10, 0), 183359, 8000),
}
GPUS = {
    name: Gpu(name=name, capability=capability, memory=mib * MIB, bandwidth=gb * 1e9)
    for name, (capability, mib, gb) in _FACTS.items()
}


def parse_gpus(text: str) -> tuple[Gpu, int]:
    """`h200` → one of them, `2xa10` → two.

    Raises:
        ConfigError: no such GPU in the table, or a count below 1.
    """
    count, _, name = text.lower().rpartition("x") if "x" in text.lower() else ("1", "", text.lower())
    if name not in GPUS or not count.isdigit() or int(count) < 1:
        raise ConfigError(f"--gpu is {text!r}; expected NAME or COUNTxNAME with one of {', '.join(GPUS)}")
    return GPUS[name], int(count)
