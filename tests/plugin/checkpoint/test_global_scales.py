"""Scales of whole NVFP4 weights: what means nothing is refused, by the tensor's name."""

from __future__ import annotations

import pytest
import torch

from m3_plugin.checkpoint.global_scales import GlobalScales
from m3_plugin.quantization.dialects import read_quantization
from tests.plugin.quantization.test_own_experts import SECTION

NAME = "model.layers.3.block_sparse_moe.experts.7.{}.weight_global_scale"


def scales(*, fused: bool) -> GlobalScales:
    return GlobalScales(read_quantization(SECTION), fused=fused)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_that_is_none_is_refused(value: float, shape: tuple[int, ...]) -> None:
    name = NAME.format("w2")
    with pytest.raises(ValueError, match=rf"{name} must be a finite positive number"):
        scales(fused=False).see(name, torch.full(shape, value))


def test_one_kernel_takes_one_scale_for_w1_and_w3() -> None:
    seen = scales(fused=True)
    seen.see(NAME.format("w3"), torch.tensor([4.0]))
    seen.see(NAME.format("w2"), torch.tensor([8.0]))
    with pytest.raises(ValueError, match=r"w1.*must equal .*4\.0; got 5\.0.*DEQUANTIZE"):
        seen.see(NAME.format("w1"), torch.tensor([5.0]))


def test_dequantised_each_has_its_own() -> None:
    seen = scales(fused=False)
    for matrix, value in (("w1", 5.0), ("w3", 4.0)):
        seen.see(NAME.format(matrix), torch.tensor([value]))


def test_a_scale_of_activations_may_be_anything() -> None:
    name = NAME.format("w1").replace("weight_global", "input_global")
    scales(fused=True).see(name, torch.tensor([0.0]))
