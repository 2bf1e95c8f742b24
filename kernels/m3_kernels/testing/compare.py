"""Comparison of results: exact where the maths is, relative to plain torch where it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels.testing.cases import Inputs

# Largest difference of two fp32 dot products of the same vectors in different orders of summation,
# relative to the product of their norms; 128 roundings of half a unit are 8e-6.
SCORE_ROUNDING = 8e-6


def rows_with_positions(inputs: Inputs) -> list[tuple[int, int, int]]:
    """(request, row, position) of every row that sees a key."""
    bounds = inputs.cu_seqlens_q.tolist()
    found = []
    for request, seq_len in enumerate(inputs.seq_lens.tolist()):
        first, last = bounds[request : request + 2]
        for row in range(first, last):
            position = seq_len - (last - row)
            if position >= 0:
                found.append((request, row, position))
    return found


def selection_faults(ids: Tensor, expected: Tensor, inputs: Inputs) -> list[str]:
    """How a selection differs from the expected one beyond what rounding of scores excuses.

    Parameters
    ----------
    ids, expected : int32 [num_index_heads, T, topk]

    Returns
    -------
    One line per fault; empty if there is none.
    """
    faults = []
    size = inputs.case.page_size
    different = (ids != expected).any(dim=2)
    for request, row, position in rows_with_positions(inputs):
        for head in different[:, row].nonzero().flatten().tolist():
            got, want = ids[head, row].tolist(), expected[head, row].tolist()
            where = f"row {row} head {head} position {position}: got {got}, expected {want}"
            keys = inputs.sequences[request][2][: position + 1].double()
            query = inputs.index_q[row, head].double()
            scores = [float(block.max()) for block in (keys @ query).split(size)]
            swapped_in = set(got) - set(want)
            swapped_out = set(want) - set(got)
            valid = [b for b in got if b >= 0]
            if got != sorted(set(valid)) + [-1] * (len(got) - len(valid)):
                faults.append(f"not ascending, unique and left-packed: {where}")
            elif len(swapped_in) != len(swapped_out) or any(b > position // size for b in valid):
                faults.append(f"wrong number or invisible block: {where}")
            else:
                swapped = [scores[b] for b in swapped_in | swapped_out]
                allowed = 2 * SCORE_ROUNDING * float(query.norm() * keys.norm(dim=1).max())
                if max(swapped) - min(swapped) > allowed:
                    faults.append(f"margin {max(swapped) - min(swapped):.3g}: {where}")
        different[:, row] = False
    for head, row in different.nonzero().tolist():
        faults.append(f"row {row} head {head} without keys: got {ids[head, row].tolist()}")
    return faults


def plain_attention(inputs: Inputs, block_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks computed in one dtype; outputs and lse as fp64."""
    case = inputs.case
    group = case.num_q_heads // case.num_kv_heads
    out = torch.zeros(inputs.q.shape, dtype=torch.float64)
    lse = torch.full(inputs.q.shape[:2], -math.inf, dtype=torch.float64)
    for request, row, position in rows_with_positions(inputs):
        keys, values, _ = (part[: position + 1] for part in inputs.sequences[request])
        own = position // case.page_size
        for kv_head in range(case.num_kv_heads):
            chosen = {b for b in block_ids[kv_head, row].tolist() if 0 <= b <= own}
            if not chosen:
                continue
            block = torch.arange(position + 1) // case.page_size
            seen = torch.isin(block, torch.tensor(sorted(chosen)))
            heads = slice(kv_head * group, (kv_head + 1) * group)
            logits = inputs.q[row, heads].to(dtype) @ keys[seen, kv_head].to(dtype).T * inputs.scale
            out[row, heads] = (logits.softmax(-1) @ values[seen, kv_head].to(dtype)).double()
            lse[row, heads] = logits.logsumexp(-1).double()
    return out, lse


@dataclass(frozen=True)
class Accuracy:
    """Largest absolute error of a result, and the largest that is excused."""

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is excused; a NaN error never is."""
        return self.error <= self.allowed


def accuracy(actual: Tensor, exact: Tensor, plain: Tensor) -> Accuracy:
    """The error of a result beside twice that of a plain run in the same dtype.

    Parameters
    ----------
    actual : the result under test
    exact : the same quantity from fp64 arithmetic
    plain : the same quantity from unfused torch operations in the dtype of the inputs
    """
    finite = exact.isfinite()
    if not torch.equal(actual.double()[~finite], exact[~finite]):
        return Accuracy(error=math.inf, allowed=0.0)
    if not finite.any():
        return Accuracy(error=0.0, allowed=0.0)
    error = (actual.double() - exact)[finite].abs().max()
    allowed = 2 * (plain - exact)[finite].abs().max() + 4e-7 * exact[finite].abs().max()
    return Accuracy(error=float(error), allowed=float(allowed))


def assert_accurate(actual: Tensor, exact: Tensor, plain: Tensor, *, what: str) -> None:
    """Fail unless the error is at most twice that of a plain run; arguments as in `accuracy`."""
    found = accuracy(actual, exact, plain)
    if not found.ok:
        raise AssertionError(f"{what}: error {found.error:.3g}, allowed {found.allowed:.3g}")
