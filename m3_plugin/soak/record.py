"""What is kept of a run: a record per minute, the faults, and slopes over the minutes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from m3_plugin.soak.driver import Outcome
from m3_plugin.soak.processes import Process

# Caches of a host, of the allocator and of the interpreter fill in the first minutes.
WARM_UP = 10
# A shorter time after that says nothing about a slope, nor do fewer readings.
LEAST_FOR_A_SLOPE = 10
LEAST_READINGS = 5


@dataclass(frozen=True)
class Counters:
    """The server's own counts up to now; None where it has none.

    Attributes
    ----------
    preemptions : requests that lost their pages and began again
    hit_tokens : prompt tokens found in the prefix cache
    used : share of the cache's pages that requests hold, 0 to 1
    """

    preemptions: float | None
    hit_tokens: float | None
    used: float | None


@dataclass(frozen=True)
class Minute:
    """One minute.

    Attributes
    ----------
    server : how many servers were started before this one
    drafts : whether it drafted
    idle : whether a quiet moment followed, in which no request was under way
    seconds : until the last answer where one followed
    verdicts : counts, by verdict
    latency_s, first_token_s : median, 95th percentile and largest, of answers that are right
    preemptions, hit_tokens : in this minute
    used_when_idle : share of the cache that is held in that moment; None without one
    processes : at its end, or in that moment
    """

    server: int
    drafts: bool
    idle: bool
    seconds: float
    requests: int
    verdicts: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    latency_s: tuple[float, float, float] | None
    first_token_s: tuple[float, float, float] | None
    preemptions: float | None
    hit_tokens: float | None
    used_when_idle: float | None
    processes: tuple[Process, ...]

    @classmethod
    def of(
        cls,
        outcomes: Sequence[Outcome],
        *,
        server: int,
        drafts: bool,
        idle: bool,
        seconds: float,
        before: Counters,
        after: Counters,
        processes: Sequence[Process],
    ) -> Minute:
        """What these requests and counters say."""
        right = [outcome for outcome in outcomes if outcome.verdict == "right"]
        return cls(
            server=server,
            drafts=drafts,
            idle=idle,
            seconds=round(seconds, 3),
            requests=len(outcomes),
            verdicts=dict(Counter(outcome.verdict for outcome in outcomes)),
            prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
            completion_tokens=sum(outcome.completion_tokens for outcome in outcomes),
            latency_s=_spread([outcome.seconds for outcome in right]),
            first_token_s=_spread([o.first_s for o in right if o.first_s is not None]),
            preemptions=_difference(after.preemptions, before.preemptions),
            hit_tokens=_difference(after.hit_tokens, before.hit_tokens),
            used_when_idle=after.used if idle else None,
            processes=tuple(processes),
        )

    @property
    def totals(self) -> Mapping[str, float]:
        """Sums over the processes."""
        return {
            "rss_mb": sum(process.rss_mb for process in self.processes),
            "files": sum(process.files for process in self.processes),
            "threads": sum(process.threads for process in self.processes),
        }


@dataclass
class Run:
    """All that is known of a run.

    Attributes
    ----------
    next_number : of the request that comes next
    servers : that were started
    ended : why the run ended early: the server was gone; "" otherwise
    """

    minutes: list[Minute] = field(default_factory=list)
    faults: list[Outcome] = field(default_factory=list)
    next_number: int = 0
    servers: int = 0
    ended: str = ""

    def findings(self, *, largest_slope: float) -> list[str]:
        """What is wrong, a line each; empty if nothing is.

        Parameters
        ----------
        largest_slope : MB of resident memory a minute
        """
        found = [
            f"request {fault.number} ({fault.kind}) is {fault.verdict}: {fault.detail}"
            for fault in self.faults
        ]
        if self.ended:
            found.append(f"the server is gone: {self.ended}")
        for number, minute in enumerate(self.minutes):
            if minute.used_when_idle:
                found.append(
                    f"minute {number}: {minute.used_when_idle:.2%} of the cache is held while "
                    "nobody asks"
                )
        for slopes in self.slopes():
            slope = slopes["rss_mb"]
            if slope is not None and slope > largest_slope:
                found.append(
                    f"server {slopes['server']}: resident memory grows by {slope:.2f} MB a minute, "
                    f"more than {largest_slope:g}"
                )
        return found

    def slopes(self) -> list[dict[str, Any]]:
        """Per server: how memory, files and threads grow a minute; None where it ran too short."""
        return [
            {
                "server": server,
                **{
                    name: slope([(at, minute.totals[name]) for at, minute in self._settled(server)])
                    for name in ("rss_mb", "files", "threads")
                },
            }
            for server in sorted({minute.server for minute in self.minutes})
        ]

    def _settled(self, server: int) -> list[tuple[int, Minute]]:
        """Number and minute of a server behind its warm-up, where it was idle and could be seen."""
        own = [minute for minute in self.minutes if minute.server == server]
        return [
            (at, minute)
            for at, minute in enumerate(own)
            if at >= WARM_UP and minute.idle and minute.processes
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return {
            "ended": self.ended,
            "next_number": self.next_number,
            "servers": self.servers,
            "slopes": self.slopes(),
            "faults": [asdict(fault) for fault in self.faults],
            "minutes": [asdict(minute) for minute in self.minutes],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Run:
        """What `as_dict` gave, so that a run can go on.

        Raises
        ------
        KeyError, TypeError : it is something else.
        """
        return cls(
            minutes=[
                Minute(
                    **{
                        **entry,
                        "processes": tuple(Process(**process) for process in entry["processes"]),
                    }
                )
                for entry in stored["minutes"]
            ],
            faults=[
                Outcome(**{**entry, "beside": tuple(entry["beside"])}) for entry in stored["faults"]
            ],
            next_number=stored["next_number"],
            servers=stored["servers"],
        )


def slope(readings: Sequence[tuple[int, float]]) -> float | None:
    """Growth per minute of the straight line through readings; None if they say too little.

    Parameters
    ----------
    readings : minute and value, minutes ascending
    """
    if len(readings) < LEAST_READINGS or readings[-1][0] - readings[0][0] + 1 < LEAST_FOR_A_SLOPE:
        return None
    minutes, values = zip(*readings, strict=True)
    return statistics.linear_regression(minutes, values).slope


def _spread(values: Sequence[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = round(0.95 * (len(ordered) - 1))
    return statistics.median(ordered), ordered[at], ordered[-1]


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
