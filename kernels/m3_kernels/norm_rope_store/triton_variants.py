"""What `norm_rope_store` launches, for the compile gate: MiniMax-M3's geometry on one rank."""

from __future__ import annotations

import torch

from m3_kernels.cache_store.triton_variants import (
    UNALIGNED,
    cache_dtypes,
    page_constants,
    page_types,
)
from m3_kernels.norm_rope_store.triton import norm_rope_store_kernel
from m3_kernels.testing.compile_gate import TRITON_NAMES
from m3_kernels.testing.compile_gate import WrittenVariant as Variant
from m3_kernels.tuning import kernel_config

Q_HEADS, INDEX_HEADS, ROTARY = 64, 4, 64
ACTIVATIONS = ("q", "k", "v", "index_q", "index_k", "q_out", "index_q_out")
WEIGHTS = ("q_weight", "k_weight", "index_q_weight", "index_k_weight")


def variants(arch: int) -> tuple[Variant, ...]:
    """The caches of `cache_store`."""
    return tuple(norm_and_store(arch, *dtypes) for dtypes in cache_dtypes(arch))


def norm_and_store(arch: int, pages: torch.dtype, index_pages: torch.dtype) -> Variant:
    """The kernel for bf16 activations and weights and fp32 angles' cosines and sines."""
    config = kernel_config("norm_rope_store", arch=arch)
    heads = config["HEADS"]
    constants = {
        **page_constants(arch, pages, index_pages),
        "Q_HEADS": Q_HEADS,
        "INDEX_HEADS": INDEX_HEADS,
        "ROTARY": ROTARY,
        "HEADS": heads,
        "PARTS": 1 + -(-INDEX_HEADS // heads) + -(-Q_HEADS // heads),
    }
    types = {
        **dict.fromkeys((*ACTIVATIONS, *WEIGHTS), "*bf16"),
        **page_types(pages, index_pages),
        "cos_sin": "*fp32",
        "eps": "fp32",
    }
    kernel = norm_rope_store_kernel
    return Variant(
        name=f"KV {TRITON_NAMES[pages]} index {TRITON_NAMES[index_pages]}",
        kernel=kernel,
        signature={
            name: types.get(name, "i32") for name in kernel.arg_names if name not in constants
        },
        constexprs=constants,
        options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
        registers=96,
        shared=4 * 1024,
        unaligned=("eps", *UNALIGNED),
        dependent=arch >= 90,
    )
