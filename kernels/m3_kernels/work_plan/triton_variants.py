"""What the work plan launches, for the compile gate."""

from __future__ import annotations

from m3_kernels.testing.compile_gate import Variant
from m3_kernels.tuning import kernel_config
from m3_kernels.work_plan.plan import DECODE_ROWS, TILE_ROWS
from m3_kernels.work_plan.triton import work_plan_kernel


def variants(arch: int) -> tuple[Variant, ...]:
    """The one kernel of the plan."""
    config = kernel_config("work_plan", arch=arch)
    tensors = (
        "cu_seqlens_q",
        "seq_lens",
        "cum_blocks",
        "cum_tiles",
        "range_start",
        "range_request",
        "row_request",
    )
    counts = ("num_reqs", "num_rows", "num_programs", "range_tiles")
    return (
        Variant(
            name="plan",
            kernel=work_plan_kernel,
            signature={**dict.fromkeys(tensors, "*i32"), **dict.fromkeys(counts, "i32")},
            constexprs={
                "PAGE_SIZE": 128,
                "DECODE_ROWS": DECODE_ROWS,
                "TILE_ROWS": TILE_ROWS,
                "REQUESTS": config["REQUESTS"],
                "ITEMS": config["ITEMS"],
            },
            options={name: config[name] for name in ("num_warps", "num_stages")},
            registers=128,
            shared=8 * 1024,
            unaligned=counts,
        ),
    )
