"""The Triton kernel of `mxfp8_linear`: both ways to decode, tiles at every edge, equal bits."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.testing.compare import assert_accurate
from tests.kernels.mxfp8 import CASES, LinearCase, every_code, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: LinearCase, dtype: torch.dtype) -> None:
    x, weight, scales, starts = inputs(case, dtype)
    exact = mxfp8_linear(x.float(), weight, scales, group_starts=starts, backend="reference")
    plain = mxfp8_linear(x, weight, scales, group_starts=starts, backend="torch")
    actual = mxfp8_linear(x, weight, scales, group_starts=starts, backend="triton")
    assert_accurate(actual, exact.double(), plain.double(), what=case.name)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_code_times_every_power_is_exact(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded by integers, and by the chip's own conversion."""
    monkeypatch.setattr("m3_kernels.tuning.INTERPRETER_ARCH", arch)
    x, weight, scales = every_code()
    # subnormal factors of a few rows, large ones of others: programs take milliseconds each
    some = torch.tensor([0, 1, 2, 110, 127, 140, 245, 246])
    weight = weight.view(torch.uint8)[some].view(torch.float8_e4m3fn)
    expected = weight.double() * 2.0 ** (scales[some].double()[:, :1] - 127)
    actual = mxfp8_linear(x, weight, scales[some], backend="triton")
    assert torch.equal(actual.T.double(), expected.float().double())


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_no_number_stays_none(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3_kernels.tuning.INTERPRETER_ARCH", arch)
    weight = torch.ones(3, 32).to(torch.float8_e4m3fn)
    weight[0, 5] = torch.nan
    scales = torch.full((3, 1), 127, dtype=torch.uint8)
    scales[1] = 255
    out = mxfp8_linear(torch.ones(2, 32), weight, scales, backend="triton")
    # the chip's conversion keeps a NaN (PTX ISA, cvt); the interpreter's makes a number of it
    kept = arch < 89
    assert out.isnan().tolist() == [[kept, True, False]] * 2


def test_a_token_s_bits_do_not_depend_on_the_others() -> None:
    x, weight, scales, _ = inputs(LinearCase("many", 40, 32, 96), torch.float16)
    together = mxfp8_linear(x, weight, scales, backend="triton")
    assert torch.equal(mxfp8_linear(x[37:39], weight, scales, backend="triton"), together[37:39])
    starts = torch.tensor([0, 35, 40], dtype=torch.int32)
    twice = weight.view(torch.uint8).repeat(2, 1, 1).view(torch.float8_e4m3fn)
    grouped = mxfp8_linear(x, twice, scales.repeat(2, 1, 1), group_starts=starts, backend="triton")
    assert torch.equal(grouped, together)
