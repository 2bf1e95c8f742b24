"""Weights that are no numbers are refused by name, in every dtype a checkpoint has."""

from __future__ import annotations

import pytest
import torch

from m3_plugin.checkpoint import finite
from m3_plugin.checkpoint.finite import require_finite
from m3_plugin.checkpoint.updates import load_first

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


class _Loaded:
    """What `load_first` asks of a loader: its parameters, and what of them was loaded."""

    def __init__(self, value: float) -> None:
        self.parameters = {"w": torch.tensor([1.0, value])}

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Nothing: the values are there."""

    def finish(self) -> set[str]:
        return {"w"}


@pytest.mark.parametrize(("text", "vision"), [(torch.nan, 1.0), (1.0, torch.inf)])
def test_a_first_load_ends_with_it(text: float, vision: float) -> None:
    """Both parts; through real servers `test_weights_that_are_no_numbers_end_the_start`."""
    assert load_first(_Loaded(1.0), _Loaded(2.0), [], prefix="m.") == {"w", "m.w"}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w holds 1 values .* at \[1\] of \[2\]"):
        load_first(_Loaded(text), _Loaded(vision), [])  # type: ignore[arg-type]
