"""Wall-clock timing of functions side by side: medians and spread, never the best run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Durations of one function, in seconds and in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median duration."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def minimum(self) -> float:
        """The shortest duration; for judging noise, not for quoting."""
        return min(self.seconds)


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Run all functions in turn, round after round, so that a disturbance meets all of them.

    Between two runs of one function all others run, which also empties caches of its data when
    theirs is larger.

    Parameters
    ----------
    rounds : timed runs of each function, at least 1
    warmup : runs of each function before timing starts
    after_round : called after every round, warm-up included
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if number >= warmup:
                durations[name].append(elapsed)
        after_round()
    return {name: Timing(tuple(seconds)) for name, seconds in durations.items()}
