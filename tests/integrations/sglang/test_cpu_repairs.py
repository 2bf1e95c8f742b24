"""What stands in for SGLang's accelerator kernels on a CPU does what those kernels do."""

from __future__ import annotations

import sys

import pytest
import torch

from m3_sglang.compat import speculation_is_tested
from tests.integrations.sglang.engine import HOST
from tests.interpreters import run

pytestmark = pytest.mark.skipif(not speculation_is_tested(), reason="refused on this SGLang")

# SGLang's own Triton kernels, interpreted, on the same random chains.
AGAINST_TRITON = """
import torch
from m3_sglang.cpu_repairs import build_chain, verify_chain_greedily
from sglang.kernels.ops.speculative.spec_tree import (
    TreeMaskMode, sgl_build_tree_kernel_triton, verify_tree_greedy_triton,
)

torch.manual_seed(0)
for requests, steps in ((1, 1), (2, 3), (5, 5)):
    rows = steps + 1
    seq_lens = torch.randint(1, 9, (requests,))
    # as SGLang's worker hands them over for chains
    parents = torch.arange(-1, steps - 1).expand(requests, steps).contiguous()
    best = torch.arange(steps).expand(requests, steps).contiguous()
    built = []
    for build in (build_chain, sgl_build_tree_kernel_triton):
        tree = torch.full((3, requests, rows), -1)
        mask = torch.ones(rows * requests * rows, dtype=torch.bool)
        positions = torch.empty(requests * rows, dtype=torch.long)
        mode = TreeMaskMode.QLEN_ONLY
        build(parents, best, seq_lens, mask, positions, *tree, 1, steps, rows, mode)
        built.append((positions, tree))
    assert torch.equal(built[0][0], built[1][0]), built
    assert torch.equal(built[0][1], built[1][1]), built
    for _ in range(20):
        candidates = torch.randint(0, 2, (requests, rows))
        target = torch.randint(0, 2, (requests, rows))
        results = []
        for verify in (verify_chain_greedily, verify_tree_greedy_triton):
            predicts = torch.zeros(requests * rows, dtype=torch.int32)
            index = torch.full((requests, rows), -1, dtype=torch.int32)
            number = torch.empty(requests, dtype=torch.int32)
            verify(predicts, index, number, candidates, *built[0][1], target)
            kept = index[index >= 0].long()
            results.append((predicts[kept].tolist(), index.tolist(), number.tolist()))
        assert results[0] == results[1], results
print("SAME")
"""


def test_chains_equal_sglangs_trees() -> None:
    result = run([sys.executable, "-c", AGAINST_TRITON], environment={"TRITON_INTERPRET": "1"})
    assert result.stdout.strip().endswith("SAME"), result.stdout + result.stderr


def sampled(
    probs: torch.Tensor, drafts: list[int], *, draws: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [draws, rows] (-1 past the last) and accepted drafts [draws] of a verified chain."""
    from m3_sglang.cpu_repairs import verify_chain_by_sampling

    rows = len(drafts) + 1
    predicts = torch.zeros(draws * rows, dtype=torch.int32)
    index = torch.full((draws, rows), -1, dtype=torch.int32)
    number = torch.empty(draws, dtype=torch.int32)
    verify_chain_by_sampling(
        predicts,
        index,
        number,
        torch.tensor([0, *drafts]).repeat(draws, 1),
        uniform_samples=torch.rand(draws, rows),
        uniform_samples_for_final_sampling=torch.rand(draws),
        target_probs=probs.repeat(draws, 1, 1),
    )
    tokens = torch.where(index >= 0, predicts.view(draws, rows), -1)
    return tokens, number


@pytest.mark.parametrize("drafts", [[0, 0], [2, 1], [3, 3]])
def test_sampled_tokens_have_the_targets_distribution(drafts: list[int]) -> None:
    """Chi-square over 5,000 draws, whatever was drafted; 1e-4 of right samplers would fail."""
    from scipy.stats import chisquare

    torch.manual_seed(1)
    probs = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.1, 0.4], [0.7, 0.1, 0.1, 0.1]])
    tokens, number = sampled(probs, drafts, draws=5000)
    for row in range(3):
        seen = tokens[number >= row, row]
        counts = torch.bincount(seen.long(), minlength=4).double()
        assert counts.sum() == (number >= row).sum()
        expected = probs[row].double() * len(seen)
        assert (
            chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).numpy()).pvalue
            > 1e-4
        )
    # and the drafts are used: accepted as often as the target would have said them
    rate = float((number >= 1).double().mean())
    assert abs(rate - float(probs[0, drafts[0]])) < 0.03


SAMPLED_REQUESTS = """
from types import SimpleNamespace
import sglang.srt.runtime_context as context
context.get_spec = lambda: SimpleNamespace(speculative_use_rejection_sampling=False)
from m3_sglang.cpu_repairs import put_in_place
from tests.interpreters import run
from sglang.srt.speculative import eagle_utils
asked = dict(is_cpu=True, is_hip=False, is_xpu=False, use_rejection_sampling=False)
before = eagle_utils._verify_uses_greedy(is_all_greedy=False, **asked)
put_in_place()
after = [eagle_utils._verify_uses_greedy(is_all_greedy=x, **asked) for x in (False, True)]
print(before, after)
"""


def test_sampled_requests_are_sampled() -> None:
    """SGLang alone verifies greedily on a CPU, whatever a request says."""
    result = HOST.run("-c", SAMPLED_REQUESTS)
    assert result.stdout.strip().endswith("True [False, True]"), result.stdout + result.stderr


def test_a_token_without_probability_is_never_accepted() -> None:
    """Not even by the coin 0, as a greedy request's wrong draft beside sampled requests."""
    from m3_sglang.cpu_repairs import verify_chain_by_sampling

    predicts = torch.zeros(2, dtype=torch.int32)
    index = torch.full((1, 2), -1, dtype=torch.int32)
    number = torch.empty(1, dtype=torch.int32)
    verify_chain_by_sampling(
        predicts,
        index,
        number,
        torch.tensor([[0, 3]]),
        uniform_samples=torch.zeros(1, 2),
        uniform_samples_for_final_sampling=torch.zeros(1),
        target_probs=torch.tensor([[[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]),
    )
    assert (number.tolist(), predicts.tolist(), index.tolist()) == ([0], [2, 0], [[0, -1]])


def test_drafts_drawn_at_random_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from m3_plugin.host.presence import PluginRefusal
    from m3_sglang.cpu_repairs import put_in_place

    drawn = SimpleNamespace(speculative_use_rejection_sampling=True)
    monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: drawn)
    with pytest.raises(PluginRefusal, match="--speculative-use-rejection-sampling needs a GPU"):
        put_in_place()


def test_truncation_keeps_the_likeliest_tokens() -> None:
    from m3_sglang.cpu_repairs import keep_top_k, keep_top_p

    probs = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.4, 0.05, 0.3]])
    torch.testing.assert_close(
        keep_top_k(probs, torch.tensor([2, 1])),
        torch.tensor([[4 / 7, 0, 3 / 7, 0], [0, 1.0, 0, 0]]),
    )
    torch.testing.assert_close(
        keep_top_p(probs, torch.tensor([0.6, 0.4])),
        torch.tensor([[4 / 7, 0, 3 / 7, 0], [0, 1.0, 0, 0]]),
    )


def test_slots() -> None:
    from m3_sglang.cpu_repairs import assign_slots, draft_slots, last_accepted, verify_slots

    table = torch.zeros(3, 8, dtype=torch.int32)
    assign_slots(
        torch.tensor([2, 0]),
        table,
        torch.tensor([1, 0]),
        torch.tensor([4, 2]),
        torch.tensor([10, 11, 12, 20, 21]),
        2,
    )
    assert table.tolist() == [[20, 21, 0, 0, 0, 0, 0, 0], [0] * 8, [0, 10, 11, 12, 0, 0, 0, 0]]
    out = torch.empty(4, dtype=torch.int64)
    draft_slots(torch.tensor([2, 0]), table, torch.tensor([2, 0]), out, 1, 2)
    assert out.tolist() == [11, 12, 20, 21]
    slots = verify_slots(torch.tensor([2]), table, torch.tensor([1]), 1, 3, "cpu")
    assert slots.tolist() == [10, 11, 12]
    assert slots.dtype == torch.int64
    bonus = torch.empty(2, dtype=torch.int32)
    last_accepted(torch.tensor([5, 6, 7, 8, 9, 9]), torch.tensor([2, 1]), bonus, 3, 2)
    assert bonus.tolist() == [6, 8]
