"""CPU time of products with weights, beside torch's and beside the time to read their bytes.

    python -P -m m3_kernels.testing.products [--rounds 15] [--rows 1,4,16,64,512]

One thread, and the time that this thread spent on a processor: other programs take caches and
bandwidth from it, but not time. Functions take turns, and between two of them memory as large as
the last cache is read. Prints a table of plain weights, one of all kinds at one row, and the load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.stored_matrix import StoredMatrix

# of the released model: hidden size, and rows of a tile of its projections
ROWS, COLUMNS = 3072, 6144
EVICTED_BYTES = 64 * 2**20


def medians(functions: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Median seconds of this thread per function, in turns."""
    evicts = torch.ones(EVICTED_BYTES // 4)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            evicts.sum()
            start = time.thread_time()
            function()
            taken[name].append(time.thread_time() - start)
    # the first round compiles and touches memory
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def stored_kinds() -> Iterator[tuple[str, StoredMatrix]]:
    """A matrix of each kind, of random codes."""
    random = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)

    def e4m3(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(torch.float8_e4m3fn).view(torch.uint8)

    n, k = ROWS, COLUMNS
    weight = torch.randn(n, k, generator=random)
    powers = torch.full((n, k // 32), 120, dtype=torch.uint8)
    wide = torch.rand(n, k // 128, generator=random)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield str(dtype).removeprefix("torch."), StoredMatrix("plain", weight.to(dtype))
    yield "mxfp8", StoredMatrix("mxfp8", e4m3(n, k), powers, 32)
    yield "fp8", StoredMatrix("fp8", e4m3(n, k), wide, 128)
    yield "mxfp4", StoredMatrix("mxfp4", codes(n, k // 2), powers, 32)
    factors = torch.rand(n, generator=random)
    yield "nvfp4", StoredMatrix("nvfp4", codes(n, k // 2), e4m3(n, k // 16), 16, None, factors)
    yield "int4", StoredMatrix("int4", codes(n, k // 2), wide, 128, codes(n, k // 128) & 15)


def plain_table(counts: list[int], *, rounds: int) -> Iterator[str]:
    """Rows of a Markdown table: torch in bf16, ours in bf16, torch in fp32."""
    yield "| rows | torch, bf16 | ours, bf16 | torch, fp32 |"
    yield "|---|---|---|---|"
    wide = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    weight = wide.bfloat16()
    stored = StoredMatrix("plain", weight)
    linear = torch.nn.functional.linear
    for count in counts:
        x = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(count))
        narrow = x.bfloat16()
        functions: dict[str, Callable[[], object]] = {
            "torch": lambda rows=narrow: linear(rows, weight),
            "ours": lambda rows=narrow: quantised_linear(rows, stored, backend="native"),
            "fp32": lambda rows=x: linear(rows, wide),
        }
        found = medians(functions, rounds=rounds if count < 256 else max(3, rounds // 3))
        yield f"| {count} | " + " | ".join(f"{1e3 * s:.1f}" for s in found.values()) + " |"


def kinds_table(*, rounds: int) -> Iterator[str]:
    """Rows of a Markdown table: one row of x with each kind, and the share of the bandwidth."""
    read = torch.ones(EVICTED_BYTES // 4)
    x = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    matrices = dict(stored_kinds())
    functions: dict[str, Callable[[], object]] = {"read": lambda: read.sum()}
    for name, matrix in matrices.items():
        functions[name] = lambda matrix=matrix: quantised_linear(x, matrix, backend="native")
    found = medians(functions, rounds=rounds)
    bandwidth = read.nbytes / found.pop("read")
    yield f"torch.sum reads {bandwidth / 1e9:.1f} GB/s."
    yield "| kind | MB | ms | GB/s | of the bandwidth |"
    yield "|---|---|---|---|---|"
    for name, seconds in found.items():
        size = sum(part.nbytes for part in matrices[name].parts)
        speed = size / seconds
        cells = (f"{size / 1e6:.1f}", f"{1e3 * seconds:.2f}", f"{speed / 1e9:.1f}")
        yield f"| {name} | " + " | ".join(cells) + f" | {speed / bandwidth:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", default="1,4,16,64,512")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    counts = [int(count) for count in asked.rows.split(",")]
    for line in plain_table(counts, rounds=asked.rounds):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write("\n")
    for line in kinds_table(rounds=asked.rounds):
        sys.stdout.write(f"{line}\n")
    after = os.getloadavg()[0]
    sys.stdout.write(f"Load {load:.1f} to {after:.1f} on {os.cpu_count()} cores, one thread.\n")


if __name__ == "__main__":
    main()
