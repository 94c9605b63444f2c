"""The highest rate that a server meets a condition at."""

from __future__ import annotations

import math
from collections.abc import Callable

_LEAST = 1 / 32
_FIRST, _GROWTH = 2.5, 1.2  # the first step is so many precisions wide; what every step is wider than the last


def capacity(meets: Callable[[float], bool], guess: float, precision: float = 1.04) -> float:
    """Highest rate that met the condition, 0 where not even a 32nd of the guess does.

    Goes from the guess in steps that grow, until one rate meets it and a higher one does not, then halves the ratio
    between these until it is `precision` or less. Near the limit chance decides whether a condition is met: repeat the
    search and take the median.

    >>> 470 / 1.04 <= capacity(lambda rate: rate <= 470, guess=300) <= 470
    True
    """
    low, high, rate, step = 0.0, math.inf, guess, precision**_FIRST
    while not low or high == math.inf:
        if meets(rate):
            low, rate = rate, rate * step
        elif rate <= guess * _LEAST:
            return 0.0
        else:
            high, rate = rate, max(rate / step, guess * _LEAST)
        step *= _GROWTH
    while high / low > precision:
        rate = math.sqrt(low * high)
        low, high = (rate, high) if meets(rate) else (low, rate)
    return low
