"""Comparing word levels that were computed from features of different batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def agree(ours: Sequence[Mapping[str, int]], theirs: Sequence[Mapping[str, int]]) -> bool:
    """Equal, but for one in a hundred that lies on a step: FP32's last digits then decide for one side or the other."""
    pairs = [(a.get(word, 0), b.get(word, 0)) for a, b in zip(ours, theirs, strict=True) for word in {**a, **b}]
    apart = [abs(a - b) for a, b in pairs if a != b]
    return len(apart) <= len(pairs) // 100 and max(apart, default=0) <= 1
