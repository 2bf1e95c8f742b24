"""The prefill of `sparse_attention` through FlashInfer's `msa_ops`, where its limits fit.

FlashInfer 0.7.2 has two implementations of the same call, and this is what their source does:

* SM120 and SM121: a tile of rows walks the union of its rows' blocks, in ascending order; a block
  that a row did not choose changes nothing of it. Everything is derived on the device, and nothing
  is kept between calls. This one is used.
* SM100 and SM103: the programs for paged bf16 walk every block up to the tile's last row and mask
  those not chosen, which is the work of dense attention. For one request of 8,192 or more rows
  there is one that does not; it plans on the host, rounds partial outputs to 8 bits, and takes its
  plan from the call before where address and version counter of the ids are the same, which ids
  written by a Triton kernel never change. Neither is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from m3_kernels.sparse_attention.call import SparseAttention

DISTRIBUTION = "flashinfer-python"
# Releases whose source was read. What a call keeps, or waits for, no test of results would show.
RELEASES = ("0.7.2", "0.7.2.post1")
ARCHES = (120, 121)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM = PAGE_SIZE = 128
TOPK = (4, 8, 16, 32)
# A tile holds 128 lines of whole groups.
GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)


def flashinfer_prefill(call: SparseAttention) -> None:
    """`PrefillAttention` by FlashInfer, which must not refuse the layer (`flashinfer_refusal`).

    Compiles at the first call for a dtype, a group and a layout of pages. Allocates the output once
    more, and 8 bytes per KV head, row and chosen block; does not wait for the device.

    A value that is not finite reaches the rows of its request that share a tile with one that sees
    it, unlike in the kernels of this package.

    Raises
    ------
    ValueError : the page layout is not supported (`pages_refusal`).
    """
    from flashinfer.msa_ops import (  # pyright: ignore[reportMissingImports]
        msa_sparse_attention,
    )

    k_pages, v_pages = call.kv.k_pages, call.kv.v_pages
    if k_pages.is_contiguous() and v_pages.is_contiguous():
        k_pages, v_pages = _plain(k_pages), _plain(v_pages)
    found = msa_sparse_attention(
        _plain(call.q),
        k_pages,
        v_pages,
        _plain(call.block_ids),
        call.step.cu_seqlens_q,
        causal=True,
        softmax_scale=call.scale,
        page_table=_plain(call.step.page_table),
        seqused_k=call.step.seq_lens,
        return_softmax_lse=call.lse is not None,
    )
    if call.lse is None:
        call.out.copy_(found)
        return
    call.out.copy_(found[0])
    call.lse.copy_(found[1])


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, with the strides of its shape: a dimension of size 1 may have any other one."""
    return tensor.contiguous().flatten().view(tensor.shape)


def installed_release() -> str | None:
    """Version of FlashInfer, None without one; does not import it."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def flashinfer_refusal(
    *,
    arch: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    topk: int,
) -> str | None:
    """Why FlashInfer cannot do the prefill of a layer here, for a person to read; None if it can.

    Asks neither the device nor FlashInfer, which takes seconds to import.

    Parameters
    ----------
    arch : compute capability as major * 10 + minor
    dtype, kv_dtype : of queries, of pages of K and V
    num_q_heads, num_kv_heads : of one rank
    """
    capability = f"{arch // 10}.{arch % 10}"
    if arch // 10 == 10:
        return (
            f"its msa_ops for {capability} walk all visible blocks or wait for the device; only "
            "those for 12.0 and 12.1 are used"
        )
    if arch not in ARCHES:
        return f"its msa_ops need compute capability 12.0 or 12.1, this device has {capability}"
    release = installed_release()
    if release is None:
        return f"{DISTRIBUTION} is not installed"
    if release not in RELEASES:
        return f"{DISTRIBUTION} {release} is not among the known releases {', '.join(RELEASES)}"
    if importlib.util.find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl, which compiles its kernels, is not installed"
    group = num_q_heads // num_kv_heads
    for name, value, allowed in (
        ("activations", dtype, DTYPES),
        ("K and V", kv_dtype, (dtype,)),
        ("head_dim", head_dim, (HEAD_DIM,)),
        ("page_size", page_size, (PAGE_SIZE,)),
        ("topk", topk, TOPK),
        ("query heads per KV head", group, GROUPS),
    ):
        if value not in allowed:
            return f"{name} must be {' or '.join(map(str, allowed))} for it; got {value}"
    return None


def pages_refusal(k_pages: Tensor, v_pages: Tensor) -> str | None:
    """Why FlashInfer cannot read pages where they lie; None if it can.

    It takes two contiguous tensors, or K and V side by side in one: [P, H, page_size, K | V] or
    [P, page_size, H, K | V] without gaps.
    """
    if k_pages.is_contiguous() and v_pages.is_contiguous():
        return None
    num_pages, heads, size, dim = k_pages.shape
    apart = v_pages.data_ptr() - k_pages.data_ptr()
    if k_pages.stride() == v_pages.stride() and apart == dim * k_pages.element_size():
        pair = k_pages.as_strided((num_pages, heads, size, 2 * dim), k_pages.stride())
        if pair.is_contiguous() or pair.transpose(1, 2).is_contiguous():
            return None
    return (
        "K and V must each be contiguous or lie side by side in one tensor without gaps; got shape "
        f"{list(k_pages.shape)} with strides {k_pages.stride()} and {v_pages.stride()}"
    )
