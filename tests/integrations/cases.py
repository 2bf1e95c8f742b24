"""Prompts on the random checkpoint `engine` with recorded answers: what every host must give.

The record lets a host be compared with another that lives in another environment. It is made from
transformers in fp32, which no host's code takes part in:

    python -m tests.integrations.cases
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TypedDict

import torch

PRESET = "engine"
RECORD = Path(__file__).with_name("recorded.json")
NUM_TOKENS = 8
# Hosts and transformers sum in different orders; measured differences stay below 2e-5.
LOGPROB_ATOL = 2e-4


class Case(TypedDict):
    """Greedy continuation of one prompt, and log probabilities of its tokens but the first."""

    length: int
    seed: int
    token_ids: list[int]
    logprobs: list[float]


def random_prompt(length: int, *, seed: int, vocabulary: int = 400) -> list[int]:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, vocabulary, (length,), generator=generator).tolist()


def recorded() -> list[Case]:
    """All recorded cases."""
    return json.loads(RECORD.read_text())


def record(lengths: tuple[int, ...] = (100, 640, 700, 1300)) -> None:
    """Write the record anew; the last lengths are beyond the budget of 4 blocks."""
    from m3_plugin.testing.random_checkpoint import write_random_checkpoint
    from tests.integrations import golden

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(Path(folder) / "checkpoint", preset=PRESET)
        for seed, length in enumerate(lengths):
            prompt = random_prompt(length, seed=seed)
            logprobs = golden.token_logprobs(checkpoint, prompt).tolist()
            cases.append(
                Case(
                    length=length,
                    seed=seed,
                    token_ids=golden.greedy(checkpoint, prompt, num_tokens=NUM_TOKENS),
                    logprobs=[round(value, 5) for value in logprobs],
                )
            )
    RECORD.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    record()
