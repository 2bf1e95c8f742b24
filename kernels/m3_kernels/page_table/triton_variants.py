"""What the page table launches, for the compile gate."""

from __future__ import annotations

from m3_kernels.page_table.triton import page_table_kernel
from m3_kernels.testing.compile_gate import Variant
from m3_kernels.tuning import kernel_config


def variants(arch: int) -> tuple[Variant, ...]:
    """The one kernel, for rows as SGLang counts them."""
    config = kernel_config("page_table", arch=arch)
    strides = ("slots_stride", "table_stride")
    return (
        Variant(
            name="pages",
            kernel=page_table_kernel,
            signature={
                **dict.fromkeys(("page_table", "slots", "seq_lens"), "*i32"),
                "rows": "*i64",
                **dict.fromkeys(strides, "i32"),
            },
            constexprs={"PAGE_SIZE": 128, "BLOCKS": config["BLOCKS"]},
            options={name: config[name] for name in ("num_warps", "num_stages")},
            registers=40,
            shared=1024,
            unaligned=strides,
        ),
    )
