"""Where a figure comes from: hardware, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sightline import __version__

PACKAGES = ("onnxruntime", "torch", "transformers", "numpy", "tritonclient", "nvidia-pytriton")


def describe() -> dict[str, Any]:
    """JSON-ready record of this process's machine and software."""
    return {
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"sightline": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Commit of the checkout, with `+changes` where the working tree differs; `unknown` outside of git."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
