"""A node with TensorRT-LLM: programs in place of its three take the recorded options and write what those write."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from build.hardware import MIB, parse_gpus
from sightline.node import TENSORRT, TENSORRT_LLM

# One program for all three: options as recorded, output as the real ones leave it. `calls` counts its runs.
PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from build.records import check_argv
program = {program!r}
options = check_argv(program, sys.argv[1:])
with open({calls!r}, "a") as file:
    file.write(program + " " + " ".join(sys.argv[1:]) + "\\n")
if os.environ.get("FAIL") == program:
    print("out of memory while building")
    sys.exit(7)
out = Path(options["--output_dir"])
out.mkdir(exist_ok=True)
if program == "trtllm-build":
    source = Path(options.get("--checkpoint_dir") or Path(options["--model_config"]).parent)
    built = {{k[2:]: int(options[k]) for k in ("--max_batch_size", "--max_input_len", "--max_seq_len")}}
    if "--dry_run" not in options:
        tp = json.loads((source / "config.json").read_text())["mapping"]["tp_size"]
        for rank in range(tp):
            (out / f"rank{{rank}}.engine").write_bytes(b"engine" * 100)
        version = os.environ.get("TRTLLM_VERSION", "1.2.1")
        (out / "config.json").write_text(json.dumps({{"version": version, "build_config": built}}))
else:
    assert json.loads(Path(options["--model_dir"], "config.json").read_text())["rope_theta"] == 10000.0
    (out / "config.json").write_text(json.dumps({{"mapping": {{"tp_size": int(options["--tp_size"])}}}}))
    if "--save_config_only" not in options:
        (out / "rank0.safetensors").write_bytes(b"weights")
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: str = "h200") -> Path:
    """Write the programs to `folder` (bin/, examples/) and put bin/ on PATH; returns the list of their calls.

    python3 is a real one that finds the two packages' metadata, nvidia-smi lists `gpus`.
    """
    calls = folder / "calls.txt"
    for name, path in {
        "trtllm-build": "bin/trtllm-build",
        "convert_checkpoint": "examples/models/core/llama/convert_checkpoint.py",
        "quantize": "examples/quantization/quantize.py",
    }.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).parents[1])
        target.write_text(PROGRAM.format(python=sys.executable, root=root, program=name, calls=str(calls)))
        target.chmod(target.stat().st_mode | stat.S_IXUSR)
    packages = folder / "packages"
    program(folder, "python3", f'PYTHONPATH="{packages}:$PYTHONPATH" exec {sys.executable} "$@"')
    set_version(folder, "tensorrt_llm", TENSORRT_LLM)
    set_version(folder, "tensorrt", f"{TENSORRT}.48")  # the wheel's version has a fourth part
    kind, count = parse_gpus(gpus)
    capability = ".".join(map(str, kind.capability))
    set_gpus(folder, [f"NVIDIA {kind.name.upper()}, {capability}, {kind.memory // MIB}"] * count)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    calls.touch()
    return calls


def set_version(folder: Path, package: str, version: str) -> None:
    """What python3 tells of a package."""
    metadata = folder / "packages" / f"{package}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def set_gpus(folder: Path, rows: list[str]) -> None:
    """What nvidia-smi lists: name, compute capability, memory in MiB."""
    program(folder, "nvidia-smi", "\n".join(f"echo '{row}'" for row in rows))


def program(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
