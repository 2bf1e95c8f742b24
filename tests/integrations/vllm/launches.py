"""Count what an MSA layer launches between its projections, ours and vLLM's own, without a GPU.

    python -m tests.integrations.vllm.launches            # the table of docs/gpu-audit.md

Triton launches are written down and not made (`m3_kernels.testing.specialisations`). A process of
its own: vLLM leaves Triton out on a CPU unless it is told that it runs on something else.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
# with this variable vLLM takes Triton without looking for a device
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from m3_kernels.testing.compile_gate import ARCHS
from m3_kernels.testing.specialisations import recorded
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.plugin.attention.specialisations import (
    CPU,
    DIM,
    DTYPE,
    HEADS,
    RULES,
    TRITON,
    Step,
    layer,
    run,
)

STEPS = {
    "decode": Step([1, 1, 1], table_width=16),
    "verify of 3 drafted tokens": Step([4, 4, 4], table_width=16),
    "a chunk of a prompt": Step([300], table_width=16),
    "a chunk and two that decode": Step([1, 300, 1], table_width=16),
}
ONCE_PER_STEP = ("work_plan_kernel",)


def ours(arch: int, step: Step) -> Counter[str]:
    """Launches of one layer; those that serve all layers of a step are not among them."""
    shape = LayerShape(HEADS, 1, DIM, 64, DTYPE, DTYPE, DTYPE)
    workspace = allocate_workspace(
        replace(RULES, num_local_blocks=1), shape, StepCapacity(4, 512, 4096, 4), device=CPU
    )
    session = MSASession(RULES, kernels=TRITON, scale=1.0, workspace=workspace)
    with recorded(arch) as launches:
        run(session, step, layer(DTYPE, "LBNHC"), fused_index=True)
    found = Counter(name for name, _ in launches)
    assert all(found.pop(name) == 1 for name in ONCE_PER_STEP)
    return found


def first_configuration(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Tuning would launch a kernel many times before the one launch that counts."""
    return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())


def in_tree(step: Step) -> Counter[str]:
    """The same of vLLM's own model, on chips where its kernels are Triton's: all but SM100."""
    from triton.runtime.autotuner import Autotuner
    from vllm.models.minimax_m3.nvidia import model

    own = "vllm.models.minimax_m3.common"
    indexer: Any = importlib.import_module(f"{own}.indexer")
    sparse_attention: Any = importlib.import_module(f"{own}.sparse_attention")

    # one call of an operation in C++ stands for norm, RoPE and store
    source = inspect.getsource(model.MiniMaxM3SparseAttention.forward)
    assert source.count("ops.fused_minimax_m3_qknorm_rope_kv_insert(") == 1
    q_heads, slots = HEADS, torch.zeros(8, 1, 128, 2 * DIM, dtype=DTYPE)
    decoding = [rows for rows in step.rows if rows <= 4]
    prompts = [rows for rows in step.rows if rows > 4]
    with mock.patch.object(Autotuner, "run", first_configuration), recorded(90) as launches:
        if decoding:
            count, length = sum(decoding), decoding[0]
            table = torch.zeros(len(decoding), 16, dtype=torch.int32)
            lengths = torch.tensor(decoding, dtype=torch.int32)
            ids = indexer.minimax_m3_index_decode(
                torch.zeros(count, 1, DIM, dtype=DTYPE),
                torch.zeros(8, 128, DIM, dtype=DTYPE),
                *(table, lengths, step.max_seq_len, 16, 0, 1, 1, length, 4),
            )
            q = torch.zeros(count, q_heads, DIM, dtype=DTYPE)
            sparse_attention.minimax_m3_sparse_attn_decode(
                *(q, slots, ids, table, lengths, 1, 1.0, torch.empty_like(q), length)
            )
        if prompts:
            count = sum(prompts)
            table = torch.zeros(len(prompts), 16, dtype=torch.int32)
            lengths = torch.tensor(prompts, dtype=torch.int32)
            starts = torch.tensor([0, *prompts]).cumsum(0).int()
            before = torch.zeros_like(lengths)
            scores = indexer.minimax_m3_index_score(
                torch.zeros(count, 1, DIM, dtype=DTYPE),
                torch.zeros(8, 128, DIM, dtype=DTYPE),
                *(table, starts, lengths, before, count, step.max_seq_len, 1),
            )
            ids = indexer.minimax_m3_index_topk(scores, starts, before, count, 16, 0, 1)
            q = torch.zeros(count, q_heads, DIM, dtype=DTYPE)
            sparse_attention.minimax_m3_sparse_attn(
                *(q, slots, ids, table, starts, lengths, before, count, 1, 1.0),
                torch.empty_like(q),
            )
    return Counter(name for name, _ in launches) + Counter({"fused insert": 1})


def table() -> str:
    """Markdown: a row for each kind of step."""
    lines = ["| step | ours, every chip | vLLM's own, but on SM100 |", "|---|---|---|"]
    for name, step in STEPS.items():
        counts = {ours(arch, step).total() for arch in ARCHS}
        assert len(counts) == 1, f"{name}: chips differ"
        lines.append(f"| {name} | {counts.pop()} | {in_tree(step).total()} |")
    return "\n".join(lines)


def main() -> None:
    declare_missing_ops()
    import vllm.platforms

    # decided before vLLM's version is denied below
    assert vllm.platforms.current_platform.is_cpu()
    with mock.patch.object(vllm.platforms, "vllm_version_matches_substr", return_value=False):
        import vllm.triton_utils
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
