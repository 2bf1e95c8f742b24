"""FlashInfer for prefill attention: where it may be used, how it is called, what is left to us.

Its kernels need a GPU. Its checks and preparations of a call do not, and run here as in the wheel.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from m3_kernels.paged import KVPages, Step
from m3_kernels.sparse_attention import (
    SPARSE_ATTENTION,
    PrefillAttention,
    SparseAttention,
    flashinfer,
    flashinfer_prefill,
    flashinfer_refusal,
    pages_refusal,
)
from m3_kernels.testing.calls import attention_call, chosen
from m3_kernels.testing.cases import Case, Inputs, build
from m3_kernels.testing.compare import assert_accurate, plain_attention
from tests.kernels import flashinfer_wheel

LAYER: dict[str, Any] = {
    "arch": 120,
    "dtype": torch.bfloat16,
    "kv_dtype": torch.bfloat16,
    "num_q_heads": 16,
    "num_kv_heads": 1,
    "head_dim": 128,
    "page_size": 128,
    "topk": 16,
}
# Beyond the budget of 4 blocks; requests of one row and of few beside those of many.
MIXED = Case(
    "mixed",
    ((700, 1), (650, 11), (0, 9), (0, 0), (126, 3)),
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    page_size=128,
    topk=4,
    padding_rows=2,
    dtype=torch.float16,
    pages="packed-heads",
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has FlashInfer and what compiles its kernels."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return monkeypatch


def attend(inputs: Inputs, ids: Tensor, prefill: PrefillAttention) -> tuple[Tensor, Tensor]:
    """The op on Triton with another's prefill, into buffers of NaN; outputs and lse."""
    call = attention_call(inputs, ids, prefill=prefill)
    SPARSE_ATTENTION.run(call, backend="triton")
    assert call.lse is not None
    return call.out, call.lse


def assert_exact(inputs: Inputs, ids: Tensor, results: tuple[Tensor, Tensor]) -> None:
    exact, exact_lse = plain_attention(inputs, ids, torch.float64)
    plain, plain_lse = plain_attention(inputs, ids, inputs.case.dtype)
    assert_accurate(results[0], exact, plain, what="out")
    assert_accurate(results[1], exact_lse, plain_lse, what="lse")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("arch", [120, 121])
@pytest.mark.parametrize("heads", [(64, 4), (16, 1), (8, 1), (4, 1)])
def test_it_may_serve_every_rank_of_m3(arch: int, heads: tuple[int, int]) -> None:
    layer: dict[str, Any] = LAYER | {
        "arch": arch,
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
    }
    assert flashinfer_refusal(**layer) is None
    fp16: dict[str, Any] = {"dtype": torch.float16, "kv_dtype": torch.float16}
    assert flashinfer_refusal(**layer | fp16) is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": 90}, "need compute capability 12.0 or 12.1, this device has 9.0"),
        ({"arch": 80}, "this device has 8.0"),
        ({"arch": 100}, "for 10.0 walk all visible blocks or wait for the device"),
        ({"arch": 103}, "for 10.3 walk all visible blocks"),
        ({"arch": 130}, "this device has 13.0"),
        ({"dtype": torch.float32}, "activations must be torch.bfloat16 or torch.float16 for it"),
        ({"kv_dtype": torch.float16}, "K and V must be torch.bfloat16 for it; got torch.float16"),
        ({"kv_dtype": torch.float8_e4m3fn}, "K and V must be torch.bfloat16 for it"),
        ({"head_dim": 64}, "head_dim must be 128 for it; got 64"),
        ({"page_size": 64}, "page_size must be 128 for it; got 64"),
        ({"topk": 12}, "topk must be 4 or 8 or 16 or 32 for it; got 12"),
        ({"num_q_heads": 12}, "query heads per KV head must be .* got 12"),
    ],
)
def test_what_it_cannot_serve_is_named(changes: dict[str, Any], reason: str) -> None:
    assert re.search(reason, str(flashinfer_refusal(**LAYER | changes)))


def test_a_machine_without_it_or_with_another_release(installed: pytest.MonkeyPatch) -> None:
    installed.setattr(importlib.util, "find_spec", lambda name: None)
    assert "nvidia-cutlass-dsl" in str(flashinfer_refusal(**LAYER))
    installed.setattr(importlib.metadata, "version", lambda name: "0.8.0")
    assert "flashinfer-python 0.8.0 is not among" in str(flashinfer_refusal(**LAYER))
    installed.undo()
    # none of the project's environments has it
    assert flashinfer_refusal(**LAYER) == "flashinfer-python is not installed"


@pytest.mark.parametrize("pages", ["packed-heads", "packed-slots", "separate", "planes"])
@pytest.mark.parametrize("heads", [1, 2])
def test_pages_are_refused_exactly_where_flashinfer_refuses_them(
    pages: Any, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer_wheel.load(monkeypatch)
    inputs = build(dataclasses.replace(MIXED, pages=pages, num_kv_heads=heads, num_q_heads=4))
    assert (pages_refusal(inputs.k_pages, inputs.v_pages) is None) == (pages != "planes")
    pools = [
        (inputs.k_pages, inputs.v_pages),
        (inputs.k_pages[:, :, :, :], inputs.v_pages.clone()),
        (inputs.k_pages[::2], inputs.v_pages[::2]),
        (inputs.k_pages[1:], inputs.v_pages[:-1]),
        (inputs.v_pages, inputs.k_pages),
        (inputs.k_pages.transpose(1, 2).contiguous().transpose(1, 2),) * 2,
    ]
    ids = chosen(inputs)
    for k_pages, v_pages in pools:
        step = Step(torch.zeros_like(inputs.page_table), inputs.cu_seqlens_q, inputs.seq_lens)
        call = attention_call(inputs, ids, kv=KVPages(k_pages, v_pages), step=step, lse=None)
        if pages_refusal(k_pages, v_pages) is None:
            flashinfer_prefill(call)
        else:
            with pytest.raises(ValueError, match=r"contiguous|compact"):
                flashinfer_prefill(call)


def test_the_message_names_what_lies_how() -> None:
    inputs = build(dataclasses.replace(MIXED, pages="planes"))
    words = r"side by side .* got shape \[\d+, 2, 128, 128\] with strides"
    assert re.search(words, str(pages_refusal(inputs.k_pages, inputs.v_pages)))


@pytest.mark.parametrize("pages", ["packed-heads", "packed-slots", "separate"])
def test_one_head_of_one_request(pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimensions of size 1, whose strides are whatever the larger tensor had."""
    flashinfer_wheel.load(monkeypatch)
    case = dataclasses.replace(MIXED, pages=pages, requests=((600, 9),), padding_rows=0)
    inputs = build(dataclasses.replace(case, num_q_heads=4, num_kv_heads=1))
    table = torch.cat([inputs.page_table, inputs.page_table], dim=1)[
        :, : -inputs.page_table.numel()
    ]
    inputs = dataclasses.replace(inputs, page_table=table)
    ids = chosen(inputs)
    call = attention_call(inputs, ids, lse=None)
    flashinfer_prefill(call)
    exact, _ = plain_attention(inputs, ids, torch.float64)
    plain, _ = plain_attention(inputs, ids, torch.float16)
    assert_accurate(call.out, exact, plain, what="out")


@pytest.mark.parametrize("pages", ["packed-heads", "packed-slots", "separate"])
def test_its_call_means_what_the_op_means(pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_wheel.load(monkeypatch)
    inputs = build(dataclasses.replace(MIXED, pages=pages))
    ids = chosen(inputs)
    assert (ids[:, 1:12] >= 0).all()  # the long request chooses, and leaves blocks out
    assert_exact(inputs, ids, attend(inputs, ids, flashinfer_prefill))


def test_scale_and_strided_rows_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_wheel.load(monkeypatch)
    inputs = build(dataclasses.replace(MIXED, requests=((600, 9),), padding_rows=0))
    assert not inputs.q.is_contiguous()  # of a projection's output, which its checks refuse
    ids = chosen(inputs)
    found, expected = (attention_call(inputs, ids, scale=0.5, lse=None) for _ in range(2))
    SPARSE_ATTENTION.run(expected, backend="reference")
    flashinfer_prefill(found)
    torch.testing.assert_close(found.out, expected.out, rtol=2e-3, atol=2e-3)


def test_the_call_is_one_of_the_known_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    real = flashinfer_wheel.load(monkeypatch)
    assert flashinfer_wheel.WHEEL is not None
    assert flashinfer_wheel.WHEEL.name.split("-")[1] in flashinfer.RELEASES
    parameters = inspect.signature(real.msa_sparse_attention).parameters
    assert {"causal", "softmax_scale", "page_table", "seqused_k"} <= set(parameters)
    # what is assumed of releases and stated in the refusals
    assert [group for group in range(1, 129) if _tiles(real, group)] == list(flashinfer.GROUPS)


def test_nothing_before_its_kernels_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, which raise where a value is asked for."""
    real = flashinfer_wheel.load(monkeypatch)
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(real, "_get_compiled_union", lambda *_: lambda *args: launched.append(args))

    def prepared(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, bounds: Tensor, *_: Any, **kw: Any):
        real._build_union_metadata_device(ids, bounds, 128 // kw["group_size"], kw["topk"])
        return torch.empty_like(q)

    monkeypatch.setattr(real, "_msa_sparse_prefill", prepared)
    inputs = build(dataclasses.replace(MIXED, pages="separate"))
    with pytest.raises(NotImplementedError, match="meta"):
        inputs.seq_lens.to("meta").tolist()
    step = Step(
        inputs.page_table.to("meta"),
        inputs.cu_seqlens_q.to("meta"),
        inputs.seq_lens.to("meta"),
    )
    kv = KVPages(inputs.k_pages.to("meta"), inputs.v_pages.to("meta"))
    q, ids = inputs.q.to("meta"), chosen(inputs).to("meta")
    flashinfer_prefill(SparseAttention(q, kv, ids, step, scale=1.0, out=torch.empty_like(q)))
    assert len(launched) == 1


def _tiles(real: Any, group: int) -> bool:
    try:
        real._union_tile_config(group)
    except ValueError:
        return False
    return True


def test_few_rows_and_no_rows_stay_ours() -> None:
    """Whatever a prefill writes there, requests of at most 8 rows and padding are put right."""
    inputs = build(MIXED)
    ids = chosen(inputs)
    exact, exact_lse = plain_attention(inputs, ids, torch.float64)

    def prefill(call: SparseAttention) -> None:
        out, lse = call.out, call.lse
        assert lse is not None
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        for first, last in ((1, 12), (12, 21)):
            out[first:last] = exact[first:last].to(out.dtype)
            lse[first:last] = exact_lse[first:last].float()

    results = attend(inputs, ids, prefill)
    assert_exact(inputs, ids, results)
    assert (results[0][-2:] == 0).all()
    assert (results[1][-2:] == -math.inf).all()


def test_it_is_not_asked_about_steps_of_few_rows() -> None:
    inputs = build(dataclasses.replace(MIXED, requests=((700, 8), (3, 1)), padding_rows=0))
    ids = chosen(inputs)

    def prefill(call: SparseAttention) -> None:
        raise AssertionError("no request has more than 8 rows")

    assert_exact(inputs, ids, attend(inputs, ids, prefill))
