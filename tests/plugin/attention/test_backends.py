"""Choice of kernels: by preference, with reasons, and never a silent substitute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import m3_kernels
from m3_kernels import KernelFamily
from m3_kernels.capability import implementation_for
from m3_kernels.index_pages import PLANES_DTYPE
from m3_plugin.attention.backends import KernelChoice, NoKernelError, choose_kernels, require_served


def families(monkeypatch: pytest.MonkeyPatch, *entries: KernelFamily) -> None:
    monkeypatch.setattr(m3_kernels, "kernel_families", lambda device_type: entries)


def test_the_best_is_taken_and_earlier_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    families(
        monkeypatch,
        KernelFamily("native", "no compiler"),
        KernelFamily("torch"),
        KernelFamily("reference"),
    )
    choice = choose_kernels("cpu")
    assert choice.family == "torch"
    assert choice.refused == (("native", "no compiler"),)
    assert "native refused: no compiler" in choice.describe()


def test_a_request_is_obeyed_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    families(monkeypatch, KernelFamily("native", "no compiler"), KernelFamily("torch"))
    assert choose_kernels("cpu", "torch").family == "torch"
    with pytest.raises(NoKernelError, match="native cannot run on 'cpu': no compiler"):
        choose_kernels("cpu", "native")
    with pytest.raises(NoKernelError, match="reference does not exist"):
        choose_kernels("cpu", "reference")


def test_a_device_without_kernels_is_refused_with_every_reason() -> None:
    with pytest.raises(NoKernelError, match="no MSA kernels for device 'xpu'"):
        choose_kernels("xpu")


def test_cuda_takes_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice starts no CUDA: a host makes it in its parent process too."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_kernels("cuda").family == "triton"
    assert not torch.cuda.is_initialized()
    with pytest.raises(NoKernelError, match="native cannot run on 'cuda': computes on CPU"):
        choose_kernels("cuda", "native")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NoKernelError, match="TRITON_INTERPRET=1 is set"):
        choose_kernels("cuda")


@pytest.mark.parametrize("wanted", ["auto", "triton", "flashinfer"])
def test_rocm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    """Its devices are called "cuda" too; nothing of ours may take them over."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "7.0.51831")
    with pytest.raises(NoKernelError, match=r"ROCm \(HIP 7.0.51831\).*host's own MiniMax-M3"):
        choose_kernels("cuda", wanted)
    refusals = [family.refusal or "" for family in m3_kernels.kernel_families("cuda")]
    assert "built for ROCm" in refusals[0]
    assert all(refusals)
    with pytest.raises(NotImplementedError, match="built for ROCm"):
        implementation_for("op", backend="auto", device_type="cuda")


def test_flashinfer_is_a_part_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_kernels("cuda").prefill is None  # a session decides
    assert choose_kernels("cuda", "triton").prefill is None
    choice = choose_kernels("cuda", "flashinfer")
    assert (choice.family, choice.prefill, choice.forced) == ("triton", "flashinfer", True)
    assert choice.describe() == (
        "triton (requested by M3_PLUGIN_KERNELS; prefill attention by flashinfer)"
    )
    with pytest.raises(NoKernelError, match="flashinfer cannot run on 'cpu': it needs a GPU"):
        choose_kernels("cpu", "flashinfer")


def test_without_flashinfer_says_why_and_obeys() -> None:
    choice = KernelChoice("triton", "best available on cuda", prefill="flashinfer")
    ours = choice.without_flashinfer("it is absent")
    assert ours.prefill is None
    assert ours.describe() == "triton (best available on cuda; flashinfer refused: it is absent)"
    with pytest.raises(NoKernelError, match=r"M3_PLUGIN_KERNELS=flashinfer .* it is absent"):
        KernelChoice("triton", "test", forced=True).without_flashinfer("it is absent")


def test_this_machine_has_kernels() -> None:
    assert choose_kernels("cpu").family in ("native", "torch")


E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
TRITON = KernelChoice("triton", "test")


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_what_every_chip_serves(arch: int) -> None:
    for cache in (BF16, torch.float16, E5M2):
        require_served(TRITON, arch=arch, cache_dtype=cache, index_dtype=BF16)
        require_served(TRITON, arch=arch, cache_dtype=cache, index_dtype=torch.int8)
    if arch >= 89:
        require_served(TRITON, arch=arch, cache_dtype=E4M3, index_dtype=E4M3)


@pytest.mark.parametrize(
    ("arch", "cache", "index", "message"),
    [
        (75, BF16, BF16, "8.0 .Ampere. or newer; this device has 7.5"),
        (80, E4M3, BF16, r"K and V .* needs compute capability 8.9, .* 8.0; use float8_e5m2"),
        (
            86,
            BF16,
            E4M3,
            r"index keys .* needs compute capability 8.9, .* 8.6; use int8 or bfloat16",
        ),
        (90, BF16, E5M2, "index keys cannot be cached as torch.float8_e5m2: no kernel reads it"),
        (90, torch.int8, BF16, "no kernel reads it; use float8_e5m2 or bfloat16"),
        (90, BF16, PLANES_DTYPE, "reads two planes yet; leave M3_PLUGIN_INDEX_KEYS=planes out"),
    ],
)
def test_what_a_chip_cannot_do_is_refused_with_the_alternative(
    arch: int, cache: torch.dtype, index: torch.dtype, message: str
) -> None:
    with pytest.raises(NoKernelError, match=message):
        require_served(TRITON, arch=arch, cache_dtype=cache, index_dtype=index)


@pytest.mark.parametrize("family", ["native", "torch", "reference"])
def test_the_cpu_reads_int8_index_keys(family: Any) -> None:
    kernels = KernelChoice(family, "test")
    require_served(kernels, arch=None, cache_dtype=BF16, index_dtype=torch.int8)
    require_served(kernels, arch=None, cache_dtype=BF16, index_dtype=PLANES_DTYPE)
    with pytest.raises(NoKernelError, match=r"K and V cannot be cached as torch\.int8"):
        require_served(kernels, arch=None, cache_dtype=torch.int8, index_dtype=BF16)
    with pytest.raises(NoKernelError, match="float16, int8 and two planes; use one"):
        require_served(kernels, arch=None, cache_dtype=BF16, index_dtype=E4M3)


def test_the_cpu_reads_no_fp8() -> None:
    with pytest.raises(NoKernelError, match="family 'native' reads float32, bfloat16 and float16"):
        require_served(
            KernelChoice("native", "test"), arch=None, cache_dtype=E5M2, index_dtype=BF16
        )
