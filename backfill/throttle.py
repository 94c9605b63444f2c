"""How much of its encoders a backfill may take: a share of its time, or what live traffic's latency leaves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from urllib.request import urlopen

from sightline.errors import ConfigError, ServingError

__all__ = ["Throttle", "quantile", "read_buckets"]

_LEAST = 0.02  # of the time, so that a job that hinders still ends
_LONGEST = 30.0  # seconds of one rest
Buckets = Mapping[float, float]
"""Upper bound in seconds → observations up to it, ascending; the last bound is inf."""


class Throttle:
    """Rests between batches, so that each encoder is busy for a share of the time.

    With a bound on the live traffic's 99th percentile the share is halved whenever the bound was broken since the last
    batch, and grows by a tenth otherwise, up to `share` (additive increase, multiplicative decrease, Chiu and Jain
    1989).

    Args:
        share: of the time, above 0 to 1.
        encoders: that work side by side, also while this rests.
        p99: bound in seconds; None: there is none.
        observe: the live traffic's latencies so far.
    """

    def __init__(
        self, share: float = 1.0, *, encoders: int = 1, p99: float | None = None,
        observe: Callable[[], Buckets] | None = None, sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        if not 0 < share <= 1:
            raise ConfigError(f"--share: expected a number above 0, at most 1, got {share}")
        if p99 is not None and p99 <= 0:
            raise ConfigError(f"--p99-ms: expected a number above 0, got {p99 * 1e3:g}")
        self._most, self.share, self._encoders = share, share, encoders
        self._p99, self._observe, self._sleep = p99, observe, sleep
        self._before = observe() if p99 is not None and observe else {}

    def __call__(self, busy: float, passed: float) -> None:
        """After a batch that kept an encoder busy for so many seconds, when so many passed since the last call."""
        if self._p99 is not None and self._observe:
            self._adapt(self._p99, self._observe())
        self._sleep(min(max(busy / self._encoders / self.share - passed, 0), _LONGEST))

    def _adapt(self, bound: float, now: Buckets) -> None:
        """A server that was started again counts from zero: a difference below zero says nothing."""
        since = {edge: max(count - self._before.get(edge, 0.0), 0.0) for edge, count in now.items()}
        self._before = now
        if quantile(since, 0.99) > bound:
            self.share = max(self.share / 2, _LEAST)
        else:
            self.share = min(self.share + 0.1, self._most)


def quantile(buckets: Buckets, q: float) -> float:
    """Upper bound of the bucket in which the quantile lies, 0 without observations."""
    total = buckets.get(float("inf"), 0.0)
    return next((bound for bound, count in sorted(buckets.items()) if total and count >= q * total), 0.0)


def read_buckets(url: str, family: str, labels: Mapping[str, str]) -> Buckets:
    """A histogram of a Prometheus exposition, summed over the series that have these labels.

    Raises ServingError where the address does not answer.
    """
    try:
        with urlopen(url, timeout=5) as response:
            text = response.read().decode()
    except OSError as error:
        raise ServingError(f"{url}: expected Triton's metrics: {error}") from error
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    found: dict[float, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        inside, _, value = rest.rpartition("} ")
        if name == f"{family}_bucket" and all(label in inside for label in wanted):
            bound = float(inside.partition('le="')[2].partition('"')[0])
            found[bound] = found.get(bound, 0.0) + float(value)
    return found
