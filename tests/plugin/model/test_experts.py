"""What the experts must compute, and the probe that sees a lost clamp."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import (
    PROBE_MAGNITUDES,
    expert_output,
    grows_unclamped,
    probe_token,
    require_clamped,
    routed_output,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> M3Config:
    from m3_plugin.testing.random_checkpoint import write_random_checkpoint

    path = write_random_checkpoint(tmp_path_factory.mktemp("m3") / "small", preset="small")
    return M3Config.from_hf(json.loads((path / "config.json").read_text()))


def weights(config: M3Config, *, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    """Stacked w13 and w2 of as many experts as a token is given to, and one more."""
    generator = torch.Generator().manual_seed(3)
    experts, inner = config.num_experts_per_token + 1, 8
    w13 = scale * torch.randn(experts, 2 * inner, config.hidden_size, generator=generator)
    w2 = scale * torch.randn(experts, config.hidden_size, inner, generator=generator)
    return w13, w2


def by_hand(token: Tensor, w13: Tensor, w2: Tensor, config: M3Config) -> list[float]:
    """One expert, number by number."""
    inner = w2.shape[1]
    rows = [float(row.double() @ token[0].double()) for row in w13]
    middle = []
    for gate, up in zip(rows[:inner], rows[inner:], strict=True):
        gate = min(gate, config.swiglu_limit)
        up = max(-config.swiglu_limit, min(up, config.swiglu_limit))
        middle.append(
            (up + config.swiglu_beta) * gate / (1 + math.exp(-config.swiglu_alpha * gate))
        )
    return [sum(float(w) * m for w, m in zip(row, middle, strict=True)) for row in w2]


@pytest.mark.parametrize("magnitude", [0.1, 4.0, 40.0])
def test_an_expert_by_the_book(config: M3Config, magnitude: float) -> None:
    w13, w2 = weights(config)
    token = probe_token(config, magnitude=magnitude)
    expected = torch.tensor(by_hand(token, w13[0], w2[0], config))
    torch.testing.assert_close(
        expert_output(token, w13[0], w2[0], config)[0], expected, rtol=1e-4, atol=1e-4
    )


def test_the_routed_output_is_the_mean_of_the_first_experts(config: M3Config) -> None:
    w13, w2 = weights(config)
    token = probe_token(config, magnitude=4.0)
    each = [by_hand(token, w13[i], w2[i], config) for i in range(config.num_experts_per_token)]
    expected = torch.tensor(each).mean(0)
    torch.testing.assert_close(routed_output(token, w13, w2, config)[0], expected)


def norms(config: M3Config) -> list[float]:
    w13, w2 = weights(config)
    return [
        float(routed_output(probe_token(config, magnitude=m), w13, w2, config).norm())
        for m in PROBE_MAGNITUDES
    ]


def test_the_probe_tells_a_clamped_activation_from_one_without(config: M3Config) -> None:
    unclamped = dataclasses.replace(config, swiglu_limit=1e30)
    assert not grows_unclamped(norms(config))
    assert grows_unclamped(norms(unclamped))
    require_clamped(norms(config), config=config, host="Host", remedy="--kernel")
    with pytest.raises(ValueError, match=r"Host's MoE .* swiglu_limit=7\.0.*--kernel"):
        require_clamped(norms(unclamped), config=config, host="Host", remedy="--kernel")


@pytest.mark.parametrize("sequence", [[0.0] * 7, [5.0, math.inf, math.nan]])
def test_the_probe_refuses_nothing_it_cannot_judge(sequence: list[float]) -> None:
    assert not grows_unclamped(sequence)
