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
from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.index_topk import index_topk
from m3_kernels.index_topk.workspace import CHOICE_BLOCKS
from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_kernels.testing.cases import Case, Inputs, PageLayout, build, whole_storage
from m3_kernels.testing.compare import accuracy, plain_attention, selection_faults
from m3_kernels.testing.projections import (
    EPS,
    Projections,
    largest_rounding,
    normed_and_rotated,
    project,
)
from m3_kernels.validation import FP8_DTYPES, LOW_PRECISION_DTYPES
from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.dense import FAMILIES as DENSE_FAMILIES
from m3_plugin.attention.dense import DenseAttention
from m3_plugin.attention.session import MSAPlan, MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import MSAConfig
from m3_plugin.settings import Settings

CPU = torch.device("cpu")
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
    quantity : "queries", "cache", "selection", "attention", "dense", "run", "repeats", "chunks" or
        "graph"
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
    rotary_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
    pages: tuple[PageLayout, ...] = ("planes",),
    decode_rows: int = DECODE_ROWS,
    max_seq_len: int | None = None,
) -> tuple[Finding, ...]:
    """Decode, verify and prefill of the served geometry against the oracle.

    About a second, if Triton has compiled the kernels on this machine before; about a minute if it
    has to.

    With a prefill of another library only the steps it takes part in, on pages as hosts lay them
    out, and chunk by chunk as well.

    The oracle runs on the CPU. Works inside a host's `torch.device` and default-dtype contexts.

    Parameters
    ----------
    num_q_heads, num_kv_heads : of one rank
    rotary_dim : channels that RoPE rotates
    dtype : of activations
    kv_dtype, index_dtype : of the pages of K and V, of index keys; pages of 8 bits are tried as
        such, all others in `dtype`
    pages : how the host lays out K and V; every kind of step is tried on the first and the last
    decode_rows : query rows of a request of decode kind (`StepCapacity`)
    max_seq_len : keys of the longest request the host serves, which decides which kernels it needs;
        None for those of the steps alone
    """
    budget = msa.topk_blocks * msa.block_size
    geometry = Case(
        "",
        (),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        index_dim=msa.index_dim,
        rotary_dim=rotary_dim,
        page_size=msa.block_size,
        topk=msa.topk_blocks,
        num_local_blocks=msa.num_local_blocks,
        num_init_blocks=msa.num_init_blocks,
        dtype=dtype,
        kv_dtype=kv_dtype if kv_dtype in FP8_DTYPES else None,
        index_dtype=index_dtype if index_dtype in (*LOW_PRECISION_DTYPES, PLANES_DTYPE) else None,
    )
    # Each kind of step beyond the budget, where selection decides, and across the end of a block.
    steps: dict[str, tuple[tuple[int, int], ...]] = {
        "decode": ((budget + 3 * msa.block_size, 1), (msa.block_size - 1, 1), (0, 1))
    }
    for rows in (2, 4, DECODE_ROWS):
        if rows <= decode_rows:
            requests = ((budget + 2 * msa.block_size - 2, rows), (msa.block_size, rows - 1))
            steps[f"verify {rows} rows"] = requests
    steps["prefill"] = ((budget + msa.block_size - 5, DECODE_ROWS + 4), (0, DECODE_ROWS + 1))
    # Kernels for short, middle and long contexts, and every layout, without every pair of them.
    middle = None if max_seq_len is None else min(max_seq_len, CHOICE_BLOCKS[-1] * msa.block_size)
    bounds = dict.fromkeys([(pages[0], None), (pages[-1], middle), (pages[-1], max_seq_len)])
    runs = [
        (replace(geometry, name=f"{name} on {layout} pages", requests=step, pages=layout), bound)
        for name, step in steps.items()
        for layout, bound in bounds
    ]
    if kernels.prefill is not None:
        mixed = ((budget + 5, 1), *steps["prefill"], (budget + msa.block_size - 1, 2), (0, 1))
        runs = [
            (replace(geometry, name=f"{name} on {layout} pages", requests=step, pages=layout), None)
            for layout in PREFILL_PAGES
            for name, step in (("prefill", steps["prefill"]), ("mixed", mixed))
        ]
    return tuple(
        finding
        for case, bound in runs
        for finding in verify_case(
            case,
            kernels=kernels,
            device=device,
            repeats=1,
            decode_rows=decode_rows,
            max_seq_len=bound,
        )
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
    decode_rows: int = DECODE_ROWS,
    max_seq_len: int | None = None,
) -> tuple[Finding, ...]:
    """Run one case through a session and compare every part with the oracle.

    Parameters
    ----------
    device : where the kernels run; the oracle runs on the CPU
    repeats : further runs, which must give the same bits
    graph : capture a run of other lengths in a CUDA graph, replay it on this case, compare bits
    decode_rows : query rows of a request of decode kind (`StepCapacity`)
    max_seq_len : the bound of lengths that kernels are told; None for the longest of the case
    """
    host_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode():
            run = _CaseRun(
                case,
                kernels=kernels,
                device=device,
                decode_rows=decode_rows,
                max_seq_len=max_seq_len,
            )
            findings = [run.queries(), run.cache(), run.selection(), run.attention(), run.whole()]
            if kernels.family in DENSE_FAMILIES and case.kv_dtype is None:
                findings.append(run.dense())
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

    def __init__(
        self,
        case: Case,
        *,
        kernels: KernelChoice,
        device: torch.device,
        decode_rows: int,
        max_seq_len: int | None,
    ) -> None:
        self.case = case
        self.decode_rows = decode_rows
        self.device = device
        self.inputs = build(case)
        self.moved = self.inputs.to(device)
        self.session = session_for(
            case, kernels=kernels, device=device, decode_rows=decode_rows, max_seq_len=max_seq_len
        )
        self.batch = _batch(self.moved)
        if max_seq_len is not None:
            self.batch = replace(self.batch, max_seq_len=max_seq_len)
        self.plan = self.session.plan(self.batch)
        chosen = self.session.select(self.plan, self.moved.index_q, caches=_caches(self.moved))
        # a workspace keeps one layer's choice
        self.block_ids = chosen.clone()
        self.out = _poisoned_like(self.moved.q)
        self.session.attend(
            self.plan, self.moved.q, self.block_ids, caches=_caches(self.moved), out=self.out
        )
        self.parts_out = _Step(self.inputs, device).run_parts(self.session, self.plan)

    def queries(self) -> Finding:
        """q and index_q after norm and RoPE."""
        step = _Step(self.inputs, self.device)
        exact = normed_and_rotated(step.given.to(CPU))
        q, index_q = step.store(self.session, self.plan)
        faults = (
            _rounding_fault("q", q.cpu(), exact["q"]),
            _rounding_fault("index_q", index_q.cpu(), exact["index_q"]),
        )
        return self._finding("queries", faults=tuple(fault for fault in faults if fault))

    def cache(self) -> Finding:
        """Every byte of the pools after a store, neighbours of the views included.

        Keys that were computed may be off by rounding; all other bytes may not.
        """
        step, expected = _Step(self.inputs, self.device), _Step(self.inputs, CPU).inputs
        given = step.given.to(CPU)
        keys = normed_and_rotated(given)
        cache_store(
            keys["k"].to(given.k.dtype),
            given.v,
            # two planes hold more of it than the dtype of activations
            keys["index_k"].to(
                given.index_k.dtype if expected.index_k_low is None else torch.float32
            ),
            expected.k_pages,
            expected.v_pages,
            expected.index_k_pages,
            slot_mapping=expected.slot_mapping,
            k_scale=expected.k_scale,
            v_scale=expected.v_scale,
            index_k_scales=expected.index_k_scales,
            index_k_low=expected.index_k_low,
            backend="reference",
        )
        step.store(self.session, self.plan)
        actual = step.inputs.to(CPU)
        # what a computed number is rounded to before it is stored
        computed: dict[str, tuple[torch.dtype, ...]] = {
            "k_pages": (given.k.dtype,),
            "index_k_pages": (given.index_k.dtype,),
        }
        if expected.index_k_scales is not None:
            # a scale is made of the largest channel, and each channel is divided by its scale
            computed["index_k_scales"] = computed["index_k_pages"]
            computed["index_k_pages"] += (expected.index_k_scales.dtype, given.index_k.dtype)
        faults = []
        if expected.index_k_low is not None and actual.index_k_low is not None:
            del computed["index_k_pages"]
            where = _written(expected.index_k_low, expected)
            # in steps of the expected scale, of which rounding excuses one
            found, wanted = (_in_steps(pages, where, expected) for pages in (actual, expected))
            faults.append(_rounding_fault("planes of index keys", found, wanted, torch.int16))
            actual.index_k_pages[where] = expected.index_k_pages[where]
            actual.index_k_low[where] = expected.index_k_low[where]
        for name, through in computed.items():
            written, wanted = getattr(actual, name), getattr(expected, name)
            where = _written(wanted, expected)
            faults.append(_rounding_fault(name, written[where], wanted[where], *through))
            written[where] = wanted[where]
        faults += [
            f"{name} holds other bytes"
            for name in ("v_pages", *computed)
            if not _same_bits(
                whole_storage(getattr(actual, name)), whole_storage(getattr(expected, name))
            )
        ]
        return self._finding("cache", faults=tuple(fault for fault in faults if fault))

    def selection(self) -> Finding:
        """The chosen blocks, equal wherever rounding of the scores cannot decide."""
        inputs = self.inputs
        expected = index_topk(
            inputs.index_q,
            inputs.index_k_pages,
            index_k_scales=inputs.index_k_scales,
            index_k_low=inputs.index_k_low,
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

    def dense(self) -> Finding:
        """What a dense layer makes of the same keys, against the oracle over all blocks."""
        out = _poisoned_like(self.moved.q)
        DenseAttention(self.session.kernels.family, settings=Settings()).attend(
            self.batch,
            self.moved.q,
            self.moved.k_pages,
            self.moved.v_pages,
            scale=self.session.scale,
            out=out,
        )
        blocks = torch.arange(self.inputs.page_table.shape[1], dtype=torch.int32)
        ids = blocks.expand(self.case.num_kv_heads, out.shape[0], -1)
        exact, _ = plain_attention(self.inputs, ids, torch.float64)
        plain, _ = plain_attention(self.inputs, ids, self.case.dtype)
        found = accuracy(out.cpu(), exact, plain)
        fault = f"error {found.error:.3g}, allowed {found.allowed:.3g}"
        return self._finding(
            "dense",
            error=found.error,
            allowed=found.allowed,
            faults=() if found.ok else (fault,),
        )

    def whole(self) -> Finding:
        """`run` on pages without the step's keys, which it has to store before it reads them."""
        out = _Step(self.inputs, self.device).run(self.session, self.plan)
        same = _same_bits(out, self.parts_out)
        return self._finding(
            "run", faults=() if same else ("store, select and attend in one differ from apart",)
        )

    def repeats(self, count: int) -> Finding:
        """The same bits every time."""
        step = _Step(self.inputs, self.device)
        different = 0
        for _ in range(count):
            different += not _same_bits(step.run(self.session, self.plan), self.parts_out)
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
            if count <= self.decode_rows:
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
        out = _poisoned_like(step.given.q)
        true_lens, true_slots = static.seq_lens.clone(), static.slot_mapping.clone()
        static.seq_lens.copy_(static.cu_seqlens_q.diff())
        static.slot_mapping.fill_(-1)

        def run() -> None:
            step.run(self.session, plan, out=out)

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
        same = _same_bits(out, self.parts_out)
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
    """A case whose pages do not hold the step's own tokens yet, and those as they are projected.

    Values are what the pages of the case hold, so that storing them loses nothing.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        fresh = inputs.to(CPU)
        values = torch.zeros_like(inputs.v)
        bounds = inputs.cu_seqlens_q.tolist()
        for request, (_, held, _) in enumerate(inputs.sequences):
            first, last = bounds[request : request + 2]
            first = max(first, last - len(held))
            values[first:last] = held[len(held) - (last - first) :]
        stale = [fresh.k_pages, fresh.v_pages, fresh.index_k_pages]
        if fresh.index_k_scales is not None:
            stale.append(fresh.index_k_scales)
        if fresh.index_k_low is not None:
            stale.append(fresh.index_k_low)
        for pages in stale:
            nothing = torch.nan if pages.is_floating_point() else 99
            pages[_written(pages, inputs)] = nothing
        self.inputs = fresh.to(device)
        self.given = project(replace(inputs, v=values)).to(device)

    def store(self, session: MSASession, plan: MSAPlan) -> tuple[Tensor, Tensor]:
        """q and index_q, as `MSASession.store` returns them."""
        return session.store(
            plan,
            *self.given.rows,
            norms=_norms(self.given),
            cos_sin=self.given.cos_sin,
            caches=_caches(self.inputs),
        )

    def run_parts(self, session: MSASession, plan: MSAPlan) -> Tensor:
        """Outputs of store, select and attend."""
        caches = _caches(self.inputs)
        q, index_q = self.store(session, plan)
        block_ids = session.select(plan, index_q, caches=caches)
        out = _poisoned_like(self.given.q)
        session.attend(plan, q, block_ids, caches=caches, out=out)
        return out

    def run(self, session: MSASession, plan: MSAPlan, *, out: Tensor | None = None) -> Tensor:
        """Outputs of all in one, in `out` if given."""
        out = _poisoned_like(self.given.q) if out is None else out
        session.run(
            plan,
            *self.given.rows,
            norms=_norms(self.given),
            cos_sin=self.given.cos_sin,
            caches=_caches(self.inputs),
            out=out,
        )
        return out


def session_for(
    case: Case,
    *,
    kernels: KernelChoice,
    device: torch.device,
    decode_rows: int = DECODE_ROWS,
    max_seq_len: int | None = None,
) -> MSASession:
    """A session just large enough for a case; the last two as in `StepCapacity`."""
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
                rotary_dim=case.rotary_dim,
                dtype=case.dtype,
                cache_dtype=case.kv_dtype or case.dtype,
                index_dtype=case.index_dtype or case.dtype,
            ),
            StepCapacity(
                max_requests=max(1, len(case.requests)),
                max_rows=max(1, case.num_rows + case.padding_rows),
                max_seq_len=max_seq_len
                or max([1, *(cached + rows for cached, rows in case.requests)]),
                decode_rows=decode_rows,
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
        index_k_low=inputs.index_k_low,
    )


def _norms(given: Projections) -> HeadNorms:
    return HeadNorms(
        q=given.q_weight,
        k=given.k_weight,
        index_q=given.index_q_weight,
        index_k=given.index_k_weight,
        eps=EPS,
    )


def _written(pages: Tensor, inputs: Inputs) -> tuple[Tensor | slice, ...]:
    """Where the step's tokens lie in a pool: [tokens, heads, dim] or [tokens, dim]."""
    slots = inputs.slot_mapping[inputs.slot_mapping >= 0]
    page, offset = slots // inputs.case.page_size, slots % inputs.case.page_size
    return (page, slice(None), offset) if pages.dim() == 4 else (page, offset)


def _in_steps(inputs: Inputs, where: tuple[Tensor | slice, ...], measure: Inputs) -> Tensor:
    """Index keys of two planes, [tokens, dim], in units of the last bit of those of `measure`."""
    assert inputs.index_k_low is not None
    assert inputs.index_k_scales is not None
    assert measure.index_k_scales is not None
    codes = 256.0 * inputs.index_k_pages[where] + inputs.index_k_low[where]
    ratio = inputs.index_k_scales[where].double() / measure.index_k_scales[where].double()
    return codes * ratio[:, None]


def _rounding_fault(name: str, found: Tensor, exact: Tensor, *through: torch.dtype) -> str | None:
    """How [..., dim] differs from exact numbers by more than rounding to its dtype excuses.

    Parameters
    ----------
    through : dtypes it was rounded to before
    """
    allowed = largest_rounding(exact.double(), found.dtype, *through)
    error = (found.double() - exact.double()).abs()
    if not (wrong := ~(error <= allowed)).any():
        return None
    return (
        f"{name}: {int(wrong.sum())} numbers are wrong, by up to {float(error[wrong].max()):.3g} "
        f"where {float(allowed[wrong].max()):.3g} is allowed"
    )


def _poisoned_like(tensor: Tensor) -> Tensor:
    return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=tensor.device)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality of bytes: NaN equals the same NaN, 0 differs from -0."""
    first, second = first.contiguous(), second.contiguous()
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))
