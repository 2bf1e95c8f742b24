"""Inputs of the ops: a case is a frozen description from which the same tensors are always built.

Whatever a correct kernel must not read is poisoned: unwritten slots hold NaN, page-table entries
past a sequence hold numbers no pool has, and tensors are views into larger ones full of NaN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from m3_kernels.index_pages import PLANES_DTYPE, channels, views_of

INT32_MAX = 2**31 - 1
PageLayout = Literal["planes", "packed-heads", "packed-slots", "separate", "apart"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One engine step and the geometry of the layer.

    Attributes
    ----------
    name : readable id of a test
    requests : (keys cached before the step, query rows of the step) of each request
    shared_blocks : leading blocks which all requests have in common, on the same pages
    padding_rows : rows of the query tensors that belong to no request
    missing_keys : taken off every sequence length, so that the first rows stand before position 0
    pages : how K and V lie: in planes of one page; side by side per slot, head by head or slot by
        slot; or in two tensors, of one layout or ("apart") head by head and slot by slot
    kv_dtype : fp8 pages of K and V; None has them in `dtype`
    index_dtype : fp8 or int8 pages of index keys, `PLANES_DTYPE` for two planes of bytes; None has
        them in `dtype`
    rotary_dim : channels of every head that RoPE rotates
    """

    name: str
    requests: tuple[tuple[int, int], ...]
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    index_dim: int = 32
    page_size: int = 16
    topk: int = 4
    num_local_blocks: int = 1
    num_init_blocks: int = 0
    dtype: torch.dtype = torch.float32
    shared_blocks: int = 0
    padding_rows: int = 0
    missing_keys: int = 0
    kv_dtype: torch.dtype | None = None
    index_dtype: torch.dtype | None = None
    pages: PageLayout = "planes"
    rotary_dim: int = 16
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """Query rows of all requests, padding excluded."""
        return sum(rows for _, rows in self.requests)

    def with_dtype(self, dtype: torch.dtype) -> Case:
        """The same case in another dtype."""
        short = str(dtype).removeprefix("torch.")
        return dataclasses.replace(self, name=f"{self.name}-{short}", dtype=dtype)


class Step(TypedDict):
    """The keyword arguments which describe a step."""

    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor


class Selection(TypedDict):
    """The keyword arguments which rule the choice of blocks."""

    topk: int
    num_local_blocks: int
    num_init_blocks: int


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; names and layouts as in the ops' contracts.

    Attributes
    ----------
    sequences : the keys, values and index keys of each request in order, as read from the pages
    k_scale, v_scale : of fp8 pages
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    k_pages: Tensor
    v_pages: Tensor
    index_k_pages: Tensor
    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    sequences: tuple[tuple[Tensor, Tensor, Tensor], ...]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    index_k_scales: Tensor | None = None
    index_k_low: Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        """A copy on a device; strides, the poison around every view and shared memory stay.

        The sequences stay where they are: they are what results are compared with.
        """
        copies: dict[int, Tensor] = {}
        moved = {
            field.name: view_of_copy(getattr(self, field.name), device, copies)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def batch(self) -> Step:
        """The step, for the ops that take one."""
        return {
            "page_table": self.page_table,
            "cu_seqlens_q": self.cu_seqlens_q,
            "seq_lens": self.seq_lens,
        }

    @property
    def scale(self) -> float:
        """Softmax scale of the main branch."""
        return self.case.head_dim**-0.5

    @property
    def selection(self) -> Selection:
        """The rules of `index_topk`."""
        return {
            "topk": self.case.topk,
            "num_local_blocks": self.case.num_local_blocks,
            "num_init_blocks": self.case.num_init_blocks,
        }


def build(case: Case) -> Inputs:
    """Make the tensors of a case; the same case always gives the same bits."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(case.dtype)

    size, heads, dim = case.page_size, case.num_kv_heads, case.head_dim
    k_scale, v_scale = cache_scales(case)
    lengths = [max(0, cached + rows - case.missing_keys) for cached, rows in case.requests]
    shared = case.shared_blocks * size
    common = (
        normal(shared, heads, dim),
        normal(shared, heads, dim),
        normal(shared, case.index_dim),
    )
    sequences = []
    for length in lengths:
        own = (
            normal(length, heads, dim),
            normal(length, heads, dim),
            normal(length, case.index_dim),
        )
        for mine, theirs in zip(own, common, strict=True):
            mine[:shared] = theirs[:length]
        held = (
            as_held(own[0], k_scale, case.kv_dtype),
            as_held(own[1], v_scale, case.kv_dtype),
            index_keys_as_held(own[2], case.index_dtype),
        )
        sequences.append(held)

    # One page more than used, permuted, so that no page id equals its block id by chance.
    blocks = [-(-length // size) for length in lengths]
    num_pages = case.shared_blocks + sum(blocks) + 1
    free = torch.randperm(num_pages, generator=random).tolist()
    shared_pages = [free.pop() for _ in range(case.shared_blocks)]
    max_pages = max([*blocks, 0]) + 2
    page_table = torch.full((len(lengths), max_pages), INT32_MAX, dtype=torch.int32)
    page_table[:, 1::2] = -7
    k_pages, v_pages, index_k_pages, index_k_scales, index_k_low = empty_caches(case, num_pages)
    slots = []
    for request, (length, own) in enumerate(zip(lengths, sequences, strict=True)):
        pages = (shared_pages + [free.pop() for _ in range(blocks[request])])[: blocks[request]]
        page_table[request, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        for block, page in enumerate(pages):
            part = slice(block * size, min(length, (block + 1) * size))
            count = part.stop - part.start
            keys, values = stored(own[0][part], k_scale), stored(own[1][part], v_scale)
            k_pages[page, :, :count] = keys.transpose(0, 1).to(k_pages.dtype)
            v_pages[page, :, :count] = values.transpose(0, 1).to(v_pages.dtype)
            if index_k_scales is None:
                index_k_pages[page, :count] = own[2][part].to(index_k_pages.dtype)
            else:
                steps = int8_steps(count, first=part.start)
                index_k_scales[page, :count] = steps
                codes = own[2][part].float() / steps[:, None]
                # whole numbers, or in two planes whole 256ths
                high = ((256 * codes + 128) / 256).floor()
                index_k_pages[page, :count] = high.to(torch.int8)
                if index_k_low is not None:
                    index_k_low[page, :count] = (256 * (codes - high)).to(torch.int8)
        positions = range(length - case.requests[request][1], length)
        slots += [pages[p // size] * size + p % size if p >= 0 else -1 for p in positions]

    rows = case.num_rows + case.padding_rows
    q, k, v = split_rows(normal(rows, case.num_q_heads + 2 * heads, dim), case.num_q_heads, heads)
    index_q = padded(normal(rows, heads, case.index_dim))
    index_k = padded(normal(rows, case.index_dim))
    return Inputs(
        case=case,
        q=q,
        k=k,
        v=v,
        index_q=index_q,
        index_k=index_k,
        k_pages=k_pages,
        v_pages=v_pages,
        index_k_pages=index_k_pages,
        page_table=page_table,
        cu_seqlens_q=torch.tensor([0, *(n for _, n in case.requests)]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        slot_mapping=torch.tensor(slots + [-1] * case.padding_rows, dtype=torch.int64),
        sequences=tuple(sequences),
        k_scale=k_scale,
        v_scale=v_scale,
        index_k_scales=index_k_scales,
        index_k_low=index_k_low,
    )


def cache_scales(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Scales of fp8 pages: of each head for K, of all for V; None for other pages.

    Of so few bits that numbers read from the pages are exact in any dtype of activations, and give
    the same bytes when they are stored again.
    """
    if case.kv_dtype is None:
        return None, None
    return 0.5 + torch.arange(case.num_kv_heads) % 3 / 2, torch.tensor([1.5])


def stored(values: Tensor, scale: Tensor | None) -> Tensor:
    """[tokens, heads, dim] as numbers of the cache, before they are rounded to its dtype."""
    return values if scale is None else values.float() / scale[:, None]


def as_held(values: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """What is read of values once they are in a cache of `dtype`; None keeps their own."""
    if dtype is None:
        return values
    held = stored(values, scale).to(dtype).float()
    return (held if scale is None else held * scale[:, None]).to(values.dtype)


def index_keys_as_held(keys: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What is read of index keys [tokens, dim] once they are in a cache of `dtype`.

    In int8 as multiples of `int8_steps`, the largest of a key the 127th: a store finds the same
    steps and codes again, and any dtype of activations holds the products exactly. In two planes
    likewise, with as many bits below the first byte as the dtype of activations has left.
    """
    if dtype not in (torch.int8, PLANES_DTYPE):
        return as_held(keys, None, dtype)
    steps = int8_steps(len(keys), first=0)[:, None]
    codes = (keys.float() / steps).clamp(-126, 126)
    if dtype == PLANES_DTYPE:
        codes = ((256 * codes).round() / 256).to(keys.dtype).float()
    else:
        codes = codes.round()
    largest = codes.abs().argmax(dim=1, keepdim=True)
    codes.scatter_(1, largest, 127)
    return (codes * steps).to(keys.dtype)


def int8_steps(count: int, *, first: int) -> Tensor:
    """Scales of int8 index keys of tokens `first`, `first + 1`, ...: powers of two."""
    return 2.0 ** -(4 + torch.arange(first, first + count) % 3)


def empty_caches(
    case: Case, num_pages: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """K, V and index pages, the scales and the low plane of those if any; what can be NaN is."""
    dtype = case.index_dtype
    if dtype not in (torch.int8, PLANES_DTYPE):
        return *empty_pages(case, num_pages), None, None
    k_pages, v_pages, _ = empty_pages(dataclasses.replace(case, index_dtype=None), num_pages)
    width = channels(case.index_dim, dtype)
    memory = torch.full((num_pages, case.page_size, width), 99, dtype=dtype)
    keys, scales, low = views_of(memory)
    assert scales is not None
    scales.fill_(torch.nan)
    return k_pages, v_pages, keys, scales, low


def empty_pages(case: Case, num_pages: int) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and index pages full of NaN, as strided views of one allocation each."""
    size, heads, dim = case.page_size, case.num_kv_heads, case.head_dim

    def nans(*shape: int, dtype: torch.dtype | None) -> Tensor:
        return torch.full(shape, torch.nan).to(dtype or case.dtype)

    # Strides of every view are multiples of 16, as a host's are: of numbers, which decides how
    # Triton compiles a kernel, and of bytes, which decides whether keys are read by descriptors.
    index = nans(num_pages, size, case.index_dim + 16, dtype=case.index_dtype)
    if case.pages == "planes":
        fused = nans(num_pages, 2, size, heads, dim, dtype=case.kv_dtype)
        k_pages, v_pages = fused.transpose(2, 3).unbind(1)
    elif case.pages == "separate":
        order = (heads, size) if heads > 1 else (size, heads)
        k_pages, v_pages = (nans(num_pages, *order, dim, dtype=case.kv_dtype) for _ in range(2))
        if heads == 1:  # slots of a pool, whose one head has a stride of its own
            k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    elif case.pages == "apart":
        k_pages = nans(num_pages, heads, size, dim, dtype=case.kv_dtype)
        v_pages = nans(num_pages, size, heads, dim, dtype=case.kv_dtype).transpose(1, 2)
    else:
        order = (heads, size) if case.pages == "packed-heads" else (size, heads)
        fused = nans(num_pages, *order, 2 * dim, dtype=case.kv_dtype)
        fused = fused if case.pages == "packed-heads" else fused.transpose(1, 2)
        k_pages, v_pages = fused.split(dim, dim=-1)
    return k_pages, v_pages, index[:, :, : case.index_dim]


def split_rows(fused: Tensor, num_q_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the views of one projection's output that a model would pass."""
    q, k, v = fused.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    return q, k, v


def whole_storage(view: Tensor) -> Tensor:
    """Everything in the memory behind a view, one-dimensional."""
    return view.new_empty(0).set_(view.untyped_storage())


def view_of_copy(view: Tensor, device: torch.device, copies: dict[int, Tensor]) -> Tensor:
    """The same view of a copy of the memory behind it, which `copies` holds by address."""
    address = view.untyped_storage().data_ptr()
    if address not in copies:
        copies[address] = whole_storage(view).to(device, copy=True)
    # Views of one memory may differ in dtype: int8 index keys and their scales.
    memory = view.new_empty(0, device=device).set_(copies[address].untyped_storage())
    return memory.as_strided(view.shape, view.stride(), view.storage_offset())


def padded(tensor: Tensor) -> Tensor:
    """The same values as a view whose neighbours in memory are NaN."""
    larger = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16), torch.nan)
    larger[..., : tensor.shape[-1]] = tensor
    return larger[..., : tensor.shape[-1]]


def regular_cases() -> tuple[Case, ...]:
    """Steps a server sees every day, scaled down."""
    prefixes = ((0, 30), (1, 5), (127, 3), (128, 4), (129, 6), (700, 1))
    return (
        Case("prefill", ((0, 100),)),
        Case("prefill-small-pages", ((0, 90), (37, 20)), page_size=8),
        Case("cached-prefix", prefixes, num_q_heads=16, num_kv_heads=4, head_dim=64, page_size=128),
        Case("decode-ragged", ((15, 1), (16, 1), (17, 1), (0, 1), (300, 1), (64, 1))),
        Case("verify", ((90, 4), (13, 4), (127, 4)), num_q_heads=4, num_kv_heads=1),
        Case("mixed", ((200, 1), (0, 33), (55, 17), (31, 1)), topk=5),
        Case("shared-prefix", ((64, 9), (64, 1), (80, 7), (70, 0)), shared_blocks=4, topk=3),
    )


def corner_cases() -> tuple[Case, ...]:
    """What breaks kernels: emptiness, edges, odd sizes and forced blocks that do not fit."""
    return (
        Case("no-requests", ()),
        Case("no-requests-padding", (), padding_rows=3),
        Case("one-token", ((0, 1),)),
        Case("empty-requests", ((0, 0), (300, 0), (40, 1), (0, 0), (0, 5), (9, 0))),
        Case("padding-rows", ((60, 3), (0, 20)), padding_rows=5),
        Case("rows-before-zero", ((0, 40), (0, 3)), missing_keys=4),
        Case("one-row-before-zero", ((0, 20), (0, 1)), missing_keys=1),
        Case("fewer-blocks-than-topk", ((0, 70), (63, 2)), topk=16),
        Case("topk-one", ((0, 60),), topk=1),
        Case("init-one", ((0, 120),), num_init_blocks=1),
        Case("init-and-local", ((0, 200),), num_init_blocks=2, num_local_blocks=2, topk=5),
        Case("forced-exceed-topk", ((0, 200),), num_init_blocks=3, num_local_blocks=4, topk=5),
        Case("init-exceeds-topk", ((0, 200),), num_init_blocks=7, topk=4),
        Case("init-fills-topk", ((0, 200),), num_init_blocks=4, num_local_blocks=0, topk=4),
        Case("local-exceeds-topk", ((0, 200),), num_local_blocks=9, topk=4),
        Case("no-local", ((0, 150),), num_local_blocks=0),
        Case("odd-sizes", ((0, 50), (77, 9)), head_dim=40, index_dim=24, page_size=12),
        Case("group-of-one", ((50, 9),), num_q_heads=3, num_kv_heads=3),
        Case("keys-and-values-apart", ((90, 1), (0, 33), (55, 3)), pages="apart"),
        Case("block-edges", ((2046, 1), (2047, 1), (2048, 1), (126, 2)), page_size=128, topk=16),
    )


def production_cases() -> tuple[Case, ...]:
    """The geometry of MiniMax-M3: 64 query and 4 KV heads of 128, pages of 128, 16 blocks."""
    m3 = Case(
        "m3",
        ((3000, 2), (2600, 1), (2047, 2), (0, 3)),
        num_q_heads=64,
        num_kv_heads=4,
        head_dim=128,
        index_dim=128,
        page_size=128,
        topk=16,
        rotary_dim=64,
    )
    rank = dataclasses.replace(m3, name="m3-one-rank-of-four", num_q_heads=16, num_kv_heads=1)
    return (m3, rank, dataclasses.replace(m3, name="m3.1", num_init_blocks=1))


def all_cases() -> tuple[Case, ...]:
    """Every case; the dtypes other than fp32 where the conversion code differs."""
    everyday = regular_cases()
    odd = next(case for case in corner_cases() if case.name == "odd-sizes")
    return (
        *everyday,
        *corner_cases(),
        *production_cases(),
        *(
            case.with_dtype(dtype)
            for case in (everyday[1], everyday[2], everyday[5], production_cases()[0])
            for dtype in DTYPES[1:]
        ),
        *(odd.with_dtype(dtype) for dtype in DTYPES[1:]),
    )
