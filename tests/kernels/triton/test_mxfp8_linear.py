"""The Triton kernel of `mxfp8_linear`: both ways to decode, tiles at every edge, equal bits."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.mxfp8_linear.call import Mxfp8Linear
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


def launched(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, **options: Any) -> Any:
    """Constants of each launch, in order."""
    from m3_kernels.mxfp8_linear.triton import launches

    call = Mxfp8Linear(
        x, weight, scales, options.get("group_starts"), x.new_empty(len(x), weight.shape[-2])
    )
    return [launch.arguments for launch in launches(call, arch=options.get("arch", 80))]


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "groups"])
def test_segments_of_columns_are_summed_in_one_order(grouped: bool) -> None:
    """By two launches for few tokens, within a program for many: to the same bits."""
    x, weight, scales, _ = inputs(LinearCase("segments", 70, 32, 224), torch.float32)
    few = slice(37, 40)
    options: dict[str, Any] = {}
    if grouped:
        weight = weight.view(torch.uint8).repeat(2, 1, 1).view(torch.float8_e4m3fn)
        scales = scales.repeat(2, 1, 1)
        options["group_starts"] = torch.tensor([0, 35, 70], dtype=torch.int32)
    together = mxfp8_linear(x, weight, scales, backend="triton", **options)
    assert [each["SPLIT"] for each in launched(x, weight, scales, **options)] == [False]
    if grouped:
        options["group_starts"] = torch.tensor([0, 1, 3], dtype=torch.int32)
    product, total = launched(x[few], weight, scales, **options)
    assert product["SPLIT"]
    assert total["SEGMENTS"] == 4
    alone = mxfp8_linear(x[few], weight, scales, backend="triton", **options)
    assert torch.equal(alone, together[few])


@pytest.mark.usefixtures("products_in_order")
def test_wide_tiles_of_prompts_have_the_bits_of_narrow_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("m3_kernels.tuning.INTERPRETER_ARCH", 90)
    x, weight, scales, _ = inputs(LinearCase("wide", 130, 40, 832), torch.float16)
    wide, narrow = (launched(rows, weight, scales, arch=90)[0] for rows in (x, x[:100]))
    assert (wide["TOKENS"], narrow["TOKENS"]) == (128, 32)
    together = mxfp8_linear(x, weight, scales, backend="triton")
    for some in (slice(0, 100), slice(128, 129)):
        alone = mxfp8_linear(x[some], weight, scales, backend="triton")
        assert torch.equal(alone, together[some])


def test_no_number_of_tokens_compiles_what_was_not_compiled_ahead() -> None:
    program = """
import torch
from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.mxfp8_linear.triton import compile_for_all_steps
from m3_kernels.testing.specialisations import recorded
scales = torch.empty(8, 768, 48, dtype=torch.uint8)
weight = torch.empty(8, 768, 1536, dtype=torch.uint8).view(torch.float8_e4m3fn)
with recorded(90) as ahead:
    for stored in ((weight, scales), (weight[0], scales[0])):
        compile_for_all_steps(*stored, dtype=torch.bfloat16)
with recorded(90) as serving:
    for tokens in (1, 2, 3, 16, 17, 31, 100, 256, 257, 600, 1031, 1032, 3000, 5000):
        x = torch.empty(tokens, 1536, dtype=torch.bfloat16)
        mxfp8_linear(x, weight[0], scales[0], backend="triton")
        starts = torch.zeros(9, dtype=torch.int32)
        mxfp8_linear(x, weight, scales, group_starts=starts, backend="triton")
new = set(serving) - set(ahead)
assert not new, new
assert len(set(serving)) >= 7, set(serving)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
