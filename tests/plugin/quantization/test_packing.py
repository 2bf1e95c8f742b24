"""Every format in the layout of the CPU kernels: the numbers are the codecs', to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3_kernels.quantised_linear.decoding import decode
from m3_plugin.quantization.codecs import dequantise
from m3_plugin.quantization.formats import (
    Fp8,
    Fp8Block,
    GptqInt4,
    Mxfp4,
    Mxfp8,
    Nvfp4,
    PackedInt4,
    Plain,
    WeightFormat,
)
from m3_plugin.quantization.packing import layout_of, pack
from m3_plugin.testing.quantised import quantise

ROWS, COLUMNS = 40, 256
DIVIDED = Nvfp4(weight="weight_packed", global_scale="weight_global_scale", divides=True)
FORMATS: tuple[WeightFormat, ...] = (
    Mxfp8(),
    Mxfp4(),
    Nvfp4(),
    Fp8Block(block_rows=16, block_columns=64),
    PackedInt4(32, symmetric=True),
    PackedInt4(64, symmetric=False),
    PackedInt4(None, symmetric=False),
    GptqInt4(32, symmetric=True),
    GptqInt4(128, symmetric=False),
    GptqInt4(64, symmetric=False, stored_zero_offset=0),
)


def stored(weight: WeightFormat) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return quantise(weight, torch.randn(ROWS, COLUMNS, generator=random) / 16).parts


def packed_numbers(weight: WeightFormat, parts: dict[str, Tensor]) -> Tensor:
    layout = layout_of(weight)
    assert layout is not None
    held = layout.empty((ROWS,), COLUMNS)
    packed = pack(weight, parts)
    assert packed.keys() == held.keys()
    for name, value in packed.items():
        assert value.dtype == held[name].dtype, name
        assert value.shape == held[name].shape, name
        held[name].copy_(value)
    return decode(layout.matrix(held))


@pytest.mark.parametrize("weight", FORMATS, ids=str)
def test_the_numbers_are_the_codecs(weight: WeightFormat) -> None:
    parts = stored(weight)
    assert torch.equal(packed_numbers(weight, parts), dequantise(weight, parts))


def test_a_divisor_becomes_a_factor() -> None:
    """In fp32 the last bit may differ: the codec divides each scale, the kernels multiply."""
    parts = stored(DIVIDED)
    torch.testing.assert_close(
        packed_numbers(DIVIDED, parts), dequantise(DIVIDED, parts), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("per_row", [False, True])
def test_one_scale_for_a_row_or_for_all(per_row: bool) -> None:
    weight = Fp8(per_row=per_row)
    scale = torch.rand(ROWS, 1) if per_row else torch.tensor(0.3)
    parts = {"weight": torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn), "weight_scale": scale}
    assert torch.equal(packed_numbers(weight, parts), dequantise(weight, parts))


@pytest.mark.parametrize(
    "weight",
    [
        Plain(),
        GptqInt4(32, symmetric=False, act_order=True),
        PackedInt4(32, symmetric=True, act_order=True),
        PackedInt4(40, symmetric=True),
        Fp8Block(block_columns=24),
    ],
    ids=str,
)
def test_formats_without_a_layout(weight: WeightFormat) -> None:
    assert layout_of(weight) is None


def test_bytes_stay_within_a_tenth_of_the_files() -> None:
    """Scales of small groups keep 16 bits; those of large ones, and of blocks, may grow."""
    for weight in (*FORMATS, GptqInt4(32, symmetric=False), Fp8Block()):
        layout = layout_of(weight)
        assert layout is not None
        rows, columns = 1024, 2048
        held = sum(part.nbytes for part in layout.empty((rows,), columns).values())
        parts = weight.parts(rows, columns).values()
        files = sum(part.num_bytes for part in parts if part.required)
        assert held <= 1.1 * files, weight


@pytest.mark.parametrize(
    ("weight", "part", "message"),
    [
        (Mxfp8(), "weight", "codes that are not a number"),
        (Nvfp4(), "weight_scale", "codes that are not a number"),
        (Mxfp8(), "weight_scale_inv", r"scales above 2 \*\* 119 or that are not a number"),
        (Mxfp4(), "weight_scale", r"scales above 2 \*\* 119 or that are not a number"),
    ],
)
def test_what_is_no_number_is_refused(weight: WeightFormat, part: str, message: str) -> None:
    parts = stored(weight)
    parts[part].view(torch.uint8)[1, 2] = 0xFF
    with pytest.raises(ValueError, match=message):
        pack(weight, parts)


def test_scales_that_16_bits_cannot_hold_are_refused() -> None:
    weight = PackedInt4(32, symmetric=True)
    parts = stored(weight)
    parts["weight_scale"] = parts["weight_scale"].float() * 1.001
    with pytest.raises(ValueError, match=r"do not fit into torch.bfloat16.*M3_PLUGIN_DEQUANTIZE=1"):
        pack(weight, parts)
    wide = replace(weight, group_size=64)
    layout = layout_of(wide)
    assert layout is not None
    assert layout.scale_dtype == torch.float32


def test_too_many_ranks() -> None:
    layout = layout_of(Mxfp8())
    assert layout is not None
    with pytest.raises(ValueError, match=r"multiples of 32 on every rank; got 48: use fewer"):
        layout.empty((4,), 48)
