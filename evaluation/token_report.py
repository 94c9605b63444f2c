"""What a token spec makes of captions: rows, coverage, collisions, truncation, per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.table import Table

from sightline.errors import ConfigError
from sightline.tokens import KINDS, Kind, Statistics, TokenSpec
from trainer.metrics import GRAMMARS

__all__ = ["measure_tokens", "table"]


def measure_tokens(
    captions: Sequence[str], families: Sequence[str], *, spec: Path | None = None, grammar: str | None = None,
    length: int = 32, rows: int = 4096, min_count: int = 2, seed: int = 0,
) -> tuple[Statistics, dict[str, Any]]:  # fmt: skip
    """Statistics of a spec on captions that it was not fitted on, and the same as a JSON document.

    With `spec`, that one is held against all captions. Without, one is fitted on half of them, drawn by `seed`, and
    held against the other half.

    Args:
        captions: texts, annotated or not.
        families: of the fitted spec, in order of priority.
        grammar: of the captions, for slots: one of `trainer.metrics.GRAMMARS`.

    Raises:
        ConfigError: an unknown family or grammar, fewer than two captions.
        TokenSpecError: no spec, or a family that these captions have nothing for.
    """
    for flag, asked, known in (("family", list(families), KINDS), ("grammar", [grammar] * bool(grammar), GRAMMARS)):
        if unknown := [name for name in asked if name not in known]:
            raise ConfigError(f"--{flag} is {', '.join(map(str, unknown))}; expected some of {', '.join(known)}")
    if spec is not None:
        found, held = TokenSpec.load(spec), captions
    else:
        if len(captions) < 2:
            raise ConfigError(f"--captions: {len(captions)} captions; expected at least two, one half is to fit on")
        order = np.random.default_rng(seed).permutation(len(captions))
        fit, held = ([captions[i] for i in part] for part in np.array_split(order, 2))
        found = TokenSpec.fit(
            fit, families=cast(list[Kind], families), length=length, rows=rows, min_count=min_count, seed=seed,
            slots=GRAMMARS[grammar] if grammar else None,
        )  # fmt: skip
    statistics = found.statistics(held)
    source = {"spec": found.version, "fitted_on": 0 if spec else len(captions) - len(held), "rows": found.rows}
    return statistics, {**source, **asdict(statistics)}


def table(statistics: Statistics) -> Table:
    """For a terminal: one line per family."""
    lines = Table(title=f"{statistics.captions} captions, {statistics.truncated:.1%} cut at {statistics.length} ids")
    lines.add_column("family", no_wrap=True, min_width=max(map(len, statistics.families)))
    for name in ("rows", "used", "tokens", "tokens with a row", "captions with one", "ids/caption", "share all rows",
                 "share one", "cut"):  # fmt: skip
        lines.add_column(name, justify="right")
    for kind, one in statistics.families.items():
        lines.add_row(
            kind, f"{one.rows}", f"{one.used_rows}", f"{one.distinct}", f"{one.token_coverage:.1%}",
            f"{one.caption_coverage:.1%}", f"{one.ids:.2f}", f"{one.full_collisions:.2%}",
            f"{one.partial_collisions:.1%}", f"{one.truncated:.1%}",
        )  # fmt: skip
    return lines
