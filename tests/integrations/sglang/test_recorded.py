"""SGLang gives what the record says, as every other host does."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.cases import LOGPROB_ATOL, NUM_TOKENS, Case, random_prompt, recorded
from tests.integrations.sglang.engine import EngineProcess


@pytest.mark.every_release
@pytest.mark.parametrize("case", recorded(), ids=lambda case: str(case["length"]))
def test_recorded_answers(random_engine: EngineProcess, case: Case) -> None:
    prompt = random_prompt(case["length"], seed=case["seed"])
    (ours,) = random_engine.generate([prompt], max_tokens=NUM_TOKENS, ignore_eos=True)
    assert ours.token_ids == case["token_ids"]
    torch.testing.assert_close(
        torch.tensor(random_engine.prompt_logprobs(prompt)),
        torch.tensor(case["logprobs"]),
        atol=LOGPROB_ATOL,
        rtol=0,
    )
