"""Our kernels as PTX, each compared with its op's reference: run in processes that compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.index_topk import INDEX_TOPK
from m3_kernels.index_topk.triton import launches as launches_of_choice
from m3_kernels.index_topk.triton import with_memory
from m3_kernels.launch import Launch
from m3_kernels.mxfp8_linear import mxfp8_linear
from m3_kernels.page_table import fill_page_table
from m3_kernels.page_table.triton import launch_of as page_table_launch
from m3_kernels.sparse_attention import SPARSE_ATTENTION
from m3_kernels.testing.calls import attention_call, chosen, index_call
from m3_kernels.testing.cases import (
    Case,
    build,
    empty_caches,
    empty_pages,
    production_cases,
)
from m3_kernels.testing.compare import assert_accurate, plain_attention, selection_faults
from m3_kernels.testing.ptx import Fault, executed
from m3_kernels.testing.ptx.launch import compile_launch, execute
from m3_kernels.testing.ptx.machine import prepare
from m3_kernels.testing.ptx.parse import parse
from m3_kernels.work_plan import DECODE_ROWS, make_work_plan
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.self_test import verify_case
from tests.kernels.mxfp8 import LinearCase, every_code, inputs
from tests.kernels.norm_rope import assert_close, step_of
from tests.kernels.norm_rope import run as run_norm_rope

CPU = torch.device("cpu")
BF16, INT8 = torch.bfloat16, torch.int8
E5M2, E4M3 = torch.float8_e5m2, torch.float8_e4m3fn
M3 = dataclasses.replace(production_cases()[1], dtype=BF16)
SMALL = Case("small", (), num_q_heads=4, head_dim=64, index_dim=64, page_size=32, dtype=BF16)


def page_table(seed: int = 0) -> None:
    """Requests of many lengths, in rows of a table that end with them."""
    lengths = [1, 16, 17, 16 * 300 - 5, 0, 16 * 256, 16 * 256 + 1]
    random = torch.Generator().manual_seed(seed)
    pages = torch.randperm(len(lengths) * 300, generator=random).view(-1, 300)
    slots = (pages[..., None] * 16 + torch.arange(16)).flatten(1).int()
    rows = torch.randperm(len(lengths), generator=random)
    given = {"slots": slots, "rows": rows, "seq_lens": torch.tensor(lengths).int()}
    found, expected = (torch.full((len(lengths), 307), -7).int() for _ in range(2))
    with executed(seed=seed) as run:
        fill_page_table(found[:, :300], **given, page_size=16, backend="triton")
    fill_page_table(expected[:, :300], **given, page_size=16, backend="reference")
    assert torch.equal(found, expected)
    assert run.instructions["ld.global"]


def work_plan() -> None:
    """All kinds of request, in more of them than one load of the kernel takes."""
    rows = [0, 1, 7, DECODE_ROWS, DECODE_ROWS + 1] * 52
    step: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, *rows]).cumsum(0).int(),
        "seq_lens": torch.tensor([120 + count for count in rows]).int(),
        "num_rows": sum(rows) + 3,
        "page_size": 16,
    }
    with executed() as run:
        plan = make_work_plan(**step, backend="triton")
    expected = make_work_plan(**step, backend="reference")
    for field in ("cum_blocks", "cum_tiles", "range_start", "range_request", "row_request"):
        assert torch.equal(getattr(plan, field), getattr(expected, field)), field
    assert run.kernels == ["work_plan_kernel"]


def caches_of(case: Case, pages: int) -> dict[str, Any]:
    """Pools without a key, by the names of the op's arguments."""
    k_pages, v_pages, index_k_pages, scales, _ = empty_caches(case, pages)
    found: dict[str, Any] = {"k_pages": k_pages, "v_pages": v_pages, "index_k_pages": index_k_pages}
    return found if scales is None else found | {"index_k_scales": scales}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """One NaN is as good as another: conversions need not keep its sign."""
    a, b = a.contiguous(), b.contiguous()
    equal = (a.view(torch.uint8) == b.view(torch.uint8)).view(*a.shape, -1).all(-1)
    return bool((equal | (a.float().isnan() & b.float().isnan())).all())


def store(case: Case, *, arch: int = 80) -> None:
    """Every byte of the pools as the reference leaves it; values of all sizes, NaN among them."""
    given = build(case)
    given.k[0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 65504, torch.nan]).to(case.dtype)
    given.k[1] *= 1e-3
    given.v[2] *= 300
    scales: dict[str, Any] = {"k_scale": given.k_scale, "v_scale": given.v_scale}
    pools = [caches_of(case, given.k_pages.shape[0]) for _ in range(2)]
    rows = given.k, given.v, given.index_k
    with executed(arch=arch) as run:
        cache_store(*rows, **pools[0], slot_mapping=given.slot_mapping, **scales, backend="triton")
    cache_store(*rows, **pools[1], slot_mapping=given.slot_mapping, **scales, backend="reference")
    for name, pool in pools[0].items():
        assert same_bytes(pool, pools[1][name]), name
    assert run.kernels == ["cache_store_kernel"]


def layer(case: Case, *, arch: int = 80, seed: int = 0) -> None:
    """A step of a session, all parts of it against the oracle, as a server's self-test does."""
    with executed(arch=arch, seed=seed):
        findings = verify_case(case, kernels=KernelChoice("triton", "test"), device=CPU)
    assert findings
    assert all(finding.ok for finding in findings), findings


def choose_and_attend(case: Case, *, arch: int = 80, needs: tuple[str, ...] = ()) -> None:
    """Both ops of a step, each once, the second on what the reference chooses."""
    given = build(case)
    ids = chosen(given)
    choice, attention = index_call(given), attention_call(given, ids)
    with executed(arch=arch) as run:
        INDEX_TOPK.run(choice, backend="triton")
        SPARSE_ATTENTION.run(attention, backend="triton")
    assert selection_faults(choice.out, ids, given) == []
    exact, exact_lse = plain_attention(given, ids, torch.float64)
    plain, plain_lse = plain_attention(given, ids, case.dtype)
    assert_accurate(attention.out, exact, plain, what="out")
    assert attention.lse is not None
    assert_accurate(attention.lse, exact_lse, plain_lse, what="lse")
    missing = [name for name in needs if not run.instructions[name]]
    assert not missing, missing


def norm_and_store(case: Case) -> None:
    """Queries and keys as near to float64 as their dtype allows, and no other byte written."""
    step = step_of(case)
    pages = empty_pages(case, step.inputs.k_pages.shape[0])
    with executed() as run:
        q, index_q = run_norm_rope(step, pages, "triton")
    names = ("k", "v", "index_k")
    found = {"q": q, "index_q": index_q} | dict(zip(names, pages, strict=True))
    assert_close(found, step)
    assert run.kernels == ["norm_rope_store_kernel"]


def product(case: LinearCase, dtype: torch.dtype, *, arch: int = 80) -> None:
    """Weights that stay in MXFP8."""
    x, weight, scales, starts = inputs(case, dtype)
    given = {"group_starts": starts}
    exact = mxfp8_linear(x.float(), weight, scales, **given, backend="reference")
    plain = mxfp8_linear(x, weight, scales, **given, backend="torch")
    with executed(arch=arch) as run:
        actual = mxfp8_linear(x, weight, scales, **given, backend="triton")
    assert_accurate(actual, exact.double(), plain.double(), what=case.name)
    assert run.instructions["mma.sync"]


def every_code_of_mxfp8(arch: int) -> None:
    """Every e4m3 number times every power of two that keeps it one of bf16, exactly."""
    x, weight, scales = every_code()
    some = torch.tensor([0, 1, 2, 110, 127, 140, 245, 246])
    weight = weight.view(torch.uint8)[some].view(E4M3)
    expected = weight.double() * 2.0 ** (scales[some].double()[:, :1] - 127)
    with executed(arch=arch):
        actual = mxfp8_linear(x.bfloat16(), weight, scales[some], backend="triton")
    assert torch.equal(actual.T.double(), expected.float().bfloat16().double())


def of(geometry: Case, name: str, *requests: tuple[int, int], **changes: Any) -> Case:
    return dataclasses.replace(geometry, name=name, requests=requests, **changes)


PIPELINED = ("cp.async", "mma.sync", "ldmatrix.sync", "bar.sync", "shfl.sync")
EIGHT_BITS = {"kv_dtype": E5M2, "index_dtype": INT8}
E4M3_ONLY = {"kv_dtype": E4M3, "index_dtype": E4M3}
SHORT = ((20, 5), (0, 3))
# In M3's geometry on one rank of four: more than 16 blocks of 128 keys, and rows that cross from
# one block into the next.
DECODE, VERIFY = ((2300, 1), (127, 1), (0, 1)), ((2174, 4), (128, 3))
PREFILL = ((2171, 12), (0, 9))
MIXED = ((2300, 1), (90, 3), (2171, 10))

# Each in a process of its own: Triton 3.6 keeps conversions of the first chip it compiles for.
CHECKS: dict[str, Callable[[], object]] = {
    "page table": page_table,
    "work plan": work_plan,
    "store bf16": lambda: store(of(SMALL, "store", *SHORT, padding_rows=1)),
    "store e5m2 and int8": lambda: store(of(SMALL, "store", *SHORT, **EIGHT_BITS)),
    "store e4m3": lambda: store(of(SMALL, "store", *SHORT, **E4M3_ONLY), arch=89),
    "norm and store": lambda: norm_and_store(of(SMALL, "norm", *SHORT, padding_rows=1)),
    "choice and attention": lambda: choose_and_attend(of(M3, "mixed", *MIXED), needs=PIPELINED),
    "choice and attention of 8 bits": lambda: choose_and_attend(
        of(M3, "decode", *DECODE[:2], **EIGHT_BITS)
    ),
    "product of few tokens": lambda: product(LinearCase("few", 3, 150, 224), BF16),
    "products of experts": lambda: product(
        LinearCase("groups", 41, 40, 64, groups=(3, 0, 20, 0, 17, 1)), BF16
    ),
    "every code of mxfp8": lambda: every_code_of_mxfp8(80),
}
EXTENDED: dict[str, Callable[[], object]] = {
    "decode": lambda: layer(of(M3, "decode", *DECODE)),
    "verify": lambda: layer(of(M3, "verify", *VERIFY)),
    "prefill": lambda: layer(of(M3, "prefill", *PREFILL)),
    "mixed, in another order": lambda: layer(of(M3, "mixed", *MIXED, (0, 0), (2100, 3)), seed=1),
    "decode of 8 bits": lambda: layer(of(M3, "decode", *DECODE, **EIGHT_BITS)),
    "prefill of 8 bits": lambda: layer(of(M3, "prefill", *PREFILL, **EIGHT_BITS)),
    "decode of e4m3": lambda: layer(of(M3, "decode", *DECODE, **E4M3_ONLY), arch=89),
    "prefill of e4m3": lambda: layer(of(M3, "prefill", *PREFILL, **E4M3_ONLY), arch=89),
    "every code of mxfp8 on sm_89": lambda: every_code_of_mxfp8(89),
}


def fault_of(launch: Launch, ptx: str, shared: int) -> str:
    """What a run of a launch as other PTX ends with; "" if with nothing."""
    try:
        execute(launch, prepare(parse(ptx)), arch=80, shared=shared)
    except Fault as fault:
        return str(fault)
    return ""


def faults_without(launch: Launch, instruction: str) -> list[str]:
    """What it ends with when one of these instructions is left out, for each of them in turn."""
    made = compile_launch(launch, 80)
    assert not fault_of(launch, made.ptx, made.shared)
    lines = made.ptx.split("\n")
    places = [place for place, line in enumerate(lines) if instruction in line]
    without = ("\n".join(lines[:place] + lines[place + 1 :]) for place in places)
    return [fault_of(launch, text, made.shared) for text in without]


def choice_launches() -> list[Launch]:
    """Of a step of decoding beyond 16 blocks."""
    call = index_call(build(of(M3, "decode", (2300, 1), (127, 2))))
    return list(launches_of_choice(with_memory(call), arch=80))


def missing_barriers() -> None:
    """All but the first keep something apart."""
    _, choice = choice_launches()
    first, *others = faults_without(choice, "bar.sync")
    assert not first
    assert len(others) >= 8
    for fault in others:
        assert "without a barrier between it was" in fault, fault
        assert fault.count("standard.py:") + fault.count("triton_select.py:") == 2, fault


def missing_waits() -> None:
    """Keys are multiplied, and their memory used again, while they are still on their way."""
    scores, _ = choice_launches()
    faults = faults_without(scores, "cp.async.wait_group")
    assert faults
    for fault in faults:
        assert "while a copy to it is in flight, started by `cp.async.cg" in fault, fault


def slots_beyond_a_table() -> None:
    """A row that the table of slots has not."""
    numbers = torch.zeros(2, 64, dtype=torch.int32)
    launch = page_table_launch(
        torch.zeros(1, 4, dtype=torch.int32),
        slots=numbers,
        rows=torch.tensor([2]),
        seq_lens=torch.tensor([40]).int(),
        page_size=16,
        arch=80,
    )
    made = compile_launch(launch, 80)
    fault = fault_of(launch, made.ptx, made.shared)
    address = numbers.data_ptr() + numbers.nbytes
    assert f"thread 0 of program (0, 0, 0): address {address:#x}, which is in no tensor" in fault
    assert "ld.global.b32" in fault
    assert "(triton.py:" in fault


PLANTED: dict[str, Callable[[], object]] = {
    "missing barriers": missing_barriers,
    "missing waits": missing_waits,
    "slots beyond a table": slots_beyond_a_table,
}
