"""The Triton kernels of `sparse_attention`: exactness, sets, masks, NaN, and equal bits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.paged import KVPages
from m3_kernels.sparse_attention import (
    SparseAttentionWorkspace,
    allocate_sparse_attention_workspace,
    sparse_attention,
)
from m3_kernels.sparse_attention.traffic import AttentionTraffic, sparse_attention_traffic
from m3_kernels.sparse_attention.workspace import decode_tiles
from m3_kernels.testing.calls import attention_call, chosen
from m3_kernels.testing.cases import (
    INT32_MAX,
    Case,
    Inputs,
    all_cases,
    build,
    production_cases,
)
from m3_kernels.testing.compare import assert_accurate, plain_attention
from m3_kernels.tiles import power_of_two
from m3_kernels.work_plan import make_work_plan
from tests.kernels.test_addressing import FAR_PAGE, far_heads, far_pool

INT32_MIN = -(2**31)
QUERY_LENS = (1, 2, 3, 4, 5, 8, 100)

# Programs run one after another, tens of milliseconds each: the long prefills lose some rows.
LONGEST = 17


def shortened(case: Case) -> Case:
    """The same step with fewer rows of each long request: the last ones, unless the first matter.

    Sequences are as long as before where no row stands before position 0.
    """
    first = 0 if case.missing_keys else 1
    requests = tuple(
        (cached + first * (rows - min(rows, LONGEST)), min(rows, LONGEST))
        for cached, rows in case.requests
    )
    return dataclasses.replace(case, requests=requests)


CASES = [
    shortened(case)
    for case in all_cases()
    # bf16 arithmetic is wrong in the interpreter.
    if case.dtype != torch.bfloat16 and not case.name.startswith("m3")
]


def attend(
    inputs: Inputs,
    ids: Tensor,
    *,
    arch: int | None = None,
    use_descriptors: bool | None = None,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Run the kernels into buffers of NaN; outputs and lse."""
    from m3_kernels.sparse_attention.triton import sparse_attention_triton

    call = attention_call(inputs, ids, **changes)
    sparse_attention_triton(call, arch=arch, use_descriptors=use_descriptors)
    assert call.lse is not None
    return call.out, call.lse


def assert_exact(inputs: Inputs, ids: Tensor, results: tuple[Tensor, Tensor]) -> None:
    exact, exact_lse = plain_attention(inputs, ids, torch.float64)
    plain, plain_lse = plain_attention(inputs, ids, inputs.case.dtype)
    out, lse = results
    assert_accurate(out, exact, plain, what="out")
    assert_accurate(lse, exact_lse, plain_lse, what="lse")
    assert (out[exact_lse == -math.inf] == 0).all()


def rows_of(inputs: Inputs, ids: Tensor, pieces: list[tuple[int, int, int]]) -> tuple[Inputs, Any]:
    """The step of only the rows `first:last`, counted in their request, of some requests."""
    starts = inputs.cu_seqlens_q.tolist()
    rows, counts, lengths = [], [0], []
    for request, first, last in pieces:
        all_rows = starts[request + 1] - starts[request]
        rows += range(starts[request] + first, starts[request] + last)
        counts.append(last - first)
        lengths.append(int(inputs.seq_lens[request]) - (all_rows - last))
    return dataclasses.replace(
        inputs,
        q=inputs.q[rows],
        page_table=inputs.page_table[[request for request, _, _ in pieces]],
        cu_seqlens_q=torch.tensor(counts).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
    ), ids[:, rows].contiguous()


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_exact_arithmetic(case: Case) -> None:
    inputs = build(case)
    ids = chosen(inputs)
    assert_exact(inputs, ids, attend(inputs, ids, arch=90, use_descriptors=False))


def test_descriptors_and_pointers_read_the_same() -> None:
    inputs = build(
        Case("tiles", ((90, 2), (60, 9)), head_dim=64, topk=3, num_q_heads=2, num_kv_heads=1)
    )
    ids = chosen(inputs)
    pointers = attend(inputs, ids, arch=90, use_descriptors=False)
    assert_exact(inputs, ids, pointers)
    assert_same_bits(attend(inputs, ids, arch=90, use_descriptors=True), pointers)


def test_pages_beyond_32_bits() -> None:
    near = build(
        Case(
            "far",
            ((100, 2), (90, 9)),
            num_q_heads=2,
            num_kv_heads=1,
            head_dim=128,
            page_size=32,
            topk=2,
            dtype=torch.float16,
        )
    )
    far = dataclasses.replace(
        near,
        k_pages=far_pool(near.k_pages),
        v_pages=far_pool(near.v_pages),
        page_table=near.page_table.where(near.page_table < 0, near.page_table + FAR_PAGE),
    )
    ids = chosen(near)
    assert_same_bits(attend(far, ids, arch=90), attend(near, ids, arch=90))


def test_heads_beyond_32_bits() -> None:
    near = build(Case("far", ((60, 1),), num_q_heads=4, num_kv_heads=4, topk=2))
    far = dataclasses.replace(
        near, k_pages=far_heads(near.k_pages), v_pages=far_heads(near.v_pages)
    )
    ids = chosen(near)
    assert_same_bits(attend(far, ids), attend(near, ids))


@pytest.mark.usefixtures("products_in_order")
def test_the_real_geometry() -> None:
    # 2,049 keys are one more than 16 blocks hold: every row leaves one of its blocks out.
    case = dataclasses.replace(
        production_cases()[1], name="m3", requests=((2174, 2),), dtype=torch.float16
    )
    inputs = build(case)
    ids = chosen(inputs)
    results = attend(inputs, ids, arch=90, use_descriptors=True)
    assert_exact(inputs, ids, results)
    one, ids_of_one = rows_of(inputs, ids, [(0, 1, 2)])
    assert_same_bits(attend(one, ids_of_one, arch=90), tuple(r[1:2] for r in results))


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize(
    ("arch", "dtype"), [(80, torch.float32), (90, torch.float16)], ids=["keys-first", "lines-first"]
)
def test_verification_equals_decoding_bit_by_bit(rows: int, arch: int, dtype: torch.dtype) -> None:
    # From the last rows of one block into the next; some blocks are shared by rows, others not.
    case = Case("verify", ((109, rows), (30, 1)), num_kv_heads=1, num_q_heads=4, topk=5)
    inputs = build(dataclasses.replace(case, dtype=dtype))
    ids = chosen(inputs)
    ids[0, 1, :3] = torch.tensor([4, 2, -1])
    together = attend(inputs, ids, arch=arch)
    assert_exact(inputs, ids, together)
    for row in range(rows):
        one, ids_of_one = rows_of(inputs, ids, [(0, row, row + 1)])
        assert_same_bits(
            attend(one, ids_of_one, arch=arch), tuple(r[row : row + 1] for r in together)
        )


def test_chunks_and_company_of_a_prefill_do_not_matter() -> None:
    inputs = build(Case("chunks", ((21, 30), (100, 9)), num_kv_heads=1, num_q_heads=4))
    ids = chosen(inputs)
    together = attend(inputs, ids, arch=90)
    for first, last in ((0, 13), (13, 30), (5, 30)):
        piece, ids_of_piece = rows_of(inputs, ids, [(0, first, last)])
        assert_same_bits(
            attend(piece, ids_of_piece, arch=90), tuple(r[first:last] for r in together)
        )


@pytest.mark.parametrize("rows", [3, 10])
def test_ids_are_a_set(rows: int) -> None:
    inputs = build(Case("set", ((100, rows),), num_kv_heads=1, num_q_heads=2))
    ids = chosen(inputs)
    noise = torch.tensor([INT32_MAX, -1, INT32_MIN, 10_000], dtype=torch.int32)
    noisy = torch.cat([noise.expand(1, rows, 4), ids.flip(-1), ids], dim=-1)
    wider = torch.cat([ids, torch.full((1, rows, 8), -1, dtype=torch.int32)], dim=-1)
    ids[0, 1] = noise
    noisy[0, 1] = noise.repeat(3)
    wider[0, 1] = noise.repeat(3)
    out, lse = attend(inputs, ids)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert out[0].isfinite().all()
    assert (out[2] != 0).any()
    assert_same_bits(attend(inputs, noisy), (out, lse))
    assert_same_bits(attend(inputs, wider), (out, lse))


@pytest.mark.parametrize(
    ("cached", "poisoned"),
    [
        pytest.param(36, 42, id="between-programs"),
        pytest.param(37, 42, id="between-rows-of-a-program"),
        pytest.param(46, 47, id="last-key-of-a-block"),
        pytest.param(22, 42, id="prefill"),
    ],
)
def test_keys_of_later_rows_are_invisible_even_if_nan(cached: int, poisoned: int) -> None:
    end = max(44, poisoned + 1)
    inputs = build(Case("later", ((cached, end - cached),), num_kv_heads=1, num_q_heads=2))
    ids = chosen(inputs)
    expected = attend(inputs, ids)
    page = int(inputs.page_table[0, 2])  # positions 32 to 47
    inputs.k_pages[page, :, poisoned - 32 :] = torch.nan
    inputs.v_pages[page, :, poisoned - 32 :] = torch.inf
    got = attend(inputs, ids)
    rows = poisoned - cached
    assert_same_bits(tuple(r[:rows] for r in got), tuple(r[:rows] for r in expected))
    assert not got[0][rows:].isfinite().any()


@pytest.mark.parametrize("rows", [2, 9])
def test_blocks_of_other_rows_are_invisible_even_if_nan(rows: int) -> None:
    inputs = build(Case("others", ((100, rows),), topk=2, num_kv_heads=1, num_q_heads=2))
    ids = torch.tensor([[[1, 6], *[[0, 6]] * (rows - 1)]], dtype=torch.int32)
    expected = attend(inputs, ids)
    inputs.v_pages[int(inputs.page_table[0, 1]), 0, 3] = torch.nan
    inputs.k_pages[int(inputs.page_table[0, 1])] = torch.nan
    for block in (2, 3, 4, 5):  # nobody's
        inputs.k_pages[int(inputs.page_table[0, block])] = torch.nan
        inputs.v_pages[int(inputs.page_table[0, block])] = torch.nan
        inputs.page_table[0, block] = INT32_MAX
    got = attend(inputs, ids)
    assert_same_bits(tuple(r[1:] for r in got), tuple(r[1:] for r in expected))
    assert got[0][0].isnan().all()


def test_without_any_id_there_is_no_key() -> None:
    inputs = build(Case("nothing", ((20, 2),)))
    out, lse = attend(inputs, torch.zeros(2, 2, 0, dtype=torch.int32))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_extreme_logits() -> None:
    inputs = build(Case("extreme", ((60, 1),), num_kv_heads=1, num_q_heads=1))
    inputs.q.zero_()
    inputs.q[..., 0] = 1 / inputs.scale
    ids = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
    page = int(inputs.page_table[0, 1])
    inputs.k_pages[page, 0, 3, 0] = 1e4  # outweighs everything by far
    out, lse = attend(inputs, ids)
    torch.testing.assert_close(out[0, 0], inputs.v_pages[page, 0, 3])
    torch.testing.assert_close(lse[0, 0], torch.tensor(1e4))
    inputs.k_pages[..., 0] = -math.inf
    out, lse = attend(inputs, ids)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    inputs.k_pages[page, 0, 3, 0] = math.nan
    out, lse = attend(inputs, ids)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("pages", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_fp8_pages_with_scales(rows: int, pages: torch.dtype) -> None:
    inputs = build(Case("fp8", ((50, rows),)).with_dtype(torch.float16))
    ids = chosen(inputs)
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([3.0])
    stored = dataclasses.replace(
        inputs, k_pages=inputs.k_pages.to(pages), v_pages=inputs.v_pages.to(pages)
    )
    expected_lse = torch.empty(inputs.q.shape[:2])
    expected = sparse_attention(
        stored.q.float(),
        stored.k_pages,
        stored.v_pages,
        ids,
        **stored.batch,
        scale=stored.scale,
        k_scale=k_scale,
        v_scale=v_scale,
        lse=expected_lse,
        backend="reference",
    )
    out, lse = attend(
        stored, ids, arch=89, kv=KVPages(stored.k_pages, stored.v_pages, k_scale, v_scale)
    )
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=6e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


def test_refusals_name_the_alternative() -> None:
    inputs = build(Case("refused", ((50, 1),)))
    ids = chosen(inputs)
    e4m3 = dataclasses.replace(
        inputs,
        k_pages=inputs.k_pages.to(torch.float8_e4m3fn),
        v_pages=inputs.v_pages.to(torch.float8_e4m3fn),
    )
    with pytest.raises(NotImplementedError, match="Keep KV in float8_e5m2"):
        attend(e4m3, ids, arch=86)
    arguments = {**inputs.batch, "scale": inputs.scale}
    for backend in ("native", "torch"):
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            sparse_attention(e4m3.q, e4m3.k_pages, e4m3.v_pages, ids, **arguments, backend=backend)
    small = SparseAttentionWorkspace(torch.empty(10), torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="workspace must hold"):
        attend(inputs, ids, workspace=small)


def test_the_public_function_and_the_workspace_of_a_session() -> None:
    inputs = build(Case("public", ((60, 3), (20, 1)), padding_rows=1))
    ids = chosen(inputs)
    expected, _ = attend(inputs, ids)
    rows, heads, dim = inputs.q.shape
    workspace = allocate_sparse_attention_workspace(
        max_reqs=4,
        max_query_len=8,
        num_q_heads=heads,
        num_kv_heads=2,
        head_dim=dim,
        page_size=16,
        topk=4,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device=inputs.q.device,
    )
    workspace.partial.fill_(torch.nan)
    plan = make_work_plan(
        cu_seqlens_q=inputs.cu_seqlens_q, seq_lens=inputs.seq_lens, num_rows=rows, page_size=16
    )
    for _ in range(2):  # a replay finds the workspace as the last one left it
        out = sparse_attention(
            inputs.q,
            inputs.k_pages,
            inputs.v_pages,
            ids,
            **inputs.batch,
            scale=inputs.scale,
            plan=plan,
            workspace=workspace,
            backend="triton",
        )
        assert torch.equal(out, expected)
        assert (workspace.arrivals == 0).all()


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_what_decides_bits_does_not_depend_on_the_step(
    arch: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    tiles = [
        decode_tiles(
            max_query_len=query_len,
            group=16,
            head_dim=128,
            page_size=128,
            topk=16,
            dtype=dtype,
            kv_dtype=kv_dtype,
            arch=arch,
        )
        for query_len in QUERY_LENS
    ]
    assert len({(t.keys, t.segment_blocks, t.head_pad, t.key_axis) for t in tiles}) == 1
    # sums over keys along the second axis are in the order of the tile's layout
    assert len({t.lines for t in tiles if t.key_axis == 1}) <= 1
    for query_len, tile in zip(QUERY_LENS, tiles, strict=True):
        assert tile.rows * tile.row_groups >= min(query_len, 8)


def m3_traffic(requests: list[tuple[int, int]], **options: Any) -> AttentionTraffic:
    """MiniMax-M3 in bf16 where neighbouring rows choose the same blocks: the last ones."""
    chosen = []
    for seq_len, query_len in requests:
        own = [(seq_len - query_len + row) // 128 for row in range(query_len)]
        chosen.append([[set(range(max(0, b - 15), b + 1)) for b in own]] * 4)
    return sparse_attention_traffic(
        requests,
        chosen=chosen,
        num_q_heads=64,
        num_kv_heads=4,
        head_dim=128,
        page_size=128,
        q_bytes=2,
        kv_bytes=2,
        **{"rows": 4, "segment_blocks": 2, "prefill_rows": 8, **options},
    )


@pytest.mark.parametrize(
    ("batch", "length", "megabytes"), [(1, 8192, 4.2), (1, 2**20, 4.2), (64, 8192, 268)]
)
def test_decoding_reads_the_keys_of_the_roofline_once(
    batch: int, length: int, megabytes: float
) -> None:
    found = m3_traffic([(length, 1)] * batch)
    assert found.kv_bytes / 1e6 == pytest.approx(megabytes, rel=0.005)
    assert found.launches == 1
    assert found.partial_bytes < 0.07 * found.kv_bytes


def test_verification_and_prefill_share_keys() -> None:
    one, four = m3_traffic([(8192, 1)]), m3_traffic([(8192, 4)])
    assert four.kv_bytes == one.kv_bytes
    assert four.launches == 1
    prefill = m3_traffic([(8192, 4096)])
    assert prefill.kv_bytes < 4096 / 8 * one.kv_bytes * 1.01
    assert prefill.launches == 2


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_bytes_are_those_of_the_model(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    inputs = build(Case("traffic", ((103 - rows, rows), (40, rows)), num_kv_heads=1, num_q_heads=2))
    ids = chosen(inputs)
    pool = inputs.k_pages.untyped_storage()
    first, end = pool.data_ptr(), pool.data_ptr() + pool.nbytes()
    counted = 0
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        nonlocal counted
        inside = (pointers.data >= first) & (pointers.data < end) & mask.data
        counted += int(inside.sum()) * inputs.k_pages.element_size()
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    attend(inputs, ids, arch=90, use_descriptors=False)
    starts = [0, rows, 2 * rows]
    expected = sparse_attention_traffic(
        [(103, rows), (40 + rows, rows)],
        chosen=[
            [[set(ids[0, row].tolist()) - {-1} for row in range(a, b)]]
            for a, b in itertools.pairwise(starts)
        ],
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=32,
        page_size=16,
        q_bytes=4,
        kv_bytes=4,
        rows=min(power_of_two(rows), 2),  # fp32, by the default configuration
        segment_blocks=2,
        prefill_rows=4,
    )
    assert counted == expected.kv_bytes
