"""Quality gates: thresholds that are checked in, held against a fresh run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sightline.errors import ConfigError

__all__ = ["GATES", "check_gates"]

GATES = Path(__file__).with_name("gates.json")


def check_gates(figures: Mapping[str, Any], path: Path = GATES) -> list[dict[str, Any]]:
    """Each gate with its value and whether it holds. `metric` names a figure, with `.key` or `.index` for inner ones.

    Raises:
        ConfigError: the figures have no such metric: a gate that cannot be checked does not pass in silence.
    """
    found = []
    for gate in json.loads(path.read_text())["gates"]:
        value: Any = figures
        for key in gate["metric"].split("."):
            try:
                value = value[int(key)] if isinstance(value, list | tuple) else value[key]
            except (KeyError, IndexError, ValueError):
                raise ConfigError(f"{path}: no figure {gate['metric']!r}; there are {', '.join(figures)}") from None
        holds = value is not None and value >= gate["at_least"]
        found.append({**gate, "value": value, "pass": bool(holds)})
    return found
