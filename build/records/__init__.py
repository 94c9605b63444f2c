"""Recorded tables of TensorRT-LLM and its neighbours: what the pinned versions accept, with the source of each.

A plan is checked against these on a machine that has none of those programs, so that a wrong flag costs a
second and not an hour of a GPU. Every table names repository, file, commit and version that it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sightline.errors import ConfigError

__all__ = ["check_argv", "load"]

FOLDER = Path(__file__).parent


@cache
def load(name: str) -> Mapping[str, Any]:
    """The recorded table `name`.json: `source`, `notes` and its payload."""
    table: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return table


def check_argv(program: str, arguments: Sequence[str]) -> dict[str, str | bool]:
    """Hold a program's arguments to its recorded options; returns them parsed, flags as True.

    Both `--flag value` and `--flag=value` are read. Names must be whole: prefixes, which argparse would
    complete, hide mistakes.

    Raises:
        ConfigError: an unknown option, a missing or unexpected value, a value of the wrong type or choice.
    """
    options = _by_name(program)
    parsed: dict[str, str | bool] = {}
    words = list(arguments)
    while words:
        name, given, value = words.pop(0).partition("=")
        if name not in options:
            near = [known for known in options if known.startswith(name[:6])][:4]
            raise ConfigError(
                f"{program} has no option {name!r}; "
                + (f"near it: {', '.join(near)}" if near else f"known are {', '.join(sorted(options))}")
            )
        canonical, option = options[name]
        if option["type"] == "flag":
            if given:
                raise ConfigError(f"{program} {name}: takes no value, got {value!r}")
            parsed[canonical] = True
            continue
        if not given:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{program} {name}: expected a value")
            value = words.pop(0)
        _check_value(f"{program} {name}", option, value)
        parsed[canonical] = value
    return parsed


@cache
def _by_name(program: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        spelling: (name, option)
        for name, option in load(program.replace("-", "_"))["options"].items()
        for spelling in (name, *(option.get("aliases") or ()))
    }


def _check_value(what: str, option: Mapping[str, Any], value: str) -> None:
    choices = option["choices"]
    if choices is not None and value not in map(str, choices):
        raise ConfigError(f"{what}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    kind = {"int": int, "float": float}.get(option["type"])
    if kind is not None:
        try:
            kind(value)
        except ValueError:
            raise ConfigError(f"{what}: expected {option['type']}, got {value!r}") from None
