"""Sampled answers against the exact distribution they should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

Draw = tuple[int, ...]
# (prompts, token ids) to log probabilities of each of these tokens after each prompt
NextLogprobs = Callable[[list[list[int]], list[int]], list[list[float]]]


def exact_draws(
    next_logprobs: NextLogprobs,
    prompt: Sequence[int],
    allowed: list[int],
    *,
    length: int,
    temperature: float,
) -> dict[Draw, float]:
    """Probability of every answer of `length` tokens out of `allowed`.

    Every factor is the model's for a first generated token, which no draft has touched.
    """
    known: dict[Draw, float] = {(): 1.0}
    for _ in range(length):
        beginnings = list(known)
        logprobs = next_logprobs([[*prompt, *words] for words in beginnings], allowed)
        probabilities = (torch.tensor(logprobs, dtype=torch.float64) / temperature).softmax(-1)
        known = {
            (*words, token): known[words] * probability
            for words, row in zip(beginnings, probabilities.tolist(), strict=True)
            for token, probability in zip(allowed, row, strict=True)
        }
    return known


def chi_square_p(drawn: Counter[Draw], exact: dict[Draw, float]) -> float:
    """p-value of the draws under the exact distribution; rare answers count as one."""
    total = sum(drawn.values())
    common = [draw for draw, probability in exact.items() if probability * total >= 5]
    pairs = [(float(drawn[draw]), exact[draw] * total) for draw in common]
    rest = total - sum(count for count, _ in pairs), total - sum(mean for _, mean in pairs)
    if rest[1] >= 5:
        pairs.append(rest)
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    half = torch.tensor([(len(pairs) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
