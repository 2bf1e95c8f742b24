"""MSASession: one order of operations, checked against dense attention done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import KernelChoice, choose_kernels
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.session import MSASession, MSAStatistics
from m3_plugin.attention.workspace import LayerShape, Workspace, allocate_workspace
from m3_plugin.model.config import MSAConfig
from m3_plugin.model.rope import RowAngles

PAGE = 128
HEADS, KV_HEADS, DIM = 8, 4, 128


def msa(topk: int = 4, **changes: int) -> MSAConfig:
    fields = {
        "num_index_heads": KV_HEADS,
        "index_dim": DIM,
        "block_size": PAGE,
        "topk_blocks": topk,
        "num_init_blocks": 0,
        "num_local_blocks": 1,
    }
    return MSAConfig(**{**fields, **changes})


def session(config: MSAConfig) -> MSASession:
    return MSASession(config, kernels=choose_kernels("cpu"), scale=DIM**-0.5)


def caches(num_pages: int) -> MSACaches:
    """Packed K | V pages as vLLM allocates them, and index pages; all NaN."""
    packed = torch.full((num_pages, KV_HEADS, PAGE, 2 * DIM), torch.nan)
    k_pages, v_pages = packed.split(DIM, dim=-1)
    return MSACaches(k_pages, v_pages, torch.full((num_pages, PAGE, DIM), torch.nan))


def step(seq_len: int, num_rows: int, pages: Tensor) -> MSABatch:
    """One request whose last `num_rows` tokens are this step's."""
    positions = torch.arange(seq_len - num_rows, seq_len)
    return MSABatch(
        cu_seqlens_q=torch.tensor([0, num_rows], dtype=torch.int32),
        seq_lens=torch.tensor([seq_len], dtype=torch.int32),
        page_table=pages[None],
        slot_mapping=pages[positions // PAGE].long() * PAGE + positions % PAGE,
        max_query_len=num_rows,
        max_seq_len=seq_len,
    )


NORMS = HeadNorms(
    *torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)).unbind(), eps=1e-6
)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Projections of a sequence from its first token on."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        draw(length, HEADS, DIM),
        draw(length, KV_HEADS, DIM),
        draw(length, KV_HEADS, DIM),
        draw(length, KV_HEADS, DIM),
        draw(length, DIM),
    )


def angles(first: int, last: int) -> Tensor:
    """Cosines and sines of positions; half of the channels are rotated."""
    return RowAngles(rotary_dim=DIM // 2, theta=1e4)(torch.arange(first, last))


def ready(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of a sequence as attention takes them, and v: norm and RoPE by hand."""
    q, k, v, _, _ = inputs(length)
    rotated = []
    for x, w in ((q, NORMS.q), (k, NORMS.k)):
        x = torch.nn.functional.rms_norm(x, (DIM,), 1 + w, NORMS.eps)
        half = DIM // 4
        a, b, rest = x.split([half, half, DIM // 2], dim=-1)
        frequency = 1e4 ** -(torch.arange(half) / half)
        angle = torch.outer(torch.arange(length), frequency)[:, None]
        first, second = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        rotated.append(torch.cat((first, second, rest), dim=-1))
    return *rotated, v


def run(
    config: MSAConfig,
    length: int,
    chunks: list[int],
    *,
    target: MSASession | None = None,
    layers: int = 1,
) -> Tensor:
    """Outputs of a whole sequence, stored and attended chunk by chunk, by layers that are alike."""
    generator = torch.Generator().manual_seed(1)
    num_pages = -(-length // PAGE)
    pages = torch.randperm(num_pages + 3, generator=generator)[:num_pages].int()
    cache = caches(num_pages + 3)
    tensors = inputs(length)
    out = torch.full((length, HEADS, DIM), torch.nan)
    target = target or session(config)
    start = 0
    for size in chunks:
        rows = slice(start, start + size)
        plan = target.plan(step(start + size, size, pages))
        for _ in range(layers):
            target.run(
                plan,
                *(t[rows] for t in tensors),
                norms=NORMS,
                cos_sin=angles(start, start + size),
                caches=cache,
                out=out[rows],
            )
        start += size
    assert start == length
    return out


def dense(length: int) -> Tensor:
    q, k, v = ready(length)
    group = HEADS // KV_HEADS
    attended = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.transpose(0, 1).repeat_interleave(group, 0),
        v.transpose(0, 1).repeat_interleave(group, 0),
        is_causal=True,
    )
    return attended.transpose(0, 1)


def test_equals_dense_attention_within_the_budget() -> None:
    torch.testing.assert_close(run(msa(), 4 * PAGE, [4 * PAGE]), dense(4 * PAGE))


def test_differs_from_dense_attention_beyond_the_budget() -> None:
    """One block past the budget some rows lose a block, earlier rows do not."""
    sparse, full = run(msa(), 5 * PAGE, [5 * PAGE]), dense(5 * PAGE)
    torch.testing.assert_close(sparse[: 4 * PAGE], full[: 4 * PAGE])
    assert (sparse[4 * PAGE :] - full[4 * PAGE :]).abs().amax() > 1e-2


@pytest.mark.parametrize("chunks", [[1] * 3 + [700], [128, 127, 129, 319], [500, 1, 1, 201]])
def test_chunks_change_no_bit(chunks: list[int]) -> None:
    assert torch.equal(run(msa(), 703, chunks), run(msa(), 703, [703]))


def test_init_blocks_reach_the_selection() -> None:
    """With init + local = topk the choice is known, so the result is known too."""
    config = msa(topk=2, num_init_blocks=1)
    length = 4 * PAGE
    q, k, v = ready(length)
    keep = torch.cat([torch.arange(PAGE), torch.arange(3 * PAGE, length)])
    scores = torch.einsum("hd,nhd->hn", q[-1], k[keep].repeat_interleave(2, 1)) * DIM**-0.5
    expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), v[keep].repeat_interleave(2, 1))
    torch.testing.assert_close(run(config, length, [length])[-1], expected)


def test_statistics_count_what_was_read() -> None:
    target = session(msa())
    target.statistics = MSAStatistics()
    length = 6 * PAGE
    pages = torch.arange(6, dtype=torch.int32)
    cache = caches(6)
    tensors = inputs(length)
    out = torch.empty(length, HEADS, DIM)
    target.run(
        target.plan(step(length - 1, length - 1, pages)),
        *(t[:-1] for t in tensors),
        norms=NORMS,
        cos_sin=angles(0, length - 1),
        caches=cache,
        out=out[:-1],
    )
    target.run(
        target.plan(step(length, 1, pages)),
        *(t[-1:] for t in tensors),
        norms=NORMS,
        cos_sin=angles(length - 1, length),
        caches=cache,
        out=out[-1:],
    )
    counted = target.statistics
    assert counted is not None
    assert counted.rows == length
    assert counted.decode_rows == 1
    assert counted.decode_blocks_read == 4 * KV_HEADS
    assert counted.decode_blocks_visible == 6 * KV_HEADS
    assert counted.blocks_visible == KV_HEADS * PAGE * (1 + 2 + 3 + 4 + 5 + 6)
    assert counted.blocks_read == KV_HEADS * PAGE * (1 + 2 + 3 + 4 + 4 + 4)
    assert counted.phase("decode")["rows"] == 1
    assert counted.phase("prefill")["rows"] == length - 1


def test_batch_shapes_are_checked() -> None:
    good = step(256, 2, torch.arange(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be \[num_reqs \+ 1\] = \[2\]"):
        MSABatch(**{**good.__dict__, "cu_seqlens_q": torch.zeros(3, dtype=torch.int32)})
    with pytest.raises(ValueError, match="page_table must be"):
        MSABatch(**{**good.__dict__, "page_table": torch.zeros(2, 2, dtype=torch.int32)})


def workspace(**limits: int) -> Workspace:
    fp32 = torch.float32
    shape = LayerShape(HEADS, KV_HEADS, DIM, DIM // 2, fp32, fp32, fp32)
    capacity = StepCapacity(**{"max_requests": 2, "max_rows": 4, "max_seq_len": 512} | limits)
    return allocate_workspace(msa(), shape, capacity, device=torch.device("cpu"))


def test_a_workspace_belongs_to_the_triton_kernels() -> None:
    triton = KernelChoice("triton", "test")
    with pytest.raises(ValueError, match="'triton' without one"):
        MSASession(msa(), kernels=triton, scale=1.0)
    with pytest.raises(ValueError, match="with one"):
        MSASession(msa(), kernels=choose_kernels("cpu"), scale=1.0, workspace=workspace())


def test_a_workspace_holds_the_largest_step_and_no_more() -> None:
    small, large = workspace(), workspace(max_seq_len=1024)
    # four bytes for each of 2 requests x 4 rows x 4 heads x 4 more blocks
    assert large.num_bytes - small.num_bytes == 4 * 2 * 4 * KV_HEADS * 4
    ids = small.ids(3)
    assert ids.shape == (KV_HEADS, 3, 4)
    assert ids.data_ptr() == small.ids(4).data_ptr()
    assert small.ids(4).numel() == small.scratch.block_ids.numel()
    assert small.scratch.q.shape == (4, HEADS, DIM)
    assert small.scratch.index_q.shape == (4, KV_HEADS, DIM)
    assert "2 requests, 4 rows, 512 tokens" in small.describe()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 1}, "rows=2, but the session was made for at most 1"),
        ({"max_seq_len": 255}, "max_seq_len=256, but the session was made for at most 255"),
    ],
)
def test_a_step_beyond_the_capacity_is_refused(limits: dict[str, int], message: str) -> None:
    batch = step(256, 2, torch.arange(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        workspace(**limits).plan(batch)
    with pytest.raises(ValueError, match="max_rows must be at least 1; got 0"):
        StepCapacity(max_requests=1, max_rows=0, max_seq_len=1)
