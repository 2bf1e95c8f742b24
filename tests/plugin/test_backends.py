"""Choice of kernels: by preference, with reasons, and never a silent substitute."""

from __future__ import annotations

import pytest

import m3_kernels
from m3_kernels import KernelFamily
from m3_plugin.backends import NoKernelError, choose_kernels


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


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
def test_a_device_without_kernels_is_refused_with_every_reason(device_type: str) -> None:
    with pytest.raises(NoKernelError, match=f"no MSA kernels for device '{device_type}'"):
        choose_kernels(device_type)


def test_this_machine_has_kernels() -> None:
    assert choose_kernels("cpu").family in ("native", "torch")
