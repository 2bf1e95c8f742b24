"""`dense_attention`: every implementation against exact arithmetic, then masks, NaN and bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.dense_attention import dense_attention
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.testing.cases import INT32_MAX, Case, Inputs, all_cases, build
from m3_kernels.testing.compare import assert_accurate, plain_attention

BACKENDS: tuple[Backend, ...] = ("native", "torch")
EVERY_BACKEND: tuple[Backend, ...] = (*BACKENDS, "reference")
# 9 blocks are more than one segment of the C++ kernel.
LONG = Case("long", ((150, 3), (0, 1)), num_q_heads=4, num_kv_heads=2)


def attend(inputs: Inputs, backend: Backend, **replaced: Tensor) -> tuple[Tensor, Tensor]:
    """Run the op into buffers of NaN; outputs and lse."""
    q = replaced.pop("q", inputs.q)
    rows, heads, dim = q.shape
    out = torch.full((rows, heads + 1, dim), torch.nan, dtype=q.dtype)[:, :heads]
    lse = torch.full((heads, rows), torch.nan).T
    returned = dense_attention(
        q,
        inputs.k_pages,
        inputs.v_pages,
        **(inputs.batch | replaced),
        scale=inputs.scale,
        out=out,
        lse=lse,
        backend=backend,
    )
    assert returned is out
    return out, lse


def every_block(inputs: Inputs) -> Tensor:
    """What a selection of all blocks would be: int32 [num_kv_heads, T, max_pages]."""
    blocks = torch.arange(inputs.page_table.shape[1], dtype=torch.int32)
    return blocks.expand(inputs.case.num_kv_heads, inputs.q.shape[0], -1)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_equals_exact_arithmetic(case: Case) -> None:
    inputs = build(case)
    results = {backend: attend(inputs, backend) for backend in EVERY_BACKEND}
    exact, exact_lse = plain_attention(inputs, every_block(inputs), torch.float64)
    plain, plain_lse = plain_attention(inputs, every_block(inputs), case.dtype)
    for backend, (out, lse) in results.items():
        assert_accurate(out, exact, plain, what=f"{backend} out")
        assert_accurate(lse, exact_lse, plain_lse, what=f"{backend} lse")
        empty = exact_lse == -math.inf
        assert (out[empty] == 0).all()


@pytest.mark.parametrize("pages", ["separate", "packed-heads", "packed-slots"])
def test_pages_of_every_host_are_read_as_they_lie(pages: str) -> None:
    planes = build(Case("planes", ((200, 3), (0, 20))))
    other = build(Case("other", ((200, 3), (0, 20)), pages=pages))  # pyright: ignore[reportArgumentType]
    assert other.k_pages.stride() != planes.k_pages.stride()
    for mine, expected in zip(attend(other, "native"), attend(planes, "native"), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_has_the_same_bits_alone_in_chunks_and_in_a_batch(threads: int) -> None:
    """Split by segments or not, in tiles of any height, behind any prefix: one order of sums."""
    case = Case("bits", ((900, 3), (0, 300), (140, 1)), num_q_heads=8, num_kv_heads=2)
    inputs = build(case)
    whole, whole_lse = attend(inputs, "native")
    torch.set_num_threads(threads)
    starts, lengths = inputs.cu_seqlens_q.tolist(), inputs.seq_lens.tolist()
    for request, length in enumerate(lengths):
        first, last = starts[request : request + 2]
        for rows in {1, 2, 7, 64, last - first}:
            for start in range(first, last, rows):
                end = min(start + rows, last)
                out, lse = attend(
                    inputs,
                    "native",
                    q=inputs.q[start:end],
                    page_table=inputs.page_table[request : request + 1],
                    cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
                    seq_lens=torch.tensor([length - (last - end)], dtype=torch.int32),
                )
                assert torch.equal(out, whole[start:end])
                assert torch.equal(lse, whole_lse[start:end])


def test_threads_do_not_change_bits_of_a_large_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # one multiply-add is worth a thread, so that all of them get something
    monkeypatch.setattr("m3_kernels.native_build.WORK_PER_THREAD", 1)
    for case in (LONG, Case("decode", ((2000, 1),)), Case("prefill", ((100, 400),))):
        inputs = build(case)
        expected, expected_lse = attend(inputs, "native")
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            out, lse = attend(inputs, "native")
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sparse_op_over_all_blocks_gives_the_same(backend: Backend) -> None:
    inputs = build(LONG)
    out, _ = attend(inputs, backend)
    sparse = sparse_attention(
        inputs.q,
        inputs.k_pages,
        inputs.v_pages,
        every_block(inputs),
        **inputs.batch,
        scale=inputs.scale,
        backend=backend,
    )
    torch.testing.assert_close(out, sparse)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_keys_of_later_rows_are_invisible_even_if_nan(backend: Backend) -> None:
    inputs = build(Case("later", ((20, 30),), topk=4))
    expected, _ = attend(inputs, backend)
    page = int(inputs.page_table[0, 2])  # positions 32 to 47
    inputs.k_pages[page, :, 8:] = torch.nan
    inputs.v_pages[page, :, 8:] = torch.inf
    out, _ = attend(inputs, backend)
    torch.testing.assert_close(out[:20], expected[:20])  # rows of positions 20 to 39
    if backend != "torch":
        assert torch.equal(out[:20], expected[:20])
    assert not out[20:].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_pages_past_the_sequence_are_not_read(backend: Backend) -> None:
    inputs = build(Case("unread", ((100, 2),)))
    expected, _ = attend(inputs, backend)
    table = torch.nn.functional.pad(inputs.page_table, (0, 3), value=INT32_MAX)
    out, _ = attend(inputs, backend, page_table=table)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_query_heads_of_a_group_share_a_kv_head(backend: Backend) -> None:
    inputs = build(Case("group", ((60, 1),), num_q_heads=6, num_kv_heads=3))
    heads = torch.arange(3.0)
    inputs.v_pages.copy_(heads[None, :, None, None].expand(inputs.v_pages.shape))
    out, _ = attend(inputs, backend)
    torch.testing.assert_close(out[0, :, 0], heads.repeat_interleave(2))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_extreme_logits(backend: Backend) -> None:
    inputs = build(Case("extreme", ((200, 1),), num_kv_heads=1, num_q_heads=1))
    inputs.q.zero_()
    inputs.q[..., 0] = 1 / inputs.scale
    page = int(inputs.page_table[0, 9])
    inputs.k_pages[page, 0, 3, 0] = 1e4  # outweighs everything by far
    out, lse = attend(inputs, backend)
    torch.testing.assert_close(out[0, 0], inputs.v_pages[page, 0, 3])
    torch.testing.assert_close(lse[0, 0], torch.tensor(1e4))
    inputs.k_pages[page, 0, 3, 0] = -math.inf
    finite, _ = attend(inputs, backend)
    assert finite.isfinite().all()
    inputs.k_pages[page, 0, 3, 0] = math.nan
    out, lse = attend(inputs, backend)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_only_minus_infinite_logits_count_as_no_key(backend: Backend) -> None:
    inputs = build(Case("nothing", ((200, 1),), num_kv_heads=1, num_q_heads=1))
    inputs.q.zero_()
    inputs.q[..., 0] = 1
    inputs.k_pages[..., 0] = -math.inf
    out, lse = attend(inputs, backend)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_queries_and_pages_may_differ_in_dtype() -> None:
    inputs = build(Case("bf16", ((60, 3),)).with_dtype(torch.bfloat16))
    wide = attend(inputs, "native", q=inputs.q.float())[0]
    exact, _ = plain_attention(inputs, every_block(inputs), torch.float64)
    plain, _ = plain_attention(inputs, every_block(inputs), torch.float32)
    assert_accurate(wide, exact, plain, what="fp32 queries, bf16 pages")


def test_a_page_outside_the_pool_is_named() -> None:
    inputs = build(Case("outside", ((100, 2),)))
    inputs.page_table[0, 3] = 1000
    with pytest.raises(IndexError, match=r"dense_attention: page_table .* got page 1000"):
        attend(inputs, "native")


def test_a_page_table_that_is_too_narrow_is_named() -> None:
    inputs = build(Case("narrow", ((100, 2),)))
    table = inputs.page_table[:, :4].contiguous()
    with pytest.raises(
        ValueError, match=r"dense_attention: page_table must cover .* got \d blocks"
    ):
        attend(inputs, "native", page_table=table)


def test_a_gpu_is_left_to_the_hosts() -> None:
    inputs = build(Case("gpu", ((3, 1),)))
    with pytest.raises(NotImplementedError, match="'triton'"):
        attend(inputs, "triton")
