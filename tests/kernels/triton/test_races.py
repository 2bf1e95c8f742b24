"""Programs of a launch in random order, every byte watched: planted faults, then our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from m3_kernels.testing.cases import Case
from m3_kernels.testing.races import Watch, watched
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.self_test import verify_case

SEEDS = (1, 2)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    **{"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "index_dim": 16, "rotary_dim": 8},
    **{"page_size": 16, "topk": 5, "dtype": torch.float32},
}


def zeros(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def seen(launch: Callable[[], None], seed: int = 1) -> Watch:
    with watched(seed) as watch:
        launch()
    return watch


def run(kernel: Any, programs: int, *arguments: Any) -> None:
    kernel[(programs,)](*arguments)


def said(watch: Watch) -> str:
    (fault,) = watch.faults
    return fault


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_races(seed: int) -> None:
    from tests.kernels.triton import planted_races as planted

    def together(shared: int) -> Watch:
        return seen(lambda: run(planted.write_together, 4, zeros(64), shared), seed)

    assert not together(0).faults
    found = together(4)
    assert "write_together writes what another program writes, triton/planted_races" in said(found)
    assert found.faults.total() == 3 * 4 * 4

    def neighbour(distance: int) -> Watch:
        return seen(lambda: run(planted.read_neighbour, 4, zeros(8), distance), seed)

    assert not neighbour(0).faults
    assert not neighbour(4).faults
    kinds = {fault.partition(",")[0] for fault in neighbour(1).faults}
    assert kinds <= {
        "read_neighbour reads what another program writes",
        "read_neighbour writes what another program reads",
    }
    assert kinds


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_order_programs_if_they_acquire_and_release(seed: int) -> None:
    from tests.kernels.triton import planted_races as planted

    def summed(sem: str) -> Watch:
        parts, arrivals, out = zeros(8), zeros(1, torch.int32), zeros(1)
        watch = seen(lambda: run(planted.last_sums, 8, parts, arrivals, out, 8, sem), seed)
        assert out.item() == 8
        return watch

    assert not summed("acq_rel").faults
    for sem in ("relaxed", "acquire", "release"):
        faults = " ".join(summed(sem).faults)
        assert "reads what another program writes" in faults, sem


def test_lanes_and_bounds() -> None:
    from tests.kernels.triton import planted_races as planted

    assert "from two lanes" in said(seen(lambda: run(planted.one_address, 1, zeros(16))))
    # memory of the same storage that the argument does not span is out of bounds
    storage = zeros(64)

    def copied(count: int, masked: bool) -> Watch:
        return seen(lambda: run(planted.copy, 1, storage[:count], zeros(16), count, masked))

    assert not copied(16, masked=False).faults
    assert not copied(10, masked=True).faults
    found = copied(10, masked=False)
    assert "copy would read beyond its arguments, triton/planted_races.py:" in said(found)
    assert found.faults.total() == 6


CASES = (
    Case("decode", ((200, 1), (15, 1), (0, 1)), **SMALL),
    Case("mixed", ((120, 1), (33, 12), (60, 3)), padding_rows=2, **SMALL),
)
OF_A_LAYER = {
    *("work_plan_kernel", "norm_rope_store_kernel", "index_decode_scores_kernel"),
    *("index_prefill_scores_kernel", "index_select_kernel", "sparse_attention_decode_kernel"),
    "sparse_attention_prefill_kernel",
}


@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_of_a_layer(seed: int) -> None:
    """Right in any order, ordered wherever they share a byte, and within their arguments."""
    with watched(seed) as watch:
        for case in CASES:
            kernels = KernelChoice(family="triton", reason="")
            findings = verify_case(case, kernels=kernels, device=CPU, repeats=1)
            assert all(finding.ok for finding in findings), findings
    assert not watch.faults
    assert set(watch.bytes_seen) >= OF_A_LAYER
