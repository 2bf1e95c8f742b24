"""Is a kernel family right on this device? Cases run through a session and compared with the maths.

Kernels can be compiled for a chip nobody here ever had. A server therefore runs `self_test` before
it serves on a GPU, and `m3-plugin check` runs every case; neither trusts anything but the oracle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from m3_kernels.cache_store import cache_store
from m3_kernels.index_topk import index_topk
from m3_kernels.testing.cases import Case, Inputs, build, whole_storage
from m3_kernels.testing.compare import accuracy, plain_attention, selection_faults
from m3_kernels.validation import FP8_DTYPES, LOW_PRECISION_DTYPES
from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.backends import KernelChoice
from m3_plugin.batch import MSABatch, StepCapacity
from m3_plugin.config import MSAConfig
from m3_plugin.session import MSACaches, MSASession
from m3_plugin.workspace import LayerShape, allocate_workspace

# The layouts of K and V which another library's prefill may meet (`pages_refusal`).
PREFILL_PAGES = ("packed-heads", "packed-slots", "separate")


class KernelsAreWrongError(RuntimeError):
    """The chosen kernels give wrong results on this device, so nothing may be served with them."""


@dataclass(frozen=True)
class Finding:
    """One comparison of one case.

    Attributes
    ----------
    case, phase : name of the case; "decode", "verify", "prefill" or "mixed"
    quantity : "cache", "selection", "attention", "run", "repeats", "chunks" or "graph"
    error, allowed : largest absolute error and its limit, where the quantity has one
    faults : what is wrong, for a person to read; empty if nothing is
    """

    case: str
    phase: str
    quantity: str
    error: float | None = None
    allowed: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def phase_of(case: Case) -> str:
    """Which kernels a case goes through: "decode", "verify", "prefill" or "mixed"."""
    lengths = [rows for _, rows in case.requests if rows]
    if all(rows <= 1 for rows in lengths):
        return "decode"
    if all(rows <= DECODE_ROWS for rows in lengths):
        return "verify"
    return "prefill" if all(rows > DECODE_ROWS for rows in lengths) else "mixed"


def self_test(
    msa: MSAConfig,
    *,
    kernels: KernelChoice,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
) -> tuple[Finding, ...]:
    """Decode, verify and prefill of the served geometry against the oracle; about a second.

    With a prefill of another library only the steps it takes part in, on pages as hosts lay them
    out, and chunk by chunk as well.

    The oracle runs on the CPU. Works inside a host's `torch.device` and default-dtype contexts.

    Parameters
    ----------
    num_q_heads, num_kv_heads : of one rank
    dtype : of activations
    kv_dtype, index_dtype : of the pages of K and V, of index keys; pages of 8 bits are tried as
        such, all others in `dtype`
    """
    budget = msa.topk_blocks * msa.block_size
    geometry = Case(
        "",
        (),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        index_dim=msa.index_dim,
        page_size=msa.block_size,
        topk=msa.topk_blocks,
        num_local_blocks=msa.num_local_blocks,
        num_init_blocks=msa.num_init_blocks,
        dtype=dtype,
        kv_dtype=kv_dtype if kv_dtype in FP8_DTYPES else None,
        index_dtype=index_dtype if index_dtype in LOW_PRECISION_DTYPES else None,
    )
    # Each phase beyond the budget, where selection decides, and across the end of a block.
    steps = {
        "decode": ((budget + 3 * msa.block_size, 1), (msa.block_size - 1, 1), (0, 1)),
        "verify": ((budget + 2 * msa.block_size - 2, 4), (msa.block_size, 3)),
        "prefill": ((budget + msa.block_size - 5, DECODE_ROWS + 4), (0, DECODE_ROWS + 1)),
    }
    cases = [replace(geometry, name=name, requests=requests) for name, requests in steps.items()]
    if kernels.prefill is not None:
        mixed = ((budget + 5, 1), *steps["prefill"], (budget + msa.block_size - 1, 2), (0, 1))
        cases = [
            replace(geometry, name=f"{name} on {pages} pages", requests=requests, pages=pages)
            for pages in PREFILL_PAGES
            for name, requests in (("prefill", steps["prefill"]), ("mixed", mixed))
        ]
    return tuple(
        finding
        for case in cases
        for finding in verify_case(case, kernels=kernels, device=device, repeats=1)
    )


def require_right(findings: Iterable[Finding], *, kernels: KernelChoice, device: str) -> None:
    """Refuse kernels with a wrong result.

    Parameters
    ----------
    device : its name, for the message

    Raises
    ------
    KernelsAreWrongError : with the numbers of every failed comparison.
    """
    wrong = [finding for finding in findings if not finding.ok]
    if wrong:
        told = "; ".join(f"{f.case} {f.quantity}: {f.faults[0]}" for f in wrong)
        raise KernelsAreWrongError(
            f"kernel family {kernels.name!r} gives wrong results on {device} and will not be "
            f"used ({told}). Please report this with the output of `m3-plugin check --json`"
        )


def verify_case(
    case: Case,
    *,
    kernels: KernelChoice,
    device: torch.device,
    repeats: int = 0,
    graph: bool = False,
) -> tuple[Finding, ...]:
    """Run one case through a session and compare every part with the oracle.

    Parameters
    ----------
    device : where the kernels run; the oracle runs on the CPU
    repeats : further runs, which must give the same bits
    graph : capture a run of other lengths in a CUDA graph, replay it on this case, compare bits
    """
    host_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode():
            run = _CaseRun(case, kernels=kernels, device=device)
            findings = [run.cache(), run.selection(), run.attention(), run.whole()]
            if repeats:
                findings.append(run.repeats(repeats))
            if kernels.prefill is not None:
                findings.append(run.chunks())
            if graph:
                findings.append(run.graph())
    finally:
        torch.set_default_dtype(host_dtype)
    return tuple(findings)


class _CaseRun:
    """One case on one device, its session, and the results later comparisons build on."""

    def __init__(self, case: Case, *, kernels: KernelChoice, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.inputs = build(case)
        self.moved = self.inputs.to(device)
        self.session = session_for(case, kernels=kernels, device=device)
        self.batch = _batch(self.moved)
        self.plan = self.session.plan(self.batch)
        self.block_ids = self.session.select(
            self.plan, self.moved.index_q, caches=_caches(self.moved)
        )
        self.out = _poisoned_like(self.moved.q)
        self.session.attend(
            self.plan, self.moved.q, self.block_ids, caches=_caches(self.moved), out=self.out
        )

    def cache(self) -> Finding:
        """Every byte of the pools after a store, neighbours of the views included."""
        expected, actual = self.inputs.to(torch.device("cpu")), self.inputs.to(self.device)
        cache_store(
            expected.k,
            expected.v,
            expected.index_k,
            expected.k_pages,
            expected.v_pages,
            expected.index_k_pages,
            slot_mapping=expected.slot_mapping,
            k_scale=expected.k_scale,
            v_scale=expected.v_scale,
            index_k_scales=expected.index_k_scales,
            backend="reference",
        )
        self.session.store(self.plan, actual.k, actual.v, actual.index_k, caches=_caches(actual))
        faults = tuple(
            f"{name} holds other bytes"
            for name in ("k_pages", "v_pages", "index_k_pages", "index_k_scales")
            if getattr(actual, name) is not None
            and not _same_bits(
                whole_storage(getattr(actual, name)).cpu(), whole_storage(getattr(expected, name))
            )
        )
        return self._finding("cache", faults=faults)

    def selection(self) -> Finding:
        """The chosen blocks, equal wherever rounding of the scores cannot decide."""
        inputs = self.inputs
        expected = index_topk(
            inputs.index_q,
            inputs.index_k_pages,
            index_k_scales=inputs.index_k_scales,
            **inputs.batch,
            **inputs.selection,
            backend="reference",
        )
        faults = selection_faults(self.block_ids.cpu(), expected, inputs)
        return self._finding("selection", faults=tuple(faults))

    def attention(self) -> Finding:
        """The outputs over those blocks, at most twice as far off as plain torch in the dtype."""
        ids = self.block_ids.cpu()
        exact, _ = plain_attention(self.inputs, ids, torch.float64)
        plain, _ = plain_attention(self.inputs, ids, self.case.dtype)
        found = accuracy(self.out.cpu(), exact, plain)
        fault = f"error {found.error:.3g}, allowed {found.allowed:.3g}"
        return self._finding(
            "attention",
            error=found.error,
            allowed=found.allowed,
            faults=() if found.ok else (fault,),
        )

    def whole(self) -> Finding:
        """`run` on pages without the step's keys, which it has to store before it reads them."""
        step = _Step(self.inputs, self.device)
        out = _poisoned_like(step.inputs.q)
        self.session.run(self.plan, *step.tensors, caches=_caches(step.inputs), out=out)
        same = _same_bits(out, self.out)
        return self._finding(
            "run", faults=() if same else ("store, select and attend in one differ from apart",)
        )

    def repeats(self, count: int) -> Finding:
        """The same bits every time."""
        step = _Step(self.inputs, self.device)
        different = 0
        for _ in range(count):
            out = _poisoned_like(step.inputs.q)
            self.session.run(self.plan, *step.tensors, caches=_caches(step.inputs), out=out)
            different += not _same_bits(out, self.out)
        faults = (f"{different} of {count} runs gave other bits",) if different else ()
        return self._finding("repeats", faults=faults)

    def chunks(self) -> Finding:
        """Requests of many rows alone and without their first rows: the same bits.

        Plans other steps, so what needs this one's plan must have run.
        """
        moved, left_out, different = self.moved, 3, 0
        for request, (first, last) in enumerate(pairwise(moved.cu_seqlens_q.tolist())):
            rows = slice(first + left_out, last)
            count = last - rows.start
            if count <= DECODE_ROWS:
                continue
            batch = replace(
                self.batch,
                cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32, device=self.device),
                seq_lens=moved.seq_lens[request : request + 1],
                page_table=moved.page_table[request : request + 1],
                slot_mapping=moved.slot_mapping[rows],
                max_query_len=count,
            )
            out = _poisoned_like(moved.q[rows])
            self.session.attend(
                self.session.plan(batch),
                moved.q[rows],
                self.block_ids[:, rows].contiguous(),
                caches=_caches(moved),
                out=out,
            )
            different += not _same_bits(out, self.out[rows])
        faults = (f"{different} requests gave other bits in another chunk",) if different else ()
        return self._finding("chunks", faults=faults)

    def graph(self) -> Finding:
        """A graph captured on empty requests and replayed on this case, as hosts do."""
        step = _Step(self.inputs, self.device)
        static = step.inputs
        out = _poisoned_like(static.q)
        true_lens, true_slots = static.seq_lens.clone(), static.slot_mapping.clone()
        static.seq_lens.copy_(static.cu_seqlens_q.diff())
        static.slot_mapping.fill_(-1)

        def run() -> None:
            self.session.run(plan, *step.tensors, caches=_caches(static), out=out)

        plan = self.session.plan(_batch(static))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        static.seq_lens.copy_(true_lens)
        static.slot_mapping.copy_(true_slots)
        self.session.plan(_batch(static))
        out.fill_(torch.nan)
        captured.replay()
        torch.cuda.synchronize(self.device)
        same = _same_bits(out, self.out)
        return self._finding("graph", faults=() if same else ("the replay differs from eager",))

    def _finding(
        self,
        quantity: str,
        *,
        error: float | None = None,
        allowed: float | None = None,
        faults: tuple[str, ...] = (),
    ) -> Finding:
        return Finding(self.case.name, phase_of(self.case), quantity, error, allowed, faults)


class _Step:
    """A case whose pages do not hold the step's own tokens yet, and those tokens."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        case = inputs.case
        fresh = inputs.to(torch.device("cpu"))
        k, v = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
        index_k = torch.zeros_like(inputs.index_k)
        bounds = inputs.cu_seqlens_q.tolist()
        for request, sequence in enumerate(inputs.sequences):
            length = sequence[0].shape[0]
            first, last = bounds[request : request + 2]
            first = max(first, last - length)
            for rows, source in zip((k, v, index_k), sequence, strict=True):
                rows[first:last] = source[length - (last - first) :]
        slots = inputs.slot_mapping[inputs.slot_mapping >= 0]
        pages, offsets = slots // case.page_size, slots % case.page_size
        for page, offset in zip(pages.tolist(), offsets.tolist(), strict=True):
            fresh.k_pages[page, :, offset] = torch.nan
            fresh.v_pages[page, :, offset] = torch.nan
            if fresh.index_k_scales is None:
                fresh.index_k_pages[page, offset] = torch.nan
            else:
                fresh.index_k_pages[page, offset] = 99
                fresh.index_k_scales[page, offset] = torch.nan
        self.inputs = fresh.to(device)
        self.tensors = (
            self.inputs.q,
            k.to(device),
            v.to(device),
            self.inputs.index_q,
            index_k.to(device),
        )


def session_for(case: Case, *, kernels: KernelChoice, device: torch.device) -> MSASession:
    """A session just large enough for a case."""
    rules = MSAConfig(
        num_index_heads=case.num_kv_heads,
        index_dim=case.index_dim,
        block_size=case.page_size,
        topk_blocks=case.topk,
        num_init_blocks=case.num_init_blocks,
        num_local_blocks=case.num_local_blocks,
    )
    workspace = None
    if kernels.family == "triton":
        workspace = allocate_workspace(
            rules,
            LayerShape(
                num_q_heads=case.num_q_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                dtype=case.dtype,
                cache_dtype=case.kv_dtype or case.dtype,
                index_dtype=case.index_dtype or case.dtype,
            ),
            StepCapacity(
                max_requests=max(1, len(case.requests)),
                max_rows=max(1, case.num_rows + case.padding_rows),
                max_seq_len=max([1, *(cached + rows for cached, rows in case.requests)]),
            ),
            device=device,
        )
    return MSASession(rules, kernels=kernels, scale=case.head_dim**-0.5, workspace=workspace)


def _batch(inputs: Inputs) -> MSABatch:
    case = inputs.case
    return MSABatch(
        **inputs.batch,
        slot_mapping=inputs.slot_mapping,
        max_query_len=max((rows for _, rows in case.requests), default=0),
        max_seq_len=max((cached + rows for cached, rows in case.requests), default=0),
    )


def _caches(inputs: Inputs) -> MSACaches:
    return MSACaches(
        inputs.k_pages,
        inputs.v_pages,
        inputs.index_k_pages,
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
        index_k_scales=inputs.index_k_scales,
    )


def _poisoned_like(tensor: Tensor) -> Tensor:
    return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=tensor.device)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality of bytes: NaN equals the same NaN, 0 differs from -0."""
    first, second = first.contiguous(), second.contiguous()
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
