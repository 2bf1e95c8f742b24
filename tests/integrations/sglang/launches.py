"""Count what a step of the released model launches on SGLang, ours and its own, without a GPU.

    python -m tests.integrations.sglang.launches          # SGLang's table of docs/gpu-audit.md

Either model runs on the meta device, as on one of eight ranks of a GPU server (`building.py`), and
is counted by `tests.integrations.counted`; Triton launches are written down and not made.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
# SGLang compiles functions of torch that it leaves alone on a GPU that has a kernel for them
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# the table of RoPE as SGLang keeps it on a GPU, for which it has other kernels
os.environ["SGLANG_ROPE_CACHE_FP32"] = "1"

import torch

from m3_kernels.testing.specialisations import recorded
from m3_plugin.model.released import released_config
from tests.integrations.counted import (
    STEPS,
    Launches,
    Parts,
    ours,
    shortened,
    stand_in,
    untuned,
)
from tests.integrations.sglang import building
from tests.integrations.sglang.rehearsal import CHIPS, chip, resolved
from tests.integrations.sglang.steps import forward_batch
from tests.plugin.attention.specialisations import DIM, DTYPE, HEADS, Step

SUMS = "sglang.kernels.ops.communication.all_reduce_fusion"
PLANE = "sglang.srt.layers.quantization.mxfp4_flashinfer_trtllm_moe"
FUSION = "sglang.srt.layers.layer_boundary.fusions.custom_all_reduce_fusion"
CHOICE = "sglang.kernels.ops.attention.minimax_decode_topk"
HEADS_KERNELS = "sglang.kernels.ops.attention.minimax_qknorm_rope"
SHARES = ("cu_seqblocks_q", "max_seqblock_q", "all_seqblock_q")
MODELS = ("sglang.srt.models.minimax_m3", FUSION)


class StandIns(ModuleType):
    """A module of kernels, each of them one launch."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)


def with_stand_ins() -> None:
    """SGLang's kernels and layers that have no CPU build, as one launch each; for this process."""
    from sglang.srt.layers.layernorm import GemmaRMSNorm
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models import minimax_m3 as own

    from m3_sglang import compat, model, moe, router, sums

    def normed(norm: Any, x: Any, residual: Any = None, *added: Any) -> Any:
        return torch.empty_like(x) if residual is None else (torch.empty_like(x), residual)

    def attended(layer: Any, q: Any, *args: Any, idx_q: Any = None, **kwargs: Any) -> Any:
        out = torch.empty(len(q), layer.tp_q_head_num * layer.v_head_dim, dtype=q.dtype)
        return out if idx_q is None else (None, out)

    dense, sparse = stand_in("attention", attended), stand_in("MSA", attended)

    def attention(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return (sparse if "idx_q" in kwargs else dense)(layer, *args, **kwargs)

    def logits(rows: Any, weight: Any, **kwargs: Any) -> Any:
        return torch.empty(len(rows), len(weight), dtype=torch.float32)

    activated = stand_in("activation", lambda x, *args: x.new_empty(len(x), x.shape[1] // 2))
    made = router.M3Router.__init__

    def of_cuda(layer: Any, config: Any, *, device_type: str, prefix: str) -> None:
        made(layer, config, device_type="cuda", prefix=prefix)

    few_rows = (lambda rows, weight: len(rows) <= 8, stand_in("router", logits))
    plane = importlib.import_module(PLANE)
    summed = stand_in("sum over ranks and norm", lambda x, residual, *args, **kwargs: (x, residual))
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "Stream", SimpleNamespace),
        (GemmaRMSNorm, "forward", stand_in("norm", normed)),
        (RotaryEmbedding, "forward", stand_in("RoPE", lambda rope, positions, q, k: (q, k))),
        (RadixAttention, "forward", attention),
        (FusedMoE, "forward", stand_in("experts", lambda layer, rows, topk: rows)),
        (moe, "swiglu_no_interleaved_with_alpha_and_limit", activated),
        (fused_moe, "swiglu_no_interleaved_with_alpha_and_limit", activated),
        (router, "few_rows_router", lambda: few_rows),
        (router.M3Router, "__init__", of_cuda),
        (model, "require_our_backend", lambda: None),
        (model, "check_result", lambda hidden_states: None),
        (model, "read_plan", lambda *args, **kwargs: None),
        (own, "_is_cuda", True),
        (own, "tiny_gemm_bf16", stand_in("router", logits)),
        # what SGLang's loader decides for this checkpoint before it builds a layer
        (own, "get_num_fused_shared_experts", lambda: 1),
        # of the chip, not of the meta device
        (sums, "fused_sum", lambda device_type: compat.fused_sum("cuda")),
        (plane, "can_fuse_all_reduce", lambda tokens, width: tokens <= 384),
        (importlib.import_module(SUMS), "all_reduce_residual_norm", summed),
    )
    for owner, name, value in replaced:
        mock.patch.object(owner, name, value).start()
    # the latter two as SGLang's own module finds them when it is imported
    importlib.reload(importlib.import_module(FUSION))
    for name in ("vllm", "vllm._custom_ops", HEADS_KERNELS, CHOICE):
        sys.modules[name] = StandIns(name)


def around(folder: str, arch: int, *, own: bool) -> dict[str, list[int]]:
    """By step, launches of a dense layer, an MSA layer without its inner part, and all the rest."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.models import minimax_m3 as theirs
    from sglang.srt.runtime_context import SpawnRanks, publish

    from m3_sglang.model import M3CausalLM

    with_stand_ins()
    record = resolved(["--model-path", folder, "--tp", "8", "--skip-tokenizer-init"])
    publish(record, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    with (
        building.ranks(8),
        set_default_torch_dtype(torch.bfloat16),
        torch.device("meta"),
        recorded(arch) as triton,
    ):
        whole = ModelConfig.from_server_args(record).hf_config
        if own:
            text: Any = theirs.MiniMaxM3SparseForCausalLM(whole.text_config, None, "language_model")
            theirs.build_minimax_fused_qkv_index(text)
        else:
            text = M3CausalLM(whole, None, "language_model", is_root=False)
        return {name: _counted(text.model, step, triton) for name, step in STEPS.items()}


def _counted(model: Any, step: Step, triton: list[Any]) -> list[int]:
    """Counts of the first 2 to 5 layers tell those of one."""
    tokens = sum(step.rows)
    layers, counts = model.layers, []
    for depth in (2, 3, 4, 5):
        model.layers, model.end_layer = layers[:depth], depth
        with torch.device("cpu"):
            slots = torch.zeros(tokens, dtype=torch.long)
            mode = "DECODE" if max(step.rows) == 1 else "EXTEND"
            batch = forward_batch(mode, seq_lens=[5] * len(step.rows), out_cache_loc=slots)
        if 1 < max(step.rows) <= 8:
            batch.forward_mode = type(batch.forward_mode).TARGET_VERIFY
        batch.input_ids = torch.empty(tokens, dtype=torch.long)
        before = len(triton)
        with Launches() as counted:
            model(batch.input_ids, torch.empty(tokens, dtype=torch.long), batch)
        inner = counted.names.count("MSA")
        counts.append(len(counted.names) - inner + len(triton) - before)
    model.layers, model.end_layer = layers, len(layers)
    dense, msa = counts[1] - counts[0], counts[3] - counts[2]
    return [dense, msa, counts[1] - 3 * dense]


def in_tree(arch: int, step: Step) -> tuple[int, int]:
    """Launches between the projections of an MSA layer of SGLang's own, and once for all layers.

    The store is one kernel; norms and RoPE are launched, and counted, with the projections. On
    SM100 the attention is a library's, of which each call counts as one. Rows of longer steps are
    shared out once, as its backend does.
    """
    from sglang.kernels.ops.attention.minimax_sparse.common.utils import get_cu_seqblocks
    from sglang.srt.layers.attention.minimax_sparse_backend import MiniMaxSparseAttnBackend
    from sglang.srt.layers.attention.minimax_sparse_ops import minimax_sparse as ops

    msa: Any = importlib.import_module("sglang.srt.layers.attention.minimax_sparse_ops.msa")
    pages, tokens, requests = torch.zeros(1024, 1, DIM, dtype=DTYPE), sum(step.rows), len(step.rows)
    q = torch.zeros(tokens, HEADS, DIM, dtype=DTYPE)
    index_q = torch.zeros(tokens, 1, DIM, dtype=DTYPE)
    table = torch.zeros(requests, 2048, dtype=torch.int32)
    rows = torch.arange(requests)
    lengths = torch.tensor(step.rows, dtype=torch.int32)
    blocks = {"block_size_q": 1, "block_size_k": 128, "topk": 16, "init_blocks": 0}
    rules: Any = {**blocks, "local_blocks": 1, "disable_index_value": True, "page_size": 128}
    library = Launches()
    main = stand_in("attention", lambda **kwargs: torch.empty_like(kwargs["q"]))
    names = ("msa_sparse_decode_main", "msa_sparse_prefill_main")
    there = {name: main for name in names if hasattr(msa, name)}
    is_decode, once, shares = max(step.rows) == 1, 0, ()
    starts: Any = None
    before_rows: Any = None
    if not is_decode:
        given: Any = SimpleNamespace(
            seq_lens=lengths.long(),
            extend_seq_lens=lengths,
            extend_prefix_lens=torch.zeros_like(lengths),
        )
        backend: Any = SimpleNamespace(is_npu=False)
        with Launches() as shared:
            starts, lengths, before_rows = MiniMaxSparseAttnBackend._resolve_extend_meta(
                backend, given, q
            )
            shares = get_cu_seqblocks(starts, max(step.rows), 1, 128, list(step.rows))[:3]
        once = len(shared.names)
    with mock.patch.multiple(msa, **there), untuned(), recorded(arch) as triton, library:
        before = len(library.names)
        if is_decode:
            ops.minimax_sparse_decode(
                *(q, None, pages, pages, index_q, None, pages, None, table, rows, lengths, 2000),
                use_msa=arch == 100,
                **rules,
            )
        else:
            ops.minimax_sparse_prefill(
                *(q, pages, pages, None, index_q, pages, None, None, table, rows, starts, lengths),
                before_rows,
                max(step.rows),
                2000,
                use_msa=arch == 100,
                **dict(zip(SHARES, shares, strict=True)),
                seqlens_cpu=list(step.rows),
                seq_lens_cpu=lengths,
                **rules,
            )
        counted = len(triton) + len(library.names) - before
    return counted + 1, once


def counted_server(folder: str, name: str, own: bool) -> Any:
    arch = 10 * CHIPS[name][0][0] + CHIPS[name][0][1]
    parts = around(folder, arch, own=own)
    found = {}
    for step, (dense, msa, once) in parts.items():
        # all our layers share two launches of a plan
        inner, shared = in_tree(arch, STEPS[step]) if own else (ours(arch, STEPS[step]).total(), 2)
        found[step] = [dense, msa + inner, once + shared]
    return found


def table(folder: str) -> str:
    """Markdown: a row for each kind of step and family of chips; ours, then SGLang's own."""
    lines = [
        "| step | chip | dense layer | MSA layer | once | 60 layers |",
        "|---|---|---|---|---|---|",
    ]
    # those whose in-tree kernels differ by family in SGLang's source
    chips = ("A100", "H100", "B200")
    found: dict[tuple[str, bool], Any] = {}
    for name in chips:
        for own in (False, True):
            with chip(name):
                work = partial(counted_server, folder, name, own)
                found[name, own] = building.in_a_child(work)
            assert "error" not in found[name, own], found[name, own]["trace"]
    for step in STEPS:
        rows: dict[str, list[str]] = {}
        for name in chips:
            major, minor = CHIPS[name][0]
            mine, own = (Parts(*found[name, own][step]) for own in (False, True))
            least = ">= " if major == 10 else ""
            cells = (
                f"{mine.dense}, {own.dense}",
                f"{mine.msa}, {least}{own.msa}",
                f"{mine.once}, {own.once}",
                f"{mine.step}, {least}{own.step}",
            )
            rows.setdefault(" | ".join(cells), []).append(f"SM{major}{minor}")
        lines += [f"| {step} | {', '.join(sms)} | {cells} |" for cells, sms in rows.items()]
    return "\n".join(lines)


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # before the platform is a chip's: they decide on import which extensions to load
    for name in (*building.BEFORE, *MODELS):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps(shortened(released_config(), 5))
        Path(folder, "config.json").write_text(config)
        sys.stdout.write(table(folder) + "\n")


if __name__ == "__main__":
    main()
