"""What differs between the SGLang releases of the tested window, on whichever is installed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from m3_plugin.attention.backends import NoKernelError, choose_kernels
from m3_sglang import compat
from m3_sglang.options import require_served
from tests.integrations.sglang.test_batch import server_args

pytestmark = pytest.mark.every_release


@pytest.fixture
def sglang_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the adapter believe in another release."""
    return lambda release: monkeypatch.setattr(compat, "sglang_version", lambda: release)


@pytest.fixture
def rank_3_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "tensor_parallel_rank", lambda: 3)
    monkeypatch.setattr(compat, "tensor_parallel_size", lambda: 4)


@pytest.mark.parametrize("release", ["0.5.21", "0.5.21.post1"])
def test_an_older_sglang_on_a_cpu_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, sglang_is: Callable[[str], None], release: str
) -> None:
    sglang_is(release)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs TRITON_INTERPRET=1; got None: its cache"):
        require_served(server_args())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="got '0'"):
        require_served(server_args())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="needs --disable-cuda-graph: "):
        require_served(server_args())
    require_served(server_args(disable_cuda_graph=True))


def test_accelerators_and_newer_releases_need_neither(
    monkeypatch: pytest.MonkeyPatch, sglang_is: Callable[[str], None]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sglang_is("0.5.21")
    require_served(server_args(device="cuda"))
    for release in ("0.5.22rc1", "0.5.22", "0.5.23"):
        sglang_is(release)
        require_served(server_args())


@pytest.mark.parametrize(("ranks", "expected"), [(1, (3, 4)), (2, (1, 2)), (4, (0, 1))])
def test_older_linears_are_told_which_shard_a_rank_shares(
    rank_3_of_4: None, sglang_is: Callable[[str], None], ranks: int, expected: tuple[int, int]
) -> None:
    sglang_is("0.5.21")
    rank, size = expected
    assert compat.partition_shared_by(ranks) == {"tp_rank": rank, "tp_size": size}


@pytest.mark.parametrize(("found", "expected"), [("hip", "cuda"), ("xpu", "xpu"), ("npu", "npu")])
def test_an_accelerator_without_our_kernels_is_not_taken_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch, found: str, expected: str
) -> None:
    monkeypatch.setattr(f"sglang.srt.utils.is_{found}", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0" if found == "hip" else None)
    assert compat.device_type() == expected
    with pytest.raises(NoKernelError, match="ROCm" if found == "hip" else f"'{found}'"):
        choose_kernels(compat.device_type())
