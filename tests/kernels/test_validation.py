"""A wrong argument is refused by name, with the rule and the value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from m3_kernels.cache_store import cache_store
from m3_kernels.capability import Backend
from m3_kernels.index_topk import index_topk
from m3_kernels.sparse_attention import sparse_attention
from m3_kernels.testing.cases import Case, Inputs, build

Arguments = dict[str, object]


def index_topk_arguments(inputs: Inputs) -> Arguments:
    return {
        "index_q": inputs.index_q,
        "index_k_pages": inputs.index_k_pages,
        **inputs.batch,
        **inputs.selection,
    }


def sparse_attention_arguments(inputs: Inputs) -> Arguments:
    return {
        "q": inputs.q,
        "k_pages": inputs.k_pages,
        "v_pages": inputs.v_pages,
        "block_ids": torch.zeros(2, 13, 4, dtype=torch.int32),
        **inputs.batch,
        "scale": 0.1,
    }


def cache_store_arguments(inputs: Inputs) -> Arguments:
    return {
        "k": inputs.k,
        "v": inputs.v,
        "index_k": inputs.index_k,
        "k_pages": inputs.k_pages,
        "v_pages": inputs.v_pages,
        "index_k_pages": inputs.index_k_pages,
        "slot_mapping": inputs.slot_mapping,
    }


OPS: dict[str, tuple[Callable[..., object], Callable[[Inputs], Arguments]]] = {
    "index_topk": (index_topk, index_topk_arguments),
    "sparse_attention": (sparse_attention, sparse_attention_arguments),
    "cache_store": (cache_store, cache_store_arguments),
}
INT64 = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("index_topk", {"index_q": torch.zeros(13, 2, 32).double()}, TypeError, "index_q must be"),
        ("index_topk", {"index_q": torch.zeros(13, 2)}, ValueError, r"index_q must be \[T"),
        ("index_topk", {"index_q": torch.zeros(13, 2, 31)}, ValueError, r"got \[7, 16, 32\]"),
        ("index_topk", {"seq_lens": INT64}, TypeError, "seq_lens must be torch.int32; got torch."),
        ("index_topk", {"cu_seqlens_q": torch.zeros(2).int()}, ValueError, r"\[R \+ 1\] = \[3\]"),
        ("index_topk", {"page_table": torch.zeros(3, 9).int()}, ValueError, "page_table must be"),
        ("index_topk", {"page_table": torch.zeros(9, 2).int().T}, ValueError, "contiguous"),
        ("index_topk", {"topk": 0}, ValueError, "topk must be at least 1; got 0"),
        ("index_topk", {"num_local_blocks": -1}, ValueError, "num_local_blocks must not be"),
        ("index_topk", {"num_init_blocks": -1}, ValueError, "num_init_blocks must not be"),
        ("index_topk", {"out": torch.zeros(2, 13, 4)}, TypeError, "out must be torch.int32"),
        ("index_topk", {"out": torch.zeros(13, 2, 4).int()}, ValueError, r"= \[2, 13, 4\]; got"),
        ("index_topk", {"backend": "cutlass"}, ValueError, "backend must be 'auto' or one of"),
        ("sparse_attention", {"q": torch.zeros(13, 7, 32)}, ValueError, "multiple of the 2 KV"),
        ("sparse_attention", {"q": torch.zeros(13, 8, 32).half().long()}, TypeError, "q must be"),
        ("sparse_attention", {"q": torch.zeros(13, 32, 8).mT}, ValueError, "q must be contiguous"),
        ("sparse_attention", {"block_ids": torch.zeros(13, 2, 4).int()}, ValueError, "block_ids"),
        ("sparse_attention", {"block_ids": torch.zeros(2, 13, 4).long()}, TypeError, "block_ids"),
        ("sparse_attention", {"v_pages": torch.zeros(8, 2, 16, 32).half()}, TypeError, "v_pages"),
        ("sparse_attention", {"v_pages": torch.zeros(9, 2, 16, 32)}, ValueError, "v_pages must be"),
        ("sparse_attention", {"out": torch.zeros(13, 8, 32).half()}, TypeError, "out must be"),
        ("sparse_attention", {"lse": torch.zeros(8, 13)}, ValueError, "lse must be"),
        ("sparse_attention", {"q": torch.zeros(13, 8, 32, device="meta")}, ValueError, "on meta"),
        ("cache_store", {"slot_mapping": torch.zeros(13).int()}, TypeError, "slot_mapping must be"),
        ("cache_store", {"slot_mapping": torch.zeros(12).long()}, ValueError, "slot_mapping must"),
        ("cache_store", {"v": torch.zeros(13, 1, 32)}, ValueError, "v must be"),
        ("cache_store", {"index_k": torch.zeros(12, 32)}, ValueError, "index_k must be"),
        ("cache_store", {"index_k_pages": torch.zeros(8, 15, 32)}, ValueError, "index_k_pages"),
        ("cache_store", {"k_pages": torch.zeros(8, 2, 16, 31)}, ValueError, r"= \[8, 2, 16, 31\]"),
    ],
)
def test_refused(op: str, changes: Arguments, error: type[Exception], message: str) -> None:
    function, arguments = OPS[op]
    inputs = build(Case("valid", ((60, 3), (20, 10))))
    function(**arguments(inputs))
    with pytest.raises(error, match=message):
        function(**{**arguments(inputs), **changes})


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("op", ["index_topk", "sparse_attention"])
def test_a_page_outside_the_pool_is_an_error_not_a_crash(op: str, backend: Backend) -> None:
    function, arguments = OPS[op]
    inputs = build(Case("page", ((60, 3), (20, 10)), topk=2))
    inputs.page_table[0, 0] = 10_000
    changed = arguments(inputs)
    if op == "sparse_attention":
        changed["block_ids"] = torch.zeros(2, 13, 2, dtype=torch.int32)
    with pytest.raises(IndexError):
        function(**changed, backend=backend)


@pytest.mark.parametrize("op", ["index_topk", "sparse_attention"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens_q", [0, 3, 99], "cu_seqlens_q must rise"),
        ("cu_seqlens_q", [0, 5, 3], "cu_seqlens_q must rise"),
        ("cu_seqlens_q", [-4, 0, 3], "cu_seqlens_q must rise"),
        ("seq_lens", [63, 100_000], "page_table must cover"),
    ],
)
def test_a_false_description_is_an_error_not_a_crash(
    op: str, name: str, value: list[int], message: str
) -> None:
    function, arguments = OPS[op]
    inputs = build(Case("false", ((60, 3), (20, 10))))
    changed = {**arguments(inputs), name: torch.tensor(value, dtype=torch.int32)}
    if op == "sparse_attention" and name == "seq_lens":
        changed["block_ids"] = torch.full((2, 13, 4), 50, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        function(**changed, backend="native")
