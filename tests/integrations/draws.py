"""Sampled answers against the exact distribution they should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from m3_plugin.testing.prompts import min_needle_tokens, needle_prompt
from m3_plugin.testing.vocabulary import VOCABULARY

Draw = tuple[int, ...]
# (prompts, token ids) to log probabilities of each of these tokens after each prompt
NextLogprobs = Callable[[list[list[int]], list[int]], list[list[float]]]

NUM_DRAWS = 5000
# Three words of a chain, of which the first is of the prompt's step; the others come out of the
# verification of drafts. The prompt is short, so that thousands take seconds.
NUM_WORDS = 3
_CHAIN = needle_prompt(
    80, num_tokens=min_needle_tokens(hops=NUM_WORDS, decoys=False), hops=NUM_WORDS, decoys=False
)
PROMPT = list(_CHAIN.token_ids)
ALLOWED = [
    *_CHAIN.expected_ids[:NUM_WORDS],
    VOCABULARY.nowhere_id,
    VOCABULARY.treasures[0].id,
]
# the highest vLLM takes; only from logits this many times smaller (`soften`) is no word certain
TEMPERATURE = 2.0
_SOFTER = 12.5


def soften(checkpoint: Path) -> Path:
    """Divide the head's weights: the same greedy answers, and draws in which all words occur."""
    head = "language_model.lm_head.weight"
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if head in tensors:
            save_file(tensors | {head: tensors[head] / _SOFTER}, shard, metadata={"format": "pt"})
    return checkpoint


def require_the_distribution(answers: Iterable[Sequence[int]], next_logprobs: NextLogprobs) -> None:
    """`ALLOWED` words sampled after `PROMPT` at `TEMPERATURE` have the model's own distribution.

    One test in 10,000 fails by chance.
    """
    drawn = Counter(tuple(answer) for answer in answers)
    exact, flatter = (
        exact_draws(next_logprobs, PROMPT, ALLOWED, length=NUM_WORDS, temperature=temperature)
        for temperature in (TEMPERATURE, 1.3 * TEMPERATURE)
    )
    assert set(drawn) <= set(exact)
    assert chi_square_p(drawn, exact) > 1e-4
    # a distribution only slightly flatter is told apart
    assert chi_square_p(drawn, flatter) < 1e-6


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
