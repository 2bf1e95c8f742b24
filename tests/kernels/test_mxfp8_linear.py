"""`mxfp8_linear` on a CPU: the decoded numbers, odd sizes, groups, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.mxfp8_linear.torch_cpu import ROWS
from m3_kernels.testing.compare import assert_accurate
from tests.kernels.mxfp8 import CASES, LinearCase, every_code, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: LinearCase, dtype: torch.dtype) -> None:
    x, weight, scales, starts = inputs(case, dtype)
    exact = mxfp8_linear(
        x.double().float(), weight, scales, group_starts=starts, backend="reference"
    )
    expected = mxfp8_linear(x, weight, scales, group_starts=starts, backend="reference")
    actual = mxfp8_linear(x, weight, scales, group_starts=starts)
    assert_accurate(actual, exact.double(), expected.double(), what=case.name)
    if case.groups is not None:
        first, last = case.before, case.tokens - case.after
        outside = torch.cat([actual[:first], actual[last:]])
        assert torch.equal(outside, torch.zeros_like(outside))


def test_every_code_times_every_power_is_exact() -> None:
    x, weight, scales = every_code()
    expected = weight.double() * 2.0 ** (scales.double()[:, :1] - 127)
    for backend in ("native", "torch", "reference"):
        actual = mxfp8_linear(x, weight, scales, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(actual.T.double(), expected.float().double())


def test_what_is_no_number_stays_none() -> None:
    weight = torch.ones(3, 32).to(torch.float8_e4m3fn)
    weight[0, 5] = torch.nan
    scales = torch.full((3, 1), 127, dtype=torch.uint8)
    scales[1] = 255
    for backend in ("torch", "reference"):
        out = mxfp8_linear(torch.ones(2, 32), weight, scales, backend=backend)  # type: ignore[arg-type]
        assert out.isnan().tolist() == [[True, True, False]] * 2


def test_a_weight_of_more_rows_than_are_decoded_at_once() -> None:
    case = LinearCase("tall", 2, ROWS + 3, 32)
    x, weight, scales, _ = inputs(case, torch.float32)
    expected = mxfp8_linear(x, weight, scales, backend="reference")
    torch.testing.assert_close(mxfp8_linear(x, weight, scales), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 32).int()}, TypeError, "x must be float32"),
        ({"weight": torch.ones(4, 32)}, TypeError, "weight must be torch.float8_e4m3fn"),
        ({"scales": torch.ones(4, 1)}, TypeError, "scales must be torch.uint8"),
        ({"x": torch.ones(2, 40)}, ValueError, "x must have a multiple of 32 columns; got 40"),
        ({"x": torch.ones(2, 64)}, ValueError, r"weight must be \[rows, columns\] = \[\*, 64\]"),
        (
            {"scales": torch.ones(4, 2).byte()},
            ValueError,
            r"scales must be \[rows, columns / 32\] = \[4, 1\]",
        ),
        (
            {"group_starts": torch.zeros(2).int()},
            ValueError,
            r"weight must be \[groups, rows, columns\]",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 32),
        "weight": torch.ones(4, 32).to(torch.float8_e4m3fn),
        "scales": torch.ones(4, 1).byte(),
    }
    with pytest.raises(error, match=message):
        mxfp8_linear(**(arguments | changes))


def test_groups_are_one_more_than_starts() -> None:
    weight = torch.ones(2, 4, 32).to(torch.float8_e4m3fn)
    scales = torch.ones(2, 4, 1).byte()
    with pytest.raises(ValueError, match=r"group_starts must be \[groups \+ 1\] = \[3\]"):
        mxfp8_linear(torch.ones(2, 32), weight, scales, group_starts=torch.zeros(2).int())
