"""What the ops of a layer are given besides its heads: a step's lengths and the pages of caches.

Each is checked when it is made: once per step, and once when a host binds its caches to a layer. A
call then checks only what is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.index_pages import PLANES_DTYPE


@dataclass(frozen=True)
class Stored:
    """What an implementation can read and write of caches.

    Attributes
    ----------
    kv : dtypes of keys and values
    index_keys : dtypes of index keys; `PLANES_DTYPE` is two planes of bytes
    kv_scales : whether keys and values may have scales
    """

    kv: tuple[torch.dtype, ...]
    index_keys: tuple[torch.dtype, ...]
    kv_scales: bool


EVERYTHING = Stored(
    kv=(*validation.FLOAT_DTYPES, *validation.FP8_DTYPES),
    index_keys=(*validation.FLOAT_DTYPES, *validation.LOW_PRECISION_DTYPES, PLANES_DTYPE),
    kv_scales=True,
)
# The Triton kernels.
NO_PLANES = Stored(
    kv=EVERYTHING.kv,
    index_keys=(*validation.FLOAT_DTYPES, *validation.LOW_PRECISION_DTYPES),
    kv_scales=True,
)
# C++ and plain torch on a CPU.
NO_FP8 = Stored(
    kv=validation.FLOAT_DTYPES,
    index_keys=(*validation.FLOAT_DTYPES, torch.int8, PLANES_DTYPE),
    kv_scales=False,
)


@dataclass(frozen=True)
class Step:
    """Lengths and pages of the requests of one engine step, on its device.

    Attributes
    ----------
    page_table : int32 [R, max_pages], must cover every sequence
    cu_seqlens_q : int32 [R + 1], never decreasing, from 0 to at most T
    seq_lens : int32 [R], the step's own tokens included

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    page_table: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor

    def __post_init__(self) -> None:
        validation.require_shape("seq_lens", self.seq_lens, (None,), "[R]")
        num_reqs = self.seq_lens.shape[0]
        words = "[R, max_pages]"
        validation.require_shape("page_table", self.page_table, (num_reqs, None), words)
        validation.require_shape("cu_seqlens_q", self.cu_seqlens_q, (num_reqs + 1,), "[R + 1]")
        for name, tensor in vars(self).items():
            validation.require_dtype(name, tensor, torch.int32)
            validation.require_dense_rows(name, tensor)
            validation.require_device(name, tensor, self.seq_lens.device)

    @property
    def num_reqs(self) -> int:
        """R."""
        return self.seq_lens.shape[0]

    def require_device(self, device: torch.device) -> None:
        """Raise ValueError unless the step is described where the heads of its rows are."""
        validation.require_device("seq_lens", self.seq_lens, device)


@dataclass(frozen=True)
class KVPages:
    """Pages of keys and values of one layer, as views of whatever layout the host allocated.

    Attributes
    ----------
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], one dtype, fp8 among them; any
        strides with a contiguous last dimension
    k_scale, v_scale : fp32 [1] or [num_kv_heads], what stored numbers are multiplied with; None
        is 1

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        words = "[P, num_kv_heads, page_size, head_dim]"
        validation.require_shape("k_pages", self.k_pages, (None,) * 4, words)
        validation.require_dtype("v_pages", self.v_pages, self.k_pages.dtype)
        validation.require_shape("v_pages", self.v_pages, tuple(self.k_pages.shape), words)
        for name, pages in (("k_pages", self.k_pages), ("v_pages", self.v_pages)):
            if pages.dtype not in validation.FP8_DTYPES:
                validation.require_float(name, pages)
            validation.require_dense_rows(name, pages)
            validation.require_device(name, pages, self.device)
        heads = self.k_pages.shape[1]
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if scale is not None:
                validation.require_dtype(name, scale, torch.float32)
                size = 1 if scale.numel() == 1 else heads
                validation.require_shape(name, scale, (size,), "[1] or [num_kv_heads]")
                validation.require_dense_rows(name, scale)
                validation.require_device(name, scale, self.device)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.k_pages.device

    def refusal(self, stored: Stored) -> str | None:
        """Why an implementation that takes `stored` does not take these; None if it does."""
        scaled = self.k_scale is not None or self.v_scale is not None
        if self.k_pages.dtype in stored.kv and (stored.kv_scales or not scaled):
            return None
        return (
            f"takes keys and values of {names(stored.kv)} "
            f"{'with or ' if stored.kv_scales else ''}without scales; got {self.k_pages.dtype}"
            f"{' and scales' if scaled else ''}. Keep them in one of these on a CPU, or ask for "
            "backend='reference'"
        )


@dataclass(frozen=True)
class IndexPages:
    """Pages of index keys of one layer.

    Attributes
    ----------
    index_k_pages : [P, page_size, index_dim], int8 and fp8 among the dtypes; any strides with a
        contiguous last dimension
    index_k_scales : floating [P, page_size], what a stored key is multiplied with; int8 keys need
        it, fp8 keys may have it, others have none
    index_k_low : int8 [P, page_size, index_dim], the low plane of keys whose high plane is
        index_k_pages, int8; None where keys are one number each. A channel of a key is
        scale * (high + low / 256)

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    index_k_pages: Tensor
    index_k_scales: Tensor | None = None
    index_k_low: Tensor | None = None

    def __post_init__(self) -> None:
        pages, scales = self.index_k_pages, self.index_k_scales
        if pages.dtype not in NO_PLANES.index_keys:
            raise TypeError(
                f"index_k_pages must be {names(NO_PLANES.index_keys)}; got {pages.dtype}"
            )
        words = "[P, page_size, index_dim]"
        validation.require_shape("index_k_pages", pages, (None, None, None), words)
        validation.require_dense_rows("index_k_pages", pages)
        if scales is None:
            if self.index_k_low is not None or pages.dtype == torch.int8:
                raise ValueError(
                    "index_k_scales must be given with int8 index_k_pages: one scale per token"
                )
            return
        if pages.dtype not in validation.LOW_PRECISION_DTYPES:
            raise ValueError(
                f"index_k_scales must be None unless index_k_pages are int8 or fp8; "
                f"got {pages.dtype} pages"
            )
        validation.require_float("index_k_scales", scales)
        validation.require_shape("index_k_scales", scales, tuple(pages.shape[:2]), "[P, page_size]")
        validation.require_dense_rows("index_k_scales", scales)
        validation.require_device("index_k_scales", scales, pages.device)
        if (low := self.index_k_low) is not None:
            validation.require_dtype("index_k_pages, with index_k_low,", pages, torch.int8)
            validation.require_dtype("index_k_low", low, torch.int8)
            validation.require_shape("index_k_low", low, tuple(pages.shape), words)
            validation.require_dense_rows("index_k_low", low)
            validation.require_device("index_k_low", low, pages.device)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.index_k_pages.device

    @property
    def dtype(self) -> torch.dtype:
        """What a key is stored as: `PLANES_DTYPE` where it is two planes of bytes."""
        return self.index_k_pages.dtype if self.index_k_low is None else PLANES_DTYPE

    def refusal(self, stored: Stored) -> str | None:
        """Why an implementation that takes `stored` does not take these; None if it does."""
        if self.dtype in stored.index_keys:
            return None
        return (
            f"takes index keys of {names(stored.index_keys)}; got {self.dtype}. "
            "Keep them in one of these on a CPU, or ask for backend='reference'"
        )


@dataclass(frozen=True)
class MSACaches:
    """Paged caches of one sparse layer, as views of whatever layout the host allocated.

    Attributes
    ----------
    k_pages, v_pages : [num_pages, num_kv_heads, page_size, head_dim]
    index_k_pages : [num_pages, page_size, index_dim]
    k_scale, v_scale : as in `KVPages`
    index_k_scales : floating [num_pages, page_size], scales of int8 index keys; None for others
    index_k_low : as in `IndexPages`
    kv, index : the same, as the ops that read take them

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    k_pages: Tensor
    v_pages: Tensor
    index_k_pages: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    index_k_scales: Tensor | None = None
    index_k_low: Tensor | None = None
    kv: KVPages = field(init=False, repr=False)
    index: IndexPages = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kv = KVPages(self.k_pages, self.v_pages, self.k_scale, self.v_scale)
        scales = self.index_k_scales
        if (scales is None) == (self.index_k_pages.dtype == torch.int8):
            raise ValueError(
                f"index_k_scales must be given with int8 index_k_pages and only then; got "
                f"{'none' if scales is None else 'some'} for {self.index_k_pages.dtype} pages"
            )
        index = IndexPages(self.index_k_pages, scales, self.index_k_low)
        num_pages, _, page_size, _ = self.k_pages.shape
        shape, words = (num_pages, page_size, None), "[P, page_size, index_dim]"
        validation.require_shape("index_k_pages", self.index_k_pages, shape, words)
        validation.require_device("index_k_pages", self.index_k_pages, kv.device)
        object.__setattr__(self, "kv", kv)
        object.__setattr__(self, "index", index)

    @property
    def index_dim(self) -> int:
        """Numbers of an index key."""
        return self.index_k_pages.shape[2]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Pages and then scales, None for those that there are not."""
        pages = (self.k_pages, self.v_pages, self.index_k_pages)
        scales = (self.k_scale, self.v_scale, self.index_k_scales)
        return (*pages, *scales, self.index_k_low)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes in words, e.g. "float32, bfloat16 and float16"."""
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} and {last}" if first else last


def require_attention(
    q: Tensor, kv: KVPages, step: Step, *, out: Tensor, lse: Tensor | None
) -> tuple[int, int]:
    """What attention asks of its heads and results, whichever keys it reads.

    Parameters
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    kv : pages [P, num_kv_heads, page_size, head_dim]
    step : of the same device
    out : [T, num_q_heads, head_dim] of q's dtype
    lse : fp32 [T, num_q_heads], or None

    Returns
    -------
    T and num_kv_heads

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """
    words, pool = "[T, num_q_heads, head_dim]", "[P, num_kv_heads, page_size, head_dim]"
    validation.require_float("q", q)
    validation.require_shape("q", q, (None, None, None), words)
    rows, q_heads, dim = q.shape
    validation.require_shape("k_pages", kv.k_pages, (None, None, None, dim), pool)
    kv_heads = kv.k_pages.shape[1]
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"q must have a multiple of the {kv_heads} KV heads; got {q_heads} heads")
    validation.require_dense_rows("q", q)
    validation.require_device("k_pages", kv.k_pages, q.device)
    step.require_device(q.device)
    validation.require_dtype("out", out, q.dtype)
    validation.require_shape("out", out, (rows, q_heads, dim), words)
    validation.require_dense_rows("out", out)
    validation.require_device("out", out, q.device)
    if lse is not None:
        validation.require_dtype("lse", lse, torch.float32)
        validation.require_shape("lse", lse, (rows, q_heads), "[T, num_q_heads]")
        validation.require_device("lse", lse, q.device)
    return rows, kv_heads
