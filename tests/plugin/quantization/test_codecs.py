"""Codecs: what quantisers stored comes back exactly, whatever library or hand packed it."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3_plugin.checkpoint.stream import SAFETENSORS_NAMES
from m3_plugin.quantization.codecs import (
    E2M1_VALUES,
    dequantise,
    powers_of_two,
    unpack_e2m1,
    unpack_nibbles,
)
from m3_plugin.quantization.formats import (
    DTYPE_BYTES,
    Fp8,
    Fp8Block,
    GptqInt4,
    Mxfp4,
    Mxfp8,
    Nvfp4,
    PackedInt4,
    Plain,
    WeightFormat,
    stored_bytes,
)
from m3_plugin.testing.quantised import quantise

FORMATS: dict[str, WeightFormat] = {
    "mxfp8": Mxfp8(),
    "mxfp8 of ModelOpt": Mxfp8(scale="weight_scale"),
    "mxfp4": Mxfp4(),
    "nvfp4 of ModelOpt": Nvfp4(),
    "nvfp4 of compressed-tensors": Nvfp4(
        weight="weight_packed", global_scale="weight_global_scale", divides=True
    ),
    "int4": PackedInt4(32, symmetric=True),
    "int4 with zero points": PackedInt4(32, symmetric=False),
    "int4 per row": PackedInt4(None, symmetric=False),
    "gptq": GptqInt4(32, symmetric=False),
    "gptq reordered": GptqInt4(32, symmetric=False, act_order=True),
    "gptq symmetric": GptqInt4(64, symmetric=True),
    "gptq second version": GptqInt4(32, symmetric=False, stored_zero_offset=0),
    "fp8 blocks": Fp8Block(),
    "fp8 per tensor": Fp8(),
    "fp8 per row": Fp8(per_row=True),
}
# Largest relative rounding of a normal distribution, with room; a wrong scale or order is beyond.
ROUNDING = {"mxfp8": 0.03, "fp8": 0.03, "fp8-block": 0.03}


def random_weight(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 20).map(lambda n: 8 * n),
    columns=st.integers(1, 6).map(lambda n: 64 * n),
    scale=st.sampled_from([1e-4, 1.0, 3e3]),
    seed=st.integers(0, 1000),
)
def test_stored_weights_mean_what_was_rounded(
    name: str, rows: int, columns: int, scale: float, seed: int
) -> None:
    weight = FORMATS[name]
    values = random_weight(rows, columns, seed=seed) * scale
    quantised = quantise(weight, values)
    decoded = dequantise(weight, quantised.parts)
    assert decoded.shape == (rows, columns)
    # a reciprocal is stored where the format divides, so the last bit may differ
    torch.testing.assert_close(decoded, quantised.values, rtol=3e-7, atol=0)
    if scale == 1.0:
        error = float((decoded - values).norm() / values.norm())
        assert error < ROUNDING.get(weight.name, 0.15)


@pytest.mark.parametrize("name", [name for name in FORMATS if "int4" in name or "gptq" in name])
def test_four_bits_hold_what_lies_on_a_coarser_grid(name: str) -> None:
    """Powers of two within a factor of 4, of 8 where all are positive."""
    draw = torch.Generator().manual_seed(3)
    steps = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0])[torch.randint(5, (64, 128), generator=draw)]
    signs = torch.randint(2, (64, 128), generator=draw) * 2 - 1
    # 8 steps of 0.25 to the positive side are one more than there are
    one_sided, two_sided = steps, steps.where(steps >= 0.5, 0.0) * signs
    weight = FORMATS[name]
    assert torch.equal(quantise(weight, two_sided).values, two_sided)
    if not weight.symmetric:  # type: ignore[attr-defined]
        assert torch.equal(quantise(weight, one_sided).values, one_sided)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_described_as_they_are_stored(name: str) -> None:
    weight = FORMATS[name]
    stored = quantise(weight, random_weight(136, 192, seed=1)).parts
    described = weight.parts(136, 192)
    assert {s for s, part in described.items() if part.required} <= stored.keys()
    for suffix, tensor in stored.items():
        assert tuple(tensor.shape) in described[suffix].shapes
        assert SAFETENSORS_NAMES[tensor.dtype] in described[suffix].dtypes
    required = [stored[s] for s, part in described.items() if part.required]
    assert sum(t.nbytes for t in required) == stored_bytes(weight, rows=136, columns=192)


def test_dtype_sizes_are_torch_s() -> None:
    assert all(DTYPE_BYTES[name] == dtype.itemsize for dtype, name in SAFETENSORS_NAMES.items())


@pytest.mark.parametrize(
    ("weight", "shape", "said"),
    [
        (Mxfp8(), (8, 48), "multiples of 32; got 48"),
        (Nvfp4(), (8, 24), "multiples of 16; got 24"),
        (PackedInt4(128, symmetric=True), (8, 192), "multiples of 128; got 192"),
        (GptqInt4(32, symmetric=True), (12, 64), "output channels in multiples of 8; got 12"),
    ],
)
def test_impossible_shapes_are_refused(weight: WeightFormat, shape: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        weight.parts(*shape)


def test_every_power_of_two() -> None:
    powers = powers_of_two(torch.arange(256, dtype=torch.uint8)).double()
    assert powers[:255].tolist() == [math.ldexp(1.0, stored - 127) for stored in range(255)]
    assert powers[255].isnan()


def test_powers_in_torch_s_own_dtype() -> None:
    stored = torch.tensor([0, 1, 127, 254], dtype=torch.uint8)
    assert powers_of_two(stored.view(torch.float8_e8m0fnu)).equal(powers_of_two(stored))


def test_every_e2m1_code_and_its_place_in_the_byte() -> None:
    """By the OCP definition: sign, exponent of two bits with bias 1, one bit of mantissa."""

    def value(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        if exponent == 0:
            return sign * mantissa / 2
        return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)

    packed = torch.arange(256, dtype=torch.uint8)
    expected = [[value(byte & 15), value(byte >> 4)] for byte in range(256)]
    assert unpack_e2m1(packed).view(256, 2).tolist() == expected
    assert [value(code) for code in range(8)] == list(E2M1_VALUES)


@given(st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_nibbles_of_a_word(values: list[int]) -> None:
    word = sum(value << (4 * place) for place, value in enumerate(values))
    word -= (word >= 2**31) * 2**32
    assert unpack_nibbles(torch.tensor([[word]], dtype=torch.int32)).tolist() == [values]


def test_a_format_without_codec_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no codec for dict"):
        dequantise({}, {})  # type: ignore[arg-type]


def test_plain_is_itself() -> None:
    weight = random_weight(4, 4, seed=0).bfloat16()
    assert dequantise(Plain(), {"weight": weight}).equal(weight.float())


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors not here"
)
class TestCompressedTensorsLibrary:
    """The library that writes W4A16, AWQ, NVFP4, MXFP4 and MXFP8 reads ours the same."""

    @pytest.mark.parametrize(
        ("weight", "stored", "options"),
        [
            (
                PackedInt4(32, symmetric=True),
                "pack-quantized",
                {"num_bits": 4, "strategy": "group", "group_size": 32},
            ),
            (
                PackedInt4(32, symmetric=False),
                "pack-quantized",
                {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
            ),
            (
                Nvfp4(weight="weight_packed", global_scale="weight_global_scale", divides=True),
                "nvfp4-pack-quantized",
                {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            ),
            (
                Mxfp4(weight="weight_packed"),
                "mxfp4-pack-quantized",
                {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
            ),
            (
                Mxfp8(scale="weight_scale"),
                "mxfp8-quantized",
                {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
            ),
        ],
        ids=["int4", "int4 with zero points", "nvfp4", "mxfp4", "mxfp8"],
    )
    def test_same_numbers(self, weight: WeightFormat, stored: str, options: dict) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        quantised = quantise(weight, random_weight(64, 128, seed=3))
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**options))
        library = BaseCompressor.load_from_registry(stored)
        theirs = library.decompress(dict(quantised.parts), scheme)["weight"]
        assert theirs is not None
        ours = dequantise(weight, quantised.parts)
        # the library computes in the scales' dtype, bf16 for some formats
        torch.testing.assert_close(ours, theirs.float(), rtol=8e-3, atol=1e-6)
