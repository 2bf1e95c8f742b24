"""One state of a model is told from another by a few of its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3_plugin.checkpoint.samples import digest

WEIGHTS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(70, 90),
    "c": torch.zeros(4, dtype=torch.float8_e4m3fn),
}


def test_the_same_weights_have_the_same_digest() -> None:
    again = {name: WEIGHTS[name].clone() for name in reversed(WEIGHTS)}
    assert digest(again) == digest(WEIGHTS)
    assert len(digest(WEIGHTS)) == 16


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.arange(6.0).view(3, 2)},
        {"a": torch.arange(6.0).view(2, 3).double()},
        {"d": torch.ones(1)},
        # a small step of training
        {"b": torch.ones(70, 90) + 1e-6},
    ],
)
def test_others_have_another(other: dict[str, Tensor]) -> None:
    assert digest(WEIGHTS | other) != digest(WEIGHTS)
