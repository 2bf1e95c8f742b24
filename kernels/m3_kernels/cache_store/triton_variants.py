"""What `cache_store` launches, for the compile gate: MiniMax-M3's geometry on one rank."""

from __future__ import annotations

import torch

from m3_kernels.cache_store.triton import cache_store_kernel
from m3_kernels.cache_store.triton_write import LARGEST
from m3_kernels.testing.compile_gate import TRITON_NAMES
from m3_kernels.testing.compile_gate import WrittenVariant as Variant
from m3_kernels.tuning import kernel_config

UNALIGNED = ("k_scale_stride", "v_scale_stride", "scales_stride_page")


def variants(arch: int) -> tuple[Variant, ...]:
    """A cache of bf16, and the smallest one that the chip serves."""
    return tuple(store(arch, *dtypes) for dtypes in cache_dtypes(arch))


def cache_dtypes(arch: int) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """Dtypes of K and V pages and of index keys."""
    fp8 = torch.float8_e4m3fn if arch >= 89 else torch.float8_e5m2
    return (torch.bfloat16, torch.bfloat16), (fp8, torch.int8)


def store(arch: int, pages: torch.dtype, index_pages: torch.dtype) -> Variant:
    """The kernel for bf16 activations."""
    constants = page_constants(arch, pages, index_pages)
    types = {
        **dict.fromkeys(("k", "v", "index_k"), "*bf16"),
        **page_types(pages, index_pages),
    }
    kernel = cache_store_kernel
    return Variant(
        name=f"KV {TRITON_NAMES[pages]} index {TRITON_NAMES[index_pages]}",
        kernel=kernel,
        signature={
            name: types.get(name, "i32") for name in kernel.arg_names if name not in constants
        },
        constexprs=constants,
        options=kernel_config("cache_store", arch=arch),
        registers=64,
        shared=1024,
        unaligned=UNALIGNED,
        dependent=arch >= 90,
    )


def page_constants(arch: int, pages: torch.dtype, index_pages: torch.dtype) -> dict[str, object]:
    """Constants of every kernel that writes into the pages."""
    return {
        "HAS_K_SCALE": pages in LARGEST,
        "HAS_V_SCALE": pages in LARGEST,
        "INT8_INDEX": index_pages == torch.int8,
        "KV_HEADS": 4,
        "HEADS_PAD": 4,
        "HEAD_DIM": 128,
        "HEAD_PAD": 128,
        "INDEX_DIM": 128,
        "INDEX_PAD": 128,
        "PAGE_SIZE": 128,
        "LARGEST_K": LARGEST.get(pages, 0.0),
        "LARGEST_V": LARGEST.get(pages, 0.0),
        "LARGEST_INDEX": LARGEST.get(index_pages, 0.0),
        "PDL": arch >= 90,
    }


def page_types(pages: torch.dtype, index_pages: torch.dtype) -> dict[str, str]:
    """Triton types of the pointers to the pages and of what belongs to them."""
    return {
        **dict.fromkeys(("k_pages", "v_pages"), f"*{TRITON_NAMES[pages]}"),
        **dict.fromkeys(("k_scale", "v_scale", "index_k_scales"), "*fp32"),
        "index_k_pages": f"*{TRITON_NAMES[index_pages]}",
        "slot_mapping": "*i64",
    }
