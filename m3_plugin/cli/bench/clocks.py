"""How a list of calls is timed: CUDA graphs on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from m3_kernels.testing.timing import Timing

Call = Callable[[], object]


class Clock(Protocol):
    """Prepares calls; what it returns runs all of them and says seconds per call."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]: ...


class WallClock:
    """Time on the host; right where calls return when their work is done."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return run


class GraphClock:
    """Replays of one captured CUDA graph between two events: no launch cost of Python in them."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        # Whatever compiles, tunes itself or allocates at its first call does so here.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(calls)

        return run


def time_in_turn(
    prepared: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warmup: int = 2,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Run all prepared calls round after round, every other round in the opposite order.

    Parameters
    ----------
    rounds : timed rounds, at least 1
    warmup : rounds before that
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for number in range(warmup + rounds):
        names = list(prepared)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            taken = prepared[name]()
            if number >= warmup:
                seconds[name].append(taken)
        after_round()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def copy_bandwidth(clock: Clock, device: torch.device, *, num_bytes: int) -> float:
    """Bytes read and written per second by the fastest thing there is: a plain copy."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turn({"copy": clock.prepare([lambda: target.copy_(source)] * 3)}, rounds=10)[
        "copy"
    ]
    return 2 * num_bytes / timing.median


def matmul_throughput(
    clock: Clock, device: torch.device, *, size: int, dtype: torch.dtype
) -> float:
    """Operations per second of the vendor's matrix product of this dtype."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timing = time_in_turn(
        {"matmul": clock.prepare([lambda: torch.mm(left, right, out=out)] * 3)}, rounds=10
    )["matmul"]
    return 2 * size**3 / timing.median
