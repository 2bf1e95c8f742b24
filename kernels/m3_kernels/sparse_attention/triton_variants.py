"""What `sparse_attention` launches, for the compile gate: MiniMax-M3's geometry on one rank."""

from __future__ import annotations

from typing import Any

import torch

from m3_kernels.sparse_attention.triton_decode import sparse_attention_decode_kernel
from m3_kernels.sparse_attention.triton_prefill import sparse_attention_prefill_kernel
from m3_kernels.sparse_attention.workspace import (
    attention_config,
    decode_tiles,
)
from m3_kernels.testing.compile_gate import TRITON_NAMES
from m3_kernels.testing.compile_gate import WrittenVariant as Variant
from m3_kernels.tiles import keys_per_step, power_of_two
from m3_kernels.triton_shared import DOT_DTYPES
from m3_kernels.work_plan import DECODE_ROWS

KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, TOPK = 4, 16, 128, 128, 16
# Lengths and strides of the batch, at any value.
UNALIGNED = (
    "scale",
    "num_reqs",
    "num_rows",
    "max_tiles",
    "ids_stride_head",
    "table_stride",
    "lse_stride_row",
    "lse_stride_head",
    "k_scale_stride",
    "v_scale_stride",
)


def variants(arch: int) -> tuple[Variant, ...]:
    """Decode, verification and prefill in the dtypes that the chip serves."""
    bf16 = torch.bfloat16
    found = [decode(arch, query_len, bf16, bf16) for query_len in (1, 2, 4)]
    found.append(prefill(arch, bf16, bf16))
    fp8 = torch.float8_e4m3fn if arch >= 89 else torch.float8_e5m2
    found += [decode(arch, 1, bf16, fp8), decode(arch, 4, bf16, fp8), prefill(arch, bf16, fp8)]
    return tuple(found)


def decode(arch: int, query_len: int, dtype: torch.dtype, pages: torch.dtype) -> Variant:
    """The decode kernel for requests of up to `query_len` rows."""
    served: dict[str, Any] = {
        "dtype": dtype,
        "kv_dtype": pages,
        "max_query_len": query_len,
        "arch": arch,
    }
    config = attention_config("sparse_attention_decode", **served)
    tiles = decode_tiles(group=GROUP, head_dim=HEAD_DIM, page_size=PAGE_SIZE, topk=TOPK, **served)
    constants = {
        **_constants(arch, dtype, pages, tiles.keys, bool(config["USE_DESCRIPTORS"])),
        "KV_HEADS": KV_HEADS,
        "HEADS_PAD": power_of_two(KV_HEADS * GROUP),
        "ROWS": tiles.rows,
        "ROW_GROUPS": tiles.row_groups,
        "DECODE_ROWS": DECODE_ROWS,
        "SEGMENT_BLOCKS": tiles.segment_blocks,
        "UNION": power_of_two(tiles.rows * tiles.segment_blocks),
        "CLEAR_ROWS": config["CLEAR_ROWS"],
        "TAIL_STAGES": config["TAIL_STAGES"],
        "CHECK_AT_ONCE": config["CHECK_AT_ONCE"],
    }
    name = f"decode q_len {query_len} {TRITON_NAMES[dtype]} KV {TRITON_NAMES[pages]}"
    return _variant(name, sparse_attention_decode_kernel, constants, config, dtype, pages, arch)


def prefill(arch: int, dtype: torch.dtype, pages: torch.dtype) -> Variant:
    """The prefill kernel."""
    config = attention_config(
        "sparse_attention_prefill",
        dtype=dtype,
        kv_dtype=pages,
        max_query_len=PAGE_SIZE,
        arch=arch,
    )
    keys = keys_per_step(PAGE_SIZE, config["MAX_KEYS"])
    constants = {
        **_constants(arch, dtype, pages, keys, bool(config["USE_DESCRIPTORS"])),
        "ROWS": config["ROWS"],
        "UNION": config["ROWS"] * TOPK,
        "TAIL_STAGES": config["TAIL_STAGES"],
        "CHECK_AT_ONCE": config["CHECK_AT_ONCE"],
    }
    name = f"prefill {TRITON_NAMES[dtype]} KV {TRITON_NAMES[pages]}"
    return _variant(name, sparse_attention_prefill_kernel, constants, config, dtype, pages, arch)


def _variant(
    name: str,
    kernel: Any,
    constants: dict[str, object],
    config: dict[str, Any],
    dtype: torch.dtype,
    pages: torch.dtype,
    arch: int,
) -> Variant:
    """A kernel with all registers and the configured shared memory as its budget."""
    return Variant(
        name=name,
        kernel=kernel,
        signature=_signature(kernel.arg_names, constants, dtype, pages),
        constexprs=constants,
        options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
        registers=255,
        shared=config["SHARED_KB"] * 1024,
        needs=_instructions(arch, bool(config["USE_DESCRIPTORS"])),
        unaligned=UNALIGNED,
        dependent=arch >= 90,
    )


def _constants(
    arch: int, dtype: torch.dtype, pages: torch.dtype, keys: int, descriptors: bool
) -> dict[str, object]:
    scaled = pages.itemsize == 1
    return {
        "HAS_LSE": False,
        "HAS_K_SCALE": scaled,
        "HAS_V_SCALE": scaled,
        "GROUP": GROUP,
        "GROUP_PAD": GROUP,
        "HEAD_DIM": HEAD_DIM,
        "HEAD_PAD": HEAD_DIM,
        "PAGE_SIZE": PAGE_SIZE,
        "TOPK": TOPK,
        "TOPK_PAD": TOPK,
        "KEYS": keys,
        "USE_DESCRIPTORS": descriptors,
        "DOT_DTYPE": DOT_DTYPES[dtype],
        "PDL": arch >= 90,
    }


def _signature(
    names: list[str], constants: dict[str, object], dtype: torch.dtype, pages: torch.dtype
) -> dict[str, str]:
    """Triton types of what is no constexpr."""
    pool = f"*{TRITON_NAMES[pages]}"
    tile = f"tensordesc<{TRITON_NAMES[pages]}[1, 1, {constants['KEYS']}, {HEAD_DIM}]>"
    types = {
        "q": f"*{TRITON_NAMES[dtype]}",
        "out": f"*{TRITON_NAMES[dtype]}",
        "k_pages": pool,
        "v_pages": pool,
        "k_tiles": tile if constants["USE_DESCRIPTORS"] else pool,
        "v_tiles": tile if constants["USE_DESCRIPTORS"] else pool,
        "scale": "fp32",
        **dict.fromkeys(("k_scale", "v_scale", "lse", "partial"), "*fp32"),
        **dict.fromkeys(
            ("block_ids", "page_table", "cu_seqlens_q", "seq_lens", "cum_tiles", "arrivals"),
            "*i32",
        ),
    }
    return {name: types.get(name, "i32") for name in names if name not in constants}


def _instructions(arch: int, descriptors: bool) -> tuple[str, ...]:
    """Tensor cores of the chip, and TMA where it is configured."""
    dot = {90: ("HGMMA",), 100: ("UTCHMMA",)}.get(arch, ("HMMA",))
    return (*dot, "UTMALDG") if descriptors else dot
