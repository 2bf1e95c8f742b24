"""`sparse_attention`: every implementation against exact arithmetic, then sets, masks and NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.index_topk import index_topk
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.testing.cases import INT32_MAX, Case, Inputs, all_cases, build
from m3_kernels.testing.compare import assert_accurate, plain_attention

BACKENDS: tuple[Backend, ...] = ("native", "torch")
EVERY_BACKEND: tuple[Backend, ...] = (*BACKENDS, "reference")
INT32_MIN = -(2**31)


def attend(inputs: Inputs, ids: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
    """Run the op into buffers of NaN; outputs and lse."""
    rows, heads, dim = inputs.q.shape
    out = torch.full((rows, heads + 1, dim), torch.nan, dtype=inputs.q.dtype)[:, :heads]
    lse = torch.full((heads, rows), torch.nan).T
    returned = sparse_attention(
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        ids,
        **inputs.batch,
        scale=inputs.scale,
        out=out,
        lse=lse,
        backend=backend,
    )
    assert returned is out
    return out, lse


def choose(inputs: Inputs) -> Tensor:
    return index_topk(
        inputs.index_q,
        inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
        backend="reference",
    )


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_equals_exact_arithmetic(case: Case) -> None:
    inputs = build(case)
    ids = choose(inputs)
    results = {backend: attend(inputs, ids, backend) for backend in EVERY_BACKEND}
    exact, exact_lse = plain_attention(inputs, ids, torch.float64)
    plain, plain_lse = plain_attention(inputs, ids, case.dtype)
    for backend, (out, lse) in results.items():
        assert_accurate(out, exact, plain, what=f"{backend} out")
        assert_accurate(lse, exact_lse, plain_lse, what=f"{backend} lse")
        empty = exact_lse == -math.inf
        assert (out[empty] == 0).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_ids_are_a_set(backend: Backend) -> None:
    inputs = build(Case("set", ((100, 6), (40, 3)), topk=4))
    ids = choose(inputs)
    out, lse = attend(inputs, ids, backend)
    backwards = torch.cat([ids.flip(-1), ids], dim=-1)
    noise = torch.tensor([INT32_MAX, -1, INT32_MIN, 10_000, -2], dtype=torch.int32)
    noisy = torch.cat([noise.expand(*ids.shape[:2], 5), backwards], dim=-1)
    for same in (ids.flip(-1), backwards, noisy):
        again, lse_again = attend(inputs, same, backend)
        if backend == "native":
            assert torch.equal(again, out)
            assert torch.equal(lse_again, lse)
        torch.testing.assert_close(again, out)
        torch.testing.assert_close(lse_again, lse)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("useless", [-1, INT32_MIN, INT32_MAX, 7, 100_000])
def test_rows_without_a_valid_block_are_zero(useless: int, backend: Backend) -> None:
    inputs = build(Case("useless", ((100, 3),)))  # blocks 0 to 6 are visible
    ids = choose(inputs)
    ids[:, 1] = useless
    out, lse = attend(inputs, ids, backend)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert out[0].isfinite().all()
    assert (out[2] != 0).any()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_keys_of_later_rows_are_invisible_even_if_nan(backend: Backend) -> None:
    inputs = build(Case("later", ((20, 30),), topk=4))
    ids = choose(inputs)
    expected, _ = attend(inputs, ids, backend)
    page = int(inputs.page_table[0, 2])  # positions 32 to 47
    inputs.k_pages[page, :, 8:] = torch.nan
    inputs.v_pages[page, :, 8:] = torch.inf
    out, _ = attend(inputs, ids, backend)
    assert torch.equal(out[:20], expected[:20])  # rows of positions 20 to 39
    assert not out[20:28].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_blocks_not_chosen_are_not_read(backend: Backend) -> None:
    inputs = build(Case("unread", ((100, 2),), topk=2, num_kv_heads=1))
    ids = torch.tensor([[[1, 6], [0, 6]]], dtype=torch.int32)
    expected, _ = attend(inputs, ids, backend)
    for block in (2, 3, 4, 5):
        inputs.k_pages[int(inputs.page_table[0, block])] = torch.nan
        inputs.v_pages[int(inputs.page_table[0, block])] = torch.nan
        inputs.page_table[0, block] = INT32_MAX
    out, _ = attend(inputs, ids, backend)
    assert torch.equal(out, expected)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_query_heads_of_a_group_share_a_kv_head(backend: Backend) -> None:
    inputs = build(Case("group", ((60, 1),), num_q_heads=6, num_kv_heads=3))
    ids = torch.tensor([[[0, -1]], [[1, -1]], [[2, -1]]], dtype=torch.int32)
    inputs.v_pages.copy_(torch.arange(inputs.v_pages.shape[0])[:, None, None, None])
    out, _ = attend(inputs, ids, backend)
    pages = inputs.page_table[0, :3].repeat_interleave(2)
    torch.testing.assert_close(out[0, :, 0], pages.float())


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_extreme_logits(backend: Backend) -> None:
    inputs = build(Case("extreme", ((60, 1),), num_kv_heads=1, num_q_heads=1, topk=4))
    inputs.q.zero_()
    inputs.q[..., 0] = 1 / inputs.scale
    ids = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
    page = int(inputs.page_table[0, 1])
    inputs.k_pages[page, 0, 3, 0] = 1e4  # outweighs everything by far
    out, lse = attend(inputs, ids, backend)
    torch.testing.assert_close(out[0, 0], inputs.v_pages[page, 0, 3])
    torch.testing.assert_close(lse[0, 0], torch.tensor(1e4))
    inputs.k_pages[page, 0, 3, 0] = -math.inf
    finite, _ = attend(inputs, ids, backend)
    assert finite.isfinite().all()
    inputs.k_pages[page, 0, 3, 0] = math.nan
    out, lse = attend(inputs, ids, backend)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_only_minus_infinite_logits_count_as_no_key(backend: Backend) -> None:
    inputs = build(Case("nothing", ((20, 1),), num_kv_heads=1, num_q_heads=1))
    inputs.q.zero_()
    inputs.q[..., 0] = 1
    inputs.k_pages[..., 0] = -math.inf
    out, lse = attend(inputs, torch.tensor([[[0, 1]]], dtype=torch.int32), backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def one_key_each(values: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Attention of as many requests as there are rows of values, each with that single key."""
    rows, dim = values.shape
    return sparse_attention(
        torch.zeros(rows, 1, dim, dtype=dtype),
        torch.zeros(rows, 1, 1, dim, dtype=values.dtype),
        values[:, None, None],
        torch.zeros(1, rows, 1, dtype=torch.int32),
        page_table=torch.arange(rows, dtype=torch.int32)[:, None],
        cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.ones(rows, dtype=torch.int32),
        scale=1.0,
        backend=backend,
    )[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_read_exactly(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(512, 128)
    out = one_key_each(patterns, torch.float32, "native")
    torch.testing.assert_close(out, patterns.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_round_as_torch_rounds(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (500, 128), generator=random).int()
    # Halfway between neighbours, on either side of even, in the middle of the range of fp16.
    halfway = torch.randint(0x3000, 0x4000, (500, 128), generator=random).int() << 12
    bits = torch.cat([anything, halfway, (anything & 0x0FFFFFFF) | 0x30000000, anything | -65536])
    values = bits.view(torch.float32)
    out = one_key_each(values, dtype, "native")
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)
