"""Weights that are no numbers are refused by name, in every dtype a checkpoint has."""

from __future__ import annotations

import pytest
import torch

from m3_plugin.checkpoint import finite
from m3_plugin.checkpoint.finite import require_finite

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *[(dtype, torch.nan) for dtype in (*FLOATS, *BYTES)],
        # e4m3fn has no infinities
        *[(dtype, sign * torch.inf) for dtype in (*FLOATS, torch.float8_e5m2) for sign in (1, -1)],
    ],
)
def test_one_bad_value_is_found(
    dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_PART", 100)
    weights = torch.randn(8, 6, 5)
    good = weights.clone().to(dtype)
    require_finite({"w": good}, ["w"])
    weights[5, 2, 3] = weights[7, 0, 0] = value
    with pytest.raises(ValueError, match=r"^w holds 2 values .* at \[5, 2, 3\] of \[8, 6, 5\]"):
        require_finite({"v": good, "w": weights.to(dtype)}, ["w", "v"])


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES])
def test_large_numbers_are_numbers(dtype: torch.dtype) -> None:
    """Their sum is none."""
    largest = torch.full((300,), torch.finfo(dtype).max, dtype=torch.float32).to(dtype)
    require_finite({"w": largest}, ["w"])


def test_what_is_no_weight_of_the_checkpoint_is_passed_over() -> None:
    codes = torch.full((4,), 255, dtype=torch.uint8)
    elsewhere = torch.empty(4, device="meta")
    unset = torch.full((4,), torch.nan)
    require_finite({"codes": codes, "meta": elsewhere, "unset": unset}, ["codes", "meta"])


def test_a_view_is_looked_at_as_it_is() -> None:
    weights = torch.randn(6, 8)
    weights[:, 1] = torch.nan
    require_finite({"w": weights[:, ::2]}, ["w"])
    with pytest.raises(ValueError, match=r"at \[0, 0\]"):
        require_finite({"w": weights[:, 1::2]}, ["w"])
