"""The peers' environment, `.tools/peers`: made from requirements.lock beside this file, section by section."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

__all__ = ["LOCK", "PYTHON", "install", "sections"]

_ROOT = Path(__file__).parents[2]
_FOLDER = _ROOT / ".tools" / "peers"
PYTHON = _FOLDER / "bin" / "python"
LOCK = Path(__file__).with_name("requirements.lock")
_STAMP = _FOLDER / "installed.json"
_TITLE = re.compile(r"^# --- ([^,\n]+).*\n", re.MULTILINE)


def sections(lock: str) -> dict[str, str]:
    """Peer → its pins. All need the first one's, too."""
    _, *parts = _TITLE.split(lock)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def install(progress: Callable[[str], None]) -> dict[str, str]:
    """Install what is not there yet; the peers that cannot run here, with the reason.

    An interrupted installation goes on with the next call, and what failed is tried again.
    """
    lock = LOCK.read_text()
    key = hashlib.sha256(f"{lock} {_ROOT} {platform.python_version()} {platform.machine()}".encode()).hexdigest()
    known = json.loads(_STAMP.read_text()) if _STAMP.exists() else {}
    done = set(known["done"]) if known.get("key") == key else set()
    failed: dict[str, str] = {}
    todo = [name for name in sections(lock) if name not in done]
    if todo and not PYTHON.exists():
        venv.create(_FOLDER, with_pip=True, symlinks=True)
    for number, name in enumerate(todo, 1):
        if failed.keys() & {next(iter(sections(lock)))}:
            failed[name] = next(iter(failed.values()))
            continue
        progress(f"peers {number}/{len(todo)}: {name} (all of them, the first time: about 200 MB to download)")
        if reason := _pip(sections(lock)[name]):
            failed[name] = reason
            continue
        done.add(name)
        _STAMP.write_text(json.dumps({"key": key, "done": sorted(done)}))
    return failed


def _pip(pins: str) -> str | None:
    """Why the pins cannot be installed, or None."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps",
               "-r", "/dev/stdin"]  # fmt: skip
    result = subprocess.run(command, input=pins, text=True, capture_output=True, check=False)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no output"]
    return f"pip failed: {lines[-1]}"
