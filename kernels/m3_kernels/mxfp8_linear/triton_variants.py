"""What `mxfp8_linear` launches, for the compile gate: projections and experts of MiniMax-M3."""

from __future__ import annotations

import triton.language as tl

from m3_kernels.mxfp8_linear.triton import mxfp8_linear_kernel
from m3_kernels.testing.compile_gate import WrittenVariant as Variant
from m3_kernels.tuning import kernel_config

EXPERTS = 128


def variants(arch: int) -> tuple[Variant, ...]:
    """One matrix, and one for each expert."""
    return (linear(arch, grouped=False), linear(arch, grouped=True))


def linear(arch: int, *, grouped: bool) -> Variant:
    """The kernel for bf16 activations."""
    config = kernel_config("mxfp8_linear", arch=arch, dot="bfloat16")
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        "GROUPED": grouped,
        "GROUPS_PAD": EXPERTS if grouped else 16,
        "DOT_DTYPE": tl.bfloat16,
        **config,
    }
    types = {
        "x": "*bf16",
        "weight": "*u8",
        "scales": "*u8",
        "group_starts": "*i32" if grouped else "*bf16",
        "out": "*bf16",
    }
    kernel = mxfp8_linear_kernel
    return Variant(
        name="experts bf16" if grouped else "projection bf16",
        kernel=kernel,
        signature={
            name: types.get(name, "i32") for name in kernel.arg_names if name not in constants
        },
        constexprs=constants,
        options=options,
        registers=255,
        shared=101376,
        needs=({90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA"),),
        unaligned=("num_tokens", "num_groups"),
    )
