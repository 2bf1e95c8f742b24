"""What `index_topk` launches, for the compile gate."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from m3_kernels.index_topk.triton_decode import index_decode_scores_kernel
from m3_kernels.index_topk.triton_prefill import index_prefill_scores_kernel
from m3_kernels.index_topk.triton_select import index_select_kernel
from m3_kernels.testing.compile_gate import Variant
from m3_kernels.tiles import keys_per_step
from m3_kernels.tuning import kernel_config
from m3_kernels.work_plan import DECODE_ROWS

HEADS = 4
DIM = 128
PAGE_SIZE = 128
TOPK = 16

# Products of float32 keys run on no tensor core and spill; they are for checks, and not judged.
# (name, Triton types of query and key, torch names as the configurations ask for them)
DTYPES = (
    ("bf16", "bf16", "bf16", "bfloat16", "bfloat16"),
    ("int8", "bf16", "i8", "bfloat16", "int8"),
    ("e4m3", "bf16", "fp8e4nv", "bfloat16", "float8_e4m3fn"),
)


def variants(arch: int) -> tuple[Variant, ...]:
    """Decode of 1 and 8 rows and prefill for every dtype, and the choice at two context lengths."""
    found = []
    for dtype in DTYPES:
        if dtype[0] == "e4m3" and arch < 89:
            continue
        for slots in (1, 8):
            found.append(_decode(arch, *dtype, slots=slots))
        found.append(_prefill(arch, *dtype))
    for max_blocks in (256, 8192):
        for slots in (1, 0):
            found.append(_select(arch, max_blocks=max_blocks, slots=slots))
    return tuple(found)


def _scores(
    arch: int, q: str, keys: str, dot_name: str, keys_name: str, kernel: str
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Configuration, and what decode and prefill have in common of signature and constants."""
    config = kernel_config(kernel, arch=arch, dot=dot_name, keys=keys_name)
    tile = keys_per_step(PAGE_SIZE, config["MAX_KEYS"])
    tiles = f"tensordesc<{keys}[1, {tile}, {DIM}]>" if config["USE_DESCRIPTORS"] else f"*{keys}"
    signature = {
        "index_q": f"*{q}",
        "key_pages": f"*{keys}",
        "key_tiles": tiles,
        "key_scales": "*fp32" if keys == "i8" else f"*{keys}",
        "page_table": "*i32",
        "cu_seqlens_q": "*i32",
        "seq_lens": "*i32",
        "scores": "*fp32",
        "q_stride_row": "i32",
        "q_stride_head": "i32",
        "key_stride_page": "i32",
        "key_stride_slot": "i32",
        "scale_stride": "i32",
        "table_stride": "i32",
        "score_stride": "i32",
    }
    constants = {
        "HEADS": HEADS,
        "DIM": DIM,
        "DIM_PAD": DIM,
        "PAGE_SIZE": PAGE_SIZE,
        "KEYS": tile,
        "HAS_SCALES": keys == "i8",
        "USE_DESCRIPTORS": config["USE_DESCRIPTORS"],
        "DOT_DTYPE": tl.bfloat16,
        "PDL": arch >= 90,
    }
    return config, signature, constants


def _needs(arch: int, config: dict[str, Any]) -> tuple[str, ...]:
    """Tensor cores of the chip, and TMA or asynchronous copies."""
    loads = ("UTMALDG",) if config["USE_DESCRIPTORS"] else ("LDGSTS",)
    return ({90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA"), *loads)


def _decode(
    arch: int, name: str, q: str, keys: str, dot_name: str, keys_name: str, *, slots: int
) -> Variant:
    config, signature, constants = _scores(
        arch, q, keys, dot_name, keys_name, "index_topk_decode_scores"
    )
    plan = dict.fromkeys(("cum_blocks", "range_start", "range_request"), "*i32")
    return Variant(
        name=f"decode scores {name} q_len {slots}",
        kernel=index_decode_scores_kernel,
        signature={**signature, **plan},
        constexprs={**constants, "SLOTS": slots, "N": max(16, slots * HEADS)},
        options={option: config[option] for option in ("num_warps", "num_stages")},
        registers=168 if config["USE_DESCRIPTORS"] else 216,
        shared=112 * 1024,
        needs=_needs(arch, config),
        unaligned=("table_stride", "score_stride"),
        dependent=arch >= 90,
    )


def _prefill(arch: int, name: str, q: str, keys: str, dot_name: str, keys_name: str) -> Variant:
    config, signature, constants = _scores(
        arch, q, keys, dot_name, keys_name, "index_topk_prefill_scores"
    )
    rows = dict.fromkeys(("first_row", "end_row", "num_reqs"), "i32")
    return Variant(
        name=f"prefill scores {name}",
        kernel=index_prefill_scores_kernel,
        signature={**signature, "row_request": "*i32", **rows},
        constexprs={**constants, "DECODE_ROWS": DECODE_ROWS, "M": config["ITEMS"]},
        options={option: config[option] for option in ("num_warps", "num_stages")},
        registers=192 if config["USE_DESCRIPTORS"] else 255,
        shared=136 * 1024,
        needs=_needs(arch, config),
        unaligned=("table_stride", "score_stride", *rows),
        dependent=arch >= 90,
    )


def _select(arch: int, *, max_blocks: int, slots: int) -> Variant:
    config = kernel_config("index_topk_select", arch=arch, max_blocks=max_blocks)
    tensors = ("row_request", "cu_seqlens_q", "seq_lens", "out")
    counts = ("first_row", "num_reqs", "score_stride", "num_init_blocks")
    return Variant(
        name=f"{'decode' if slots else 'prefill'} choice up to {max_blocks} blocks",
        kernel=index_select_kernel,
        signature={
            "scores": "*fp32",
            **dict.fromkeys(tensors, "*i32"),
            **dict.fromkeys(counts, "i32"),
            "out_stride_head": "i32",
            "out_stride_row": "i32",
            "num_local_blocks": "i32=1",
        },
        constexprs={
            "HEADS": HEADS,
            "SLOTS": slots,
            "DECODE_ROWS": DECODE_ROWS,
            "PAGE_SIZE": PAGE_SIZE,
            "TOPK": TOPK,
            "TOPK_PAD": TOPK,
            "BLOCKS": config["BLOCKS"],
            "PDL": arch >= 90,
        },
        options={option: config[option] for option in ("num_warps", "num_stages")},
        registers=96,
        shared=4 * 1024,
        unaligned=counts,
        dependent=arch >= 90,
    )
