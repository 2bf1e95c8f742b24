"""What the experts must compute, and the probe that sees a lost clamp."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import (
    PROBE_MAGNITUDES,
    ExpertProbe,
    KnownExperts,
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


def test_the_routed_output_is_the_mean_of_the_experts(config: M3Config) -> None:
    w13, w2 = (stacked[: config.num_experts_per_token] for stacked in weights(config))
    token = probe_token(config, magnitude=4.0)
    each = [by_hand(token, w13[i], w2[i], config) for i in range(len(w13))]
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


def plain_silu(tokens: Tensor, known: KnownExperts, config: M3Config) -> Tensor:
    """What SGLang's DeepGEMM makes of experts in its layout for large batches."""
    other = dataclasses.replace(config, swiglu_alpha=1.0, swiglu_limit=1e9, swiglu_beta=0.0)
    return known.answer(tokens, other)


MISTAKES: dict[str, dict[str, float]] = {
    "no clamp": {"swiglu_limit": 1e9},
    "no plus one": {"swiglu_beta": 0.0},
    "plain alpha": {"swiglu_alpha": 1.0},
}


@pytest.fixture
def known(config: M3Config) -> KnownExperts:
    w13, w2 = weights(config)
    count = config.num_experts_per_token
    return KnownExperts(w13[:count], w2[:count], bits=16)


def probe(config: M3Config, answer: Callable[[Tensor], Tensor]) -> ExpertProbe:
    return ExpertProbe(
        config=config, host="The host", remedy="--experts", answer=answer, dtype=torch.float32
    )


@pytest.mark.parametrize("bits", [16, 8])
def test_kernels_that_round_pass(config: M3Config, known: KnownExperts, bits: int) -> None:
    noise = torch.Generator().manual_seed(9)

    def answer(tokens: Tensor) -> Tensor:
        out = known.answer(tokens, config)
        size = {16: 0.01, 8: 0.06}[bits]
        return out * (1 + size * torch.randn(out.shape, generator=noise))

    probe(config, answer).prove(dataclasses.replace(known, bits=bits))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_seen_by_value(
    config: M3Config, known: KnownExperts, mistake: str, bits: int
) -> None:
    wrong = dataclasses.replace(config, **MISTAKES[mistake])
    with pytest.raises(ValueError, match=r"SwiGLU-OAI .* on 1 rows.*--experts"):
        probe(config, lambda tokens: known.answer(tokens, wrong)).prove(
            dataclasses.replace(known, bits=bits)
        )


def test_rows_in_another_order_are_seen(config: M3Config, known: KnownExperts) -> None:
    swapped = dataclasses.replace(known, w13=known.w13.roll(known.w13.shape[1] // 2, dims=1))
    with pytest.raises(ValueError, match="SwiGLU-OAI"):
        probe(config, lambda tokens: swapped.answer(tokens, config)).prove(known)


def test_a_kernel_that_is_wrong_for_large_batches_alone_is_refused(
    config: M3Config, known: KnownExperts
) -> None:
    def answer(tokens: Tensor) -> Tensor:
        if len(tokens) <= 64:
            return known.answer(tokens, config)
        return plain_silu(tokens, known, config)

    with pytest.raises(ValueError, match="on 4096 rows in the compact layout"):
        probe(config, answer).prove(known, layout="compact")
    with pytest.raises(ValueError, match="does not apply swiglu_limit"):
        probe(config, answer).prove(None)


def test_a_right_kernel_passes_without_weights(config: M3Config, known: KnownExperts) -> None:
    probe(config, lambda tokens: known.answer(tokens, config)).prove(None)


def test_inputs_do_not_depend_on_the_default_dtype(config: M3Config, known: KnownExperts) -> None:
    """Hosts build and load a model under its own dtype."""
    before = torch.get_default_dtype()
    expected = known.tokens(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        tokens = known.tokens(config, dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("clamps", "in_step", "asked"),
    [
        (True, False, 2),
        (True, True, len(PROBE_MAGNITUDES)),
        (False, False, len(PROBE_MAGNITUDES)),
    ],
)
def test_a_kernel_that_settles_is_asked_twice(
    config: M3Config, clamps: bool, in_step: bool, asked: int
) -> None:
    """Each answer of many rows takes seconds on a CPU, and a start waits for it.

    Ranks that answer together must not stop apart.
    """
    given: list[float] = []

    def answer(tokens: Tensor) -> Tensor:
        given.append(float(tokens.norm()))
        return tokens.sign() if clamps else tokens * tokens.abs()

    found = dataclasses.replace(probe(config, answer), rows=(64,), in_step=in_step)
    if clamps:
        found.prove(None)
    else:
        with pytest.raises(ValueError, match="swiglu_limit"):
            found.prove(None)
    assert len(given) == asked
    assert given == sorted(given, reverse=True)
