"""What the benchmarks that are programs share: options from a dataclass, progress to stderr, JSON as the last line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sightline.errors import SightlineError

__all__ = ["add_options", "run", "say"]


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser, defaults: Any, options: Mapping[str, str]) -> None:
    """One option per name of `options`, with its explanation; types and defaults are those of the dataclass."""
    for name, what in options.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default {default})")


def run(name: str, question: str | None, measure: Callable[[], dict[str, Any]]) -> int:
    """Ask the question, measure, print the document; exit code 1 if it could not, or if a bound of `broken` fell."""
    say((question or "").strip() + "\n")
    try:
        document = measure()
    except (SightlineError, OSError) as error:
        say(f"{name}: {error}")
        return 1
    for line in document["broken"]:
        say(f"broken: {line}")
    print(json.dumps(document))
    return 1 if document["broken"] else 0
