"""`quantised_linear` and `quantised_experts`: every kind and code, odd sizes, bits, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.quantised_experts import quantised_experts
from m3_kernels.quantised_linear import quantised_linear
from m3_kernels.quantised_linear.decoding import decode
from m3_kernels.quantised_linear.reference import decoded_matrix
from m3_kernels.stored_matrix import Kind, StoredMatrix
from m3_kernels.testing.compare import assert_accurate
from tests.kernels.stored import VARIANTS, random_matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS: Any = ("native", "torch")
SWIGLU: dict[str, Any] = {"alpha": 1.702, "limit": 7.0, "beta": 1.0}
each_variant = pytest.mark.parametrize(
    ("kind", "options"), VARIANTS, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(VARIANTS)]
)


def rows_of(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count, columns] with NaN beside it."""
    random = torch.Generator().manual_seed(count)
    around = torch.full((count, columns + 8), torch.nan, dtype=dtype)
    around[:, :columns] = torch.randn(count, columns, generator=random)
    return around[:, :columns]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@each_variant
def test_every_weight_is_decoded_to_the_bit(
    kind: Kind, options: dict[str, Any], backend: Any
) -> None:
    """A row of x that is 1 in one column and 0 elsewhere reads the weights of that column."""
    matrix = random_matrix(kind, (37, 416), **options)
    for count in (4, 416):
        read = quantised_linear(torch.eye(416)[-count:], matrix, backend=backend)
        assert torch.equal(read.T, decoded_matrix(matrix)[:, -count:])
    assert torch.equal(decode(matrix), decoded_matrix(matrix))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
def test_equals_the_oracle(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, backend: Any
) -> None:
    """Groups of one row, few, many and none; a tile of weights that is not full."""
    counts = torch.tensor([0, 1, 0, 3, 4, 5, 101])
    starts = (counts.cumsum(0) + 2).int()
    matrix = random_matrix(kind, (len(counts) - 1, 21, 272), **options)
    x = rows_of(int(starts[-1]) + 1, 272, dtype)
    exact = quantised_linear(x.float(), matrix, group_starts=starts, backend="reference")
    expected = quantised_linear(x, matrix, group_starts=starts, backend="torch")
    actual = quantised_linear(x, matrix, group_starts=starts, backend=backend)
    assert_accurate(actual, exact.double(), expected.double(), what=kind)
    outside = torch.cat([actual[:2], actual[-1:]])
    assert torch.equal(outside, torch.zeros_like(outside))


@each_variant
def test_bits_do_not_depend_on_rows_beside_or_threads(kind: Kind, options: dict[str, Any]) -> None:
    matrix = random_matrix(kind, (2, 80, 416), **options)
    x = rows_of(230, 416)
    together = quantised_linear(x, matrix, group_starts=torch.tensor([0, 100, 230]).int())
    for count in (1, 2, 3, 4, 7, 98):
        starts = torch.tensor([0, 0, count]).int()
        with threads(1):
            alone = quantised_linear(x[-count:], matrix, group_starts=starts)
        assert torch.equal(alone, together[-count:]), count


def experts_of(
    kind: Kind, options: dict[str, Any], *, experts: int = 5
) -> tuple[StoredMatrix, StoredMatrix]:
    """Two matrices for hidden 128 and intermediate 96."""
    w13 = random_matrix(kind, (experts, 192, 128), **options)
    return w13, random_matrix(kind, (experts, 128, 96), seed=1, **options)


def routing(tokens: int, *, experts: int = 5, choices: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=random).argsort(1)[:, :choices].int()
    return {"expert_ids": ids, "expert_weights": torch.rand(tokens, choices, generator=random)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
def test_experts_equal_the_oracle(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, backend: Any
) -> None:
    w13, w2 = experts_of(kind, options)
    # gates around 1, and some beyond the clamp
    size = float(decoded_matrix(w13.part(0, slice(None))).square().mean().sqrt()) * 128**0.5
    x = (rows_of(19, 128) / size * torch.tensor([1.0, 20.0]).repeat(10)[:19, None]).to(dtype)
    chosen = routing(19)
    # of another rank, and no expert at all
    chosen["expert_ids"][3, 0], chosen["expert_ids"][4] = 7, -1
    exact = quantised_experts(x.float(), w13, w2, **chosen, **SWIGLU, backend="reference")
    expected = quantised_experts(x, w13, w2, **chosen, **SWIGLU, backend="torch")
    actual = quantised_experts(x, w13, w2, **chosen, **SWIGLU, backend=backend)
    assert_accurate(actual, exact.double(), expected.double(), what=kind)
    assert not actual[4].any()


def test_bits_of_experts_do_not_depend_on_tokens_beside_or_threads() -> None:
    for kind, options in VARIANTS:
        w13, w2 = experts_of(kind, options)
        x, chosen = rows_of(300, 128) / 300, routing(300)
        together = quantised_experts(x, w13, w2, **chosen, **SWIGLU)
        for count in (1, 2, 3, 5, 120):
            part = {name: value[-count:] for name, value in chosen.items()}
            with threads(1):
                alone = quantised_experts(x[-count:], w13, w2, **part, **SWIGLU)
            assert torch.equal(alone, together[-count:]), (kind, count)


def test_no_tokens() -> None:
    w13, w2 = experts_of("int4", {})
    none = torch.zeros(0, 128)
    for backend in BACKENDS:
        assert quantised_experts(none, w13, w2, **routing(0), **SWIGLU).shape == (0, 128)
        matrix = w13.part(0, slice(None))
        assert quantised_linear(none, matrix, backend=backend).shape == (0, 192)


CODES = torch.zeros(4, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("int8", CODES), ValueError, "kind must be one of plain, mxfp8"),
        (("plain", CODES), TypeError, "codes must be float32, bfloat16 or float16"),
        (("fp8", CODES.float()), TypeError, "codes must be torch.uint8"),
        (("fp8", CODES[0]), ValueError, "codes must be"),
        (("fp8", CODES), ValueError, "scales must be given for fp8"),
        (("plain", CODES.float(), CODES), ValueError, "scales must be None for plain"),
        (("plain", torch.zeros(4, 40)), ValueError, "columns must be a multiple of 16; got 40"),
        (("mxfp8", CODES, CODES[:, :2], 64), ValueError, "group must be 32 for mxfp8; got 64"),
        (("fp8", CODES, CODES[:, :2].float(), 40), ValueError, "a multiple of 16 above 0"),
        (("fp8", CODES, CODES[:, :2].contiguous(), 32), TypeError, "scales must be torch.float32"),
        (("fp8", CODES, CODES[:, :2].float(), 64), ValueError, r"scales must be .* = \[4, 1\]"),
        (("fp8", CODES, CODES[:, ::32].float(), 32, CODES), ValueError, "zeros must be None"),
        (("nvfp4", CODES, CODES[:, :8], 16), ValueError, "factors must be given for nvfp4"),
        (("fp8", CODES.T.contiguous().T, CODES[:, :1].float(), 64), ValueError, "contiguous"),
    ],
)
def test_matrices_that_are_none(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StoredMatrix(*arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 32).int()}, TypeError, "x must be float32"),
        ({"x": torch.ones(2, 64)}, ValueError, r"x must be \[T, columns\] = \[\*, 32\]"),
        ({"group_starts": torch.zeros(2).int()}, ValueError, "group_starts must be given for"),
        ({"backend": "triton"}, NotImplementedError, "triton"),
    ],
)
def test_products_that_are_none(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.ones(2, 32), "weight": random_matrix("mxfp8", (4, 32))}
    with pytest.raises(error, match=message):
        quantised_linear(**(arguments | changes))


@pytest.mark.parametrize("starts", [[0, 2, 1], [-1, 0, 2], [0, 1, 3]])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_starts_outside_of_x(starts: list[int], backend: Any) -> None:
    matrix = random_matrix("mxfp8", (2, 4, 32))
    with pytest.raises(ValueError, match="group_starts must rise from 0 or more to at most T = 2"):
        quantised_linear(
            torch.ones(2, 32), matrix, group_starts=torch.tensor(starts).int(), backend=backend
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 64)}, ValueError, r"x must be \[T, hidden\] = \[\*, 128\]"),
        ({"w2": random_matrix("mxfp8", (5, 128, 192))}, ValueError, "w13 must be"),
        ({"w13": random_matrix("mxfp8", (192, 128))}, ValueError, "w13 must be"),
        ({"expert_ids": torch.zeros(2, 3)}, TypeError, "expert_ids must be torch.int32"),
        ({"expert_weights": torch.zeros(2, 2)}, ValueError, "expert_weights must be"),
    ],
)
def test_experts_that_are_none(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    w13, w2 = experts_of("mxfp8", {})
    arguments: dict[str, Any] = {"x": torch.ones(2, 128), "w13": w13, "w2": w2, **routing(2)}
    with pytest.raises(error, match=message):
        quantised_experts(**(arguments | changes), **SWIGLU)
