"""Single instructions of the PTX interpreter, against numbers computed in other ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m3_kernels.testing.ptx.arithmetic import high_of_64
from m3_kernels.testing.ptx.values import fp8_of, fused_multiply_add, of_fp8
from tests.kernels.ptx.handwritten import computed

RANDOM = torch.Generator().manual_seed(0)


def integers(dtype: torch.dtype, count: int = 64) -> Tensor:
    """Of all magnitudes and both signs, and the edges."""
    bits = torch.iinfo(dtype).bits
    wide = torch.randint(-(2**62), 2**62, (count,), generator=RANDOM)
    found = (wide >> torch.randint(64 - bits, 63, (count,), generator=RANDOM)).to(dtype)
    limits = torch.iinfo(dtype)
    found[:5] = torch.tensor([0, 1, -1, limits.max, limits.min])
    return found


def signed(value: int, bits: int) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >> bits - 1 else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


U32, S32 = 2**32 - 1, 32
INTEGER_CASES: dict[str, tuple[str, Callable[..., int]]] = {
    "add": ("add.s32 {d}, {a}, {b};", lambda a, b: a + b),
    "sub": ("sub.s32 {d}, {a}, {b};", lambda a, b: a - b),
    "mul": ("mul.lo.s32 {d}, {a}, {b};", lambda a, b: a * b),
    "mul.hi": ("mul.hi.s32 {d}, {a}, {b};", lambda a, b: a * b >> 32),
    "mul.hi.u": ("mul.hi.u32 {d}, {a}, {b};", lambda a, b: (a & U32) * (b & U32) >> 32),
    "mad": ("mad.lo.s32 {d}, {a}, {b}, {a};", lambda a, b: a * b + a),
    "div": ("div.s32 {d}, {a}, {b};", lambda a, b: quotient(a, b) if b else -1),
    "div.u": ("div.u32 {d}, {a}, {b};", lambda a, b: (a & U32) // (b & U32) if b else -1),
    "rem": ("rem.s32 {d}, {a}, {b};", lambda a, b: a - quotient(a, b) * b if b else -1),
    "min": ("min.s32 {d}, {a}, {b};", min),
    "max.u": ("max.u32 {d}, {a}, {b};", lambda a, b: max(a & U32, b & U32)),
    "abs": ("abs.s32 {d}, {a};", lambda a, b: abs(a)),
    "neg": ("neg.s32 {d}, {a};", lambda a, b: -a),
    "and": ("and.b32 {d}, {a}, {b};", lambda a, b: a & b),
    "not": ("not.b32 {d}, {a};", lambda a, b: ~a),
    "shl": ("shl.b32 {d}, {a}, 5;", lambda a, b: a << 5),
    "shl by b": (
        "and.b32 {b}, {b}, 63; shl.b32 {d}, {a}, {b};",
        lambda a, b: a << (b & 63) if b & 63 < 32 else 0,
    ),
    "shr": ("shr.s32 {d}, {a}, 31;", lambda a, b: a >> 31),
    "shr by b": ("and.b32 {b}, {b}, 63; shr.s32 {d}, {a}, {b};", lambda a, b: a >> (b & 63)),
    "shr.u": ("shr.u32 {d}, {a}, 25;", lambda a, b: (a & U32) >> 25),
    "bfe.u": ("bfe.u32 {d}, {a}, 4, 3;", lambda a, b: a >> 4 & 7),
    "bfe.s": ("bfe.s32 {d}, {a}, 2, 1;", lambda a, b: -(a >> 2 & 1)),
    "bfe.s past the end": ("bfe.s32 {d}, {a}, 30, 8;", lambda a, b: a >> 30),
    "popc": ("popc.b32 {d}, {a};", lambda a, b: (a & U32).bit_count()),
    "clz": ("clz.b32 {d}, {a};", lambda a, b: 32 - (a & U32).bit_length()),
    "bfi": (
        "bfi.b32 {d}, {a}, {b}, 5, 9;",
        lambda a, b: b & ~(511 << 5) | (a & 511) << 5,
    ),
    "lop3 of a | (b & c)": (
        "lop3.b32 {d}, {a}, 0x0ff0ff00, {b}, 0xf8;",
        lambda a, b: a | 0x0FF0FF00 & b,
    ),
    "lop3 of a & b": ("lop3.b32 {d}, {a}, {b}, 0, 0xc0;", lambda a, b: a & b),
    "lop3 of a ^ b ^ c": ("lop3.b32 {d}, {a}, {b}, 3, 0x96;", lambda a, b: a ^ b ^ 3),
    "setp and selp": (
        "setp.lt.s32 %p1, {a}, {b}; selp.b32 {d}, {a}, 7, %p1;",
        lambda a, b: a if a < b else 7,
    ),
    "setp of unsigned": (
        "setp.lt.u32 %p1, {a}, {b}; selp.b32 {d}, 1, 0, %p1;",
        lambda a, b: (a & U32) < (b & U32),
    ),
    "setp and a predicate": (
        "setp.ne.b32 %p1, {b}, 0; setp.gt.and.s32 %p2, {a}, 5, %p1; selp.b32 {d}, -1, 0, %p2;",
        lambda a, b: -(a > 5 and b != 0),
    ),
    "guarded": (
        "mov.b32 {d}, {b}; setp.gt.s32 %p1, {a}, 0; @!%p1 add.s32 {d}, {a}, 3;",
        lambda a, b: b if a > 0 else a + 3,
    ),
    "through 16 bits": (
        "cvt.u16.u32 %rs1, {a}; cvt.s32.s16 {d}, %rs1;",
        lambda a, b: signed(a, 16),
    ),
    "parts": (
        "mov.b32 {{%rs1, %rs2}}, {a}; mov.b32 {d}, {{%rs2, %rs1}};",
        lambda a, b: (a & 0xFFFF) << 16 | a >> 16 & 0xFFFF,
    ),
}


@pytest.mark.parametrize("name", INTEGER_CASES)
def test_integers(name: str) -> None:
    text, expected = INTEGER_CASES[name]
    a, b = integers(torch.int32), integers(torch.int32)[torch.randperm(64, generator=RANDOM)]
    a[10:15] = b[10:15]
    found = computed(text, a, b, result=torch.int32)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert found.tolist() == [signed(expected(*pair), S32) for pair in pairs]


WIDE_CASES: dict[str, tuple[str, Callable[..., int]]] = {
    "mul.wide": ("mul.wide.s32 {d}, {a}, {b};", lambda a, b: a * b),
    "mad.wide": ("mov.b64 {d}, 9; mad.wide.u32 {d}, {a}, 4, {d};", lambda a, b: 4 * (a & U32) + 9),
    "cvt.s64": ("cvt.s64.s32 {d}, {a};", lambda a, b: a),
    "cvt.u64": ("cvt.u64.u32 {d}, {a};", lambda a, b: a & U32),
    "halves": ("mov.b64 {d}, {{{a}, {b}}};", lambda a, b: (a & U32) | b << 32),
    "upper half": (
        "mov.b64 {d}, {{{a}, {b}}}; mov.b64 {{_, %r9}}, {d}; cvt.u64.u32 {d}, %r9;",
        lambda a, b: b & U32,
    ),
}


@pytest.mark.parametrize("name", WIDE_CASES)
def test_into_64_bits(name: str) -> None:
    text, expected = WIDE_CASES[name]
    a, b = integers(torch.int32), integers(torch.int32).flip(0)
    found = computed(text, a, b, result=torch.int64)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert found.tolist() == [signed(expected(*pair), 64) for pair in pairs]


def test_products_of_64_bits() -> None:
    a, b = integers(torch.int64), integers(torch.int64).flip(0)
    found = computed("mul.hi.s64 {d}, {a}, {b};", a, b, result=torch.int64)
    assert found.tolist() == [x * y >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    unsigned = [x.numpy().view(np.uint64) for x in (a, b)]
    exact = [int(x) * int(y) >> 64 for x, y in zip(*unsigned, strict=True)]
    assert high_of_64(*unsigned).tolist() == exact


@pytest.mark.parametrize("selector", [0x5410, 0x7632, 0x3276, 0x5140, 0x7773, 0xFBA9, 0x0])
@pytest.mark.parametrize("of_register", [False, True])
def test_prmt(selector: int, of_register: bool) -> None:
    a, b = integers(torch.int32), integers(torch.int32).flip(0)
    text = f"mov.b32 %r9, {selector}; " + "prmt.b32 {d}, {a}, {b}, "
    text += "%r9;" if of_register else f"0x{selector:x}U;"
    found = computed(text, a, b, result=torch.int32)

    def expected(a: int, b: int) -> int:
        data = (a & U32).to_bytes(4, "little") + (b & U32).to_bytes(4, "little")
        result = 0
        for place in range(4):
            nibble = selector >> 4 * place & 15
            byte = data[nibble & 7]
            if nibble & 8:
                byte = 0xFF if byte & 0x80 else 0
            result |= byte << 8 * place
        return signed(result, 32)

    assert found.tolist() == [expected(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]


SPECIAL = torch.tensor(
    [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 3e38, -3e38, 1e-40, 2.5, 3.5]
)


def floats() -> tuple[Tensor, Tensor]:
    """Every pair of special ones, and random ones."""
    pairs = torch.cartesian_prod(SPECIAL, SPECIAL)
    random = torch.randn(112, 2, generator=RANDOM) * 100
    a, b = torch.cat([pairs, random]).unbind(1)
    return a, b


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add.f32 {d}, {a}, {b};", torch.add),
        ("sub.rn.f32 {d}, {a}, {b};", torch.sub),
        ("mul.f32 {d}, {a}, {b};", torch.mul),
        ("div.rn.f32 {d}, {a}, {b};", torch.div),
        ("max.f32 {d}, {a}, {b};", torch.fmax),
        ("min.f32 {d}, {a}, {b};", torch.fmin),
        ("max.NaN.f32 {d}, {a}, {b};", torch.maximum),
        ("sqrt.rn.f32 {d}, {a};", lambda a, b: a.double().sqrt().float()),
        ("abs.f32 {d}, {a};", lambda a, b: a.abs()),
        ("cvt.rni.f32.f32 {d}, {a};", lambda a, b: a.round()),
    ],
)
def test_floats(text: str, expected: Callable[..., Tensor]) -> None:
    a, b = floats()
    found = computed(text, a, b, result=torch.float32)
    torch.testing.assert_close(found, expected(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_of_floats(name: str) -> None:
    a, b = floats()
    text = "setp.{}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;"
    ordered, unordered = (
        computed(text.format(name + end), a, b, result=torch.int32) == 1 for end in ("", "u")
    )
    nan = a.isnan() | b.isnan()
    assert torch.equal(ordered, getattr(torch, name)(a, b) & ~nan)
    assert torch.equal(unordered, getattr(torch, name)(a, b) | nan)


def rounded(value: Fraction) -> float:
    """The nearest float32, ties to even, of a number of ordinary size."""
    if not value:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) - 23
    unit = Fraction(2) ** exponent
    scaled = value / unit
    if not 2**23 <= abs(scaled) < 2**24:
        unit = unit * 2 if abs(scaled) >= 2**24 else unit / 2
        scaled = value / unit
    return float(round(scaled) * unit)


def test_fma_rounds_once() -> None:
    a, b, c = (torch.randn(256, generator=RANDOM) for _ in range(3))
    # sums that lie a hair beside the middle between two numbers, which float64 does not see
    a[:64] = 1 + 2.0**-23 * torch.randint(1, 2**20, (64,), generator=RANDOM)
    b[:64] = 1 + 2.0**-23 * torch.randint(1, 2**20, (64,), generator=RANDOM)
    c[:64] = 2.0**30 * (1 + 2.0**-23 * torch.arange(64))
    c[64:96] = -a[64:96] * b[64:96]
    a[96], b[96], c[96] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    a[97], b[97], c[97] = 1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)
    found = computed("fma.rn.f32 {d}, {a}, {b}, {c};", a, b, c, result=torch.float32)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        assert got == rounded(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)
    # 2^-24 of 1 is the middle between two numbers
    double = (a.double() * b.double() + c.double()).float()
    assert found[96] != double[96] or found[97] != double[97]


def test_fma_of_what_is_no_number() -> None:
    given = [SPECIAL.numpy()[list(part)] for part in _triples()]
    with np.errstate(all="ignore"):
        found = fused_multiply_add(*given)
        # in float64 none of these products overflows
        a, b, c = (part.astype(np.float64) for part in given)
        wide = (a * b + c).astype(np.float32)
    np.testing.assert_array_equal(found, wide)


def _triples() -> Any:
    return zip(*itertools.product(range(len(SPECIAL)), repeat=3), strict=True)


def test_ex2_flushes_and_saturates() -> None:
    a = torch.tensor([0.0, 1.0, -1.0, 10.5, -130.0, -math.inf, 200.0, math.nan, -126.0])
    found = computed("ex2.approx.ftz.f32 {d}, {a};", a, result=torch.float32)
    expected = torch.exp2(a.double()).float()
    expected[4] = 0
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0, equal_nan=True)


def half_ways() -> Tensor:
    """float32 numbers around every 37th bf16 number: it, the middle to the next, and beside it."""
    bits = torch.arange(0, 2**16, 37, dtype=torch.int32) << 16
    near = [bits + offset for offset in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    return torch.cat(near).view(torch.float32)


def test_bf16_rounds_ties_to_even() -> None:
    values = half_ways()
    found = computed("cvt.rn.bf16.f32 {d}, {a};", values, result=torch.int16)
    torch.testing.assert_close(
        found.view(torch.bfloat16), values.bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    ties = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    up_and_down = computed("cvt.rn.bf16.f32 {d}, {a};", ties, result=torch.int16)
    assert up_and_down.tolist() == [0x3F80, 0x3F82]


def test_pairs_of_bf16() -> None:
    values = half_ways()
    pairs = computed("cvt.rn.bf16x2.f32 {d}, {a}, {b};", values, values.flip(0), result=torch.int32)
    low, high = pairs.view(torch.bfloat16).view(-1, 2).unbind(1)
    torch.testing.assert_close(high, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(low, values.flip(0).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_and_f16_are_read_as_they_are() -> None:
    bits = torch.arange(-(2**15), 2**15, 11).to(torch.int16)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        found = computed(f"cvt.f32.{name} {{d}}, {{a}};", bits, result=torch.float32)
        wanted = bits.view(dtype).float()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_f16_to_nearest_and_towards_zero() -> None:
    values = torch.cat([half_ways(), torch.randn(2000, generator=RANDOM) * 1000])
    values = values[values.abs() < 60000]
    nearest = computed("cvt.rn.f16.f32 {d}, {a};", values, result=torch.int16).view(torch.float16)
    assert torch.equal(nearest, values.half())
    cut = computed("cvt.rz.f16.f32 {d}, {a};", values, result=torch.int16).view(torch.float16)
    assert (cut.float().abs() <= values.abs()).all()
    further = (cut.view(torch.int16) + 1).view(torch.float16)
    assert (further.float().abs() > values.abs()).all()


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_8_bit_floats(name: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(dtype).float()
    np.testing.assert_array_equal(of_fp8(codes.numpy(), name), values.numpy())
    # every number, every middle between two, and either side of that
    finite = values[values.isfinite()].unique()
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [middle * (1 + 1e-6), middle * (1 - 1e-6)]
    given = torch.cat([finite, middle, *beside, torch.tensor([1e9, -1e9, math.inf, -math.inf])])
    wanted = given.clamp(-finite.max(), finite.max()).to(dtype).float()
    found = torch.from_numpy(of_fp8(fp8_of(given.numpy(), name), name))
    assert torch.equal(found, wanted)
    assert of_fp8(fp8_of(np.array([np.nan], np.float32), name), name)[0] != 0


def test_e4m3_as_the_kernels_convert_it() -> None:
    codes = torch.arange(256).to(torch.uint8)
    pairs = torch.stack([codes, codes.flip(0)], dim=1).view(torch.int16).flatten()
    found = computed("cvt.rn.f16x2.e4m3x2 {d}, {a};", pairs, result=torch.int32)
    low, high = found.view(torch.float16).view(-1, 2).unbind(1)
    for got, of in ((low, codes), (high, codes.flip(0))):
        wanted = of.view(torch.float8_e4m3fn).half()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    back = computed("cvt.rn.satfinite.e4m3x2.f16x2 {d}, {a};", found, result=torch.int16)
    same = back.view(torch.uint8).view(-1, 2)[:, 0].view(torch.float8_e4m3fn).float()
    wanted = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(same, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("cvt.rn.f32.s32", torch.int32, lambda a: a.float()),
        ("cvt.rn.f32.s8", torch.int8, lambda a: a.float()),
    ],
)
def test_integers_to_floats(
    text: str, source: torch.dtype, expected: Callable[[Tensor], Tensor]
) -> None:
    a = integers(source)
    found = computed(f"{text} {{d}}, {{a}};", a, result=torch.float32)
    assert torch.equal(found, expected(a))


def test_floats_to_integers_saturate() -> None:
    a = torch.tensor([1.9, -1.9, 3e9, -3e9, math.nan, math.inf, 2.5, -0.4])
    found = computed("cvt.rzi.s32.f32 {d}, {a};", a, result=torch.int32)
    top, bottom = 2**31 - 1, -(2**31)
    assert found.tolist() == [1, -1, top, bottom, 0, top, 2, 0]
    near = computed("cvt.rni.s32.f32 {d}, {a};", a, result=torch.int32)
    assert near.tolist() == [2, -2, top, bottom, 0, top, 2, 0]


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"`sin\.approx\.f32 .*no such instruction"):
        computed("sin.approx.f32 {d}, {a};", SPECIAL, result=torch.float32)
    with pytest.raises(NotImplementedError, match=r"add\.rz\.f32"):
        computed("add.rz.f32 {d}, {a}, {a};", SPECIAL, result=torch.float32)
