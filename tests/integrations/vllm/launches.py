"""Count what a step of the released model launches on vLLM, ours and its own, without a GPU.

    python -m tests.integrations.vllm.launches            # vLLM's table of docs/gpu-audit.md

Whole layers of either model run on the meta device, as on one of eight ranks of a GPU server
(`building.py`), and are counted by `tests.integrations.counted`. What lies between the projections
of an MSA layer is counted on small tensors of a CPU: Triton launches are written down and not made
(`m3_kernels.testing.specialisations`). A process of its own: vLLM leaves Triton out on a CPU unless
it is told that it runs on something else.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
# with this variable vLLM takes Triton without looking for a device
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from m3_kernels.testing.specialisations import recorded
from m3_plugin.host.torchvision_ops import declare_missing_ops
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
from tests.integrations.vllm import building, rehearsal
from tests.integrations.vllm.rehearsal import Anything, become_a_gpu, resolved
from tests.plugin.attention.specialisations import DIM, DTYPE, HEADS, Step


def in_tree(step: Step) -> Counter[str]:
    """The same of vLLM's own model, on chips where its kernels are Triton's: all but SM100."""
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
    with untuned(), recorded(90) as launches:
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


def in_tree_sm100(step: Step) -> Counter[str]:
    """The same on SM100, by the source of vLLM's implementations: calls of a library without a CPU
    build count as one launch each, so there are at least so many."""
    from vllm.models.minimax_m3.nvidia import indexer_msa, sparse_attention_msa

    theirs: Any = sparse_attention_msa
    decoding = [rows for rows in step.rows if rows <= 4]
    prompts = [rows for rows in step.rows if rows > 4]
    tokens, first = sum(step.rows), sum(decoding)
    query_len = decoding[0] if decoding else 1
    part = SimpleNamespace(
        block_table=torch.zeros(len(decoding), 16, dtype=torch.int32),
        seq_lens=torch.tensor(decoding, dtype=torch.int32),
        max_seq_len=step.max_seq_len,
        decode_query_len=query_len,
        max_decode_query_len=4,
        page_table=None,
        plan=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_query_len=0,
        total_kv_blocks=0,
    )
    shared = {
        "num_actual_tokens": tokens,
        "num_decode_tokens": first,
        "num_decodes": len(decoding),
        "num_prefills": len(prompts),
        "decode": part if decoding else None,
        "prefill": part if prompts else None,
        "prefill_msa": part if prompts else None,
        "unified_scores": torch.zeros(tokens, 1, 16),
        "topk_num_valid_pages": None,
    }
    metadata = {
        "index": _without_init(indexer_msa.MiniMaxM3IndexerMSAMetadata, shared),
        "layer": _without_init(theirs.MiniMaxM3SparseMetadata, shared),
    }
    ids = torch.zeros(tokens, 1, 16, dtype=torch.int32)
    indexer = SimpleNamespace(
        index_cache=SimpleNamespace(prefix="index", kv_cache=torch.zeros(8, 128, DIM, dtype=DTYPE)),
        topk_indices_buffer=ids,
        num_index_heads=1,
        num_kv_heads=1,
        index_head_dim=DIM,
        topk_blocks=16,
        init_blocks=0,
        local_blocks=1,
        scale=1.0,
    )
    attention = SimpleNamespace(
        num_heads=HEADS,
        num_kv_heads=1,
        head_size=DIM,
        scale=1.0,
        topk_blocks=16,
        use_fp8_kv=False,
        use_nvfp4_kv=False,
        use_cutlass_decode=False,
    )
    layer: Any = SimpleNamespace(layer_name="layer", topk_indices_buffer=ids)
    context = SimpleNamespace(attn_metadata=metadata)
    calls: list[str] = []

    def called(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.append(name) or result

    api: Any = ModuleType("api")
    api._fmha_sm100, api.sparse_topk_select = called("scores"), called("choice")
    sparse: Any = ModuleType("sparse")
    sparse.build_k2q_csr = called("blocks to rows", (None, None, None))
    sparse.sparse_atten_func, sparse.sparse_atten_nvfp4_kv_func = called("attention"), None
    library = "vllm.third_party.fmha_sm100"
    modules = {library: ModuleType(library), f"{library}.api": api, f"{library}.sparse": sparse}
    scores = "minimax_m3_index_decode_score_cutedsl"
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(indexer_msa, scores, called("scores of decode")),
        mock.patch.object(indexer_msa, "get_forward_context", return_value=context),
        mock.patch.object(sparse_attention_msa, "get_forward_context", return_value=context),
        untuned(),
        recorded(100) as launches,
    ):
        score: Any = indexer_msa.MiniMaxM3IndexerMSAImpl.forward
        score(indexer, torch.zeros(tokens, DIM, dtype=DTYPE))
        attend: Any = sparse_attention_msa.MiniMaxM3SparseMSAImpl.forward
        q = torch.zeros(tokens, HEADS * DIM, dtype=DTYPE)
        slots = torch.zeros(8, 1, 128, 2 * DIM, dtype=DTYPE)
        attend(attention, layer, q, slots, torch.empty_like(q))
    return Counter(name for name, _ in launches) + Counter(calls) + Counter({"fused insert": 1})


def _without_init(kind: type, attributes: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


# one of each family whose kernels vLLM's own model tells apart
CHIPS = {name: rehearsal.CHIPS[name] for name in ("A100", "H100", "B200")}

# what both models ask vLLM's layers for, and get the same launches of
experts_asked: dict[str, dict[str, Any]] = {}


@contextmanager
def stand_ins() -> Iterator[None]:
    """vLLM's kernels and layers that have no CPU build, as one launch each."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory
    from vllm.models.minimax_m3.nvidia import model

    from m3_vllm import moe, norms
    from m3_vllm.caches import M3SparseCacheLayer

    own: Any = model
    kernels = ModuleType("flashinfer.norm")
    kernels.gemma_rmsnorm = stand_in("norm", lambda x, weight, eps: torch.empty_like(x))  # type: ignore[attr-defined]
    kernels.gemma_fused_add_rmsnorm = stand_in("norm")  # type: ignore[attr-defined]
    heads = stand_in("norms and RoPE of heads")
    summed = stand_in("sum over ranks and norm", lambda x, residual, norm: (x, residual))
    like_first = stand_in("attention", lambda layer, q, *args, **kwargs: torch.empty_like(q))
    inner = stand_in("MSA", lambda layer, q, *args, **kwargs: torch.empty_like(q))
    inner_own = stand_in("MSA", lambda layer, q, q_fp8, index_q, out: out)

    def factory(asker: str) -> Callable[..., Any]:
        def make(**asked: Any) -> Any:
            experts_asked[asker] = asked
            made = FusedMoEFactory(**asked)
            made.forward = stand_in("experts", lambda hidden_states, router_logits: hidden_states)
            return made

        return make

    class Slots(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            return True

        def __missing__(self, name: str) -> None:
            return None

    context = SimpleNamespace(slot_mapping=Slots())
    # stays, as do all modules that are imported within
    sys.modules["flashinfer.norm"] = kernels
    with (
        mock.patch.object(norms, "_kernels", return_value=kernels),
        mock.patch.object(norms, "_norm_and_rope", return_value=heads),
        mock.patch.object(norms, "fused_allreduce_gemma_rms_norm", summed),
        mock.patch.object(own, "fused_allreduce_gemma_rms_norm", summed),
        mock.patch.object(own.ops, "fused_minimax_m3_qknorm_rope_kv_insert", heads),
        mock.patch.object(own, "get_forward_context", return_value=context),
        mock.patch.object(Attention, "forward", like_first),
        mock.patch.object(M3SparseCacheLayer, "forward", inner),
        mock.patch.object(own.MiniMaxM3SparseAttention, "_run_attention", inner_own),
        mock.patch.object(moe, "FusedMoEFactory", factory("ours")),
        mock.patch.object(own, "FusedMoEFactory", factory("own")),
    ):
        yield


def around(folder: str, *, own: bool) -> dict[str, Parts]:
    """By step, launches of one of 8 ranks, without those between an MSA layer's projections."""
    from vllm.models.minimax_m3.nvidia import model as theirs
    from vllm.utils.torch_utils import set_default_torch_dtype

    from m3_vllm.model import M3ForCausalLM

    config = resolved(folder, "--tensor-parallel-size 8")
    config.cache_config.block_size = 128
    kind = theirs.MiniMaxM3SparseForCausalLM if own else M3ForCausalLM
    with (
        building.rank(config, place=0, tensor=8, stages=1),
        set_default_torch_dtype(torch.bfloat16),
        torch.device("meta"),
    ):
        model = kind(vllm_config=config, prefix="language_model")
        layers = model.model.layers
        for layer in layers if own else ():
            attention: Any = layer.self_attn
            if hasattr(attention, "kv_cache"):
                attention.kv_cache = torch.empty(3, 1, 128, 2 * DIM)
        steps = STEPS.items()
        return {name: counted_parts(model, sum(step.rows), own=own) for name, step in steps}


def counted_parts(model: Any, tokens: int, *, own: bool) -> Parts:
    """Launches of a model of three dense layers and two MSA layers."""
    positions = torch.empty(tokens, dtype=torch.long)
    x = torch.empty(tokens, model.config.hidden_size)
    inputs = (positions, x, x) if own else (positions, torch.empty(tokens, 64), x, x)
    # of our layers each is told whether it is to sum what the one before added
    told = {} if own else {"partial": True}
    found = []
    for place in (1, 4):
        with Launches() as counted:
            model.model.layers[place](*inputs, **told)
        found.append(counted.names)
    with Launches() as counted:
        model(torch.empty(tokens, dtype=torch.long), positions)
    dense, msa = len(found[0]), len([name for name in found[1] if name != "MSA"])
    inner = counted.names.count("MSA")
    return Parts(dense, msa, len(counted.names) - 3 * dense - 2 * msa - inner)


Inner = dict[tuple[str, str], tuple[int, int]]


def between_projections() -> Inner:
    """By chip and step, launches of an MSA layer, ours and vLLM's own."""
    found = {}
    for chip, (major, minor, _) in CHIPS.items():
        for name, step in STEPS.items():
            own = in_tree_sm100 if major == 10 else in_tree
            found[chip, name] = ours(10 * major + minor, step).total(), own(step).total()
    return found


def whole(folder: str, chip: str, inner: Inner) -> dict[str, tuple[Parts, Parts]]:
    """By step, launches of ours and of vLLM's own model."""
    with stand_ins():
        mine, own = (around(folder, own=own) for own in (False, True))
    found = {}
    for name in STEPS:
        mine_inner, own_inner = inner[chip, name]
        # once: the plan of the step, and the counters of parts
        found[name] = (
            replace(mine[name], msa=mine[name].msa + mine_inner, once=mine[name].once + 2),
            replace(own[name], msa=own[name].msa + own_inner),
        )
    return found


def require_equal_experts() -> None:
    """Routed and shared experts are one layer of vLLM's, asked for with the same arguments."""
    ours, own = experts_asked["ours"], experts_asked["own"]
    modules = ("shared_experts", "e_score_correction_bias", "prefix")
    assert ours.keys() - own.keys() == set()
    for name in own:
        same = ours[name] is not None if name in modules else ours[name] == own[name]
        assert same, f"{name}: {ours[name]} and {own[name]}"


def table(gpu: Any, folder: str, inner: Inner) -> str:
    """Markdown: a row for each kind of step and family of chips; ours, then vLLM's own."""
    lines = [
        "| step | chip | dense layer | MSA layer | once | 60 layers |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[str, Any] = {}
    for chip, shown in CHIPS.items():
        gpu.chip = shown
        found[chip] = whole(folder, chip, inner)
    for name in STEPS:
        rows: dict[str, list[str]] = {}
        for chip, (major, minor, _) in CHIPS.items():
            mine, own = found[chip][name]
            least = ">= " if major == 10 else ""
            cells = (
                f"{mine.dense}, {own.dense}",
                f"{mine.msa}, {least}{own.msa}",
                f"{mine.once}, {own.once}",
                f"{mine.step}, {least}{own.step}",
            )
            rows.setdefault(" | ".join(cells), []).append(f"SM{major}{minor}")
        lines += [f"| {name} | {', '.join(chips)} | {cells} |" for cells, chips in rows.items()]
    require_equal_experts()
    return "\n".join(lines)


def main() -> None:
    declare_missing_ops()
    import vllm.platforms

    # decided before vLLM's version is denied below
    assert vllm.platforms.current_platform.is_cpu()
    with mock.patch.object(vllm.platforms, "vllm_version_matches_substr", return_value=False):
        import vllm.triton_utils
    # kernels of SM100 in a language that is not installed
    compiled = "vllm.models.minimax_m3.nvidia.ops"
    sys.modules[compiled] = Anything(compiled)
    # in a process of its own: what it imports binds to the platform of a CPU
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        inner = pool.submit(between_projections).result()
    gpu = become_a_gpu()
    base = "vllm.distributed.device_communicators.base_device_communicator"
    gpu.get_device_communicator_cls = classmethod(lambda cls: f"{base}.DeviceCommunicatorBase")
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    building.on_meta()
    building.with_operations(stand_in)
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, SimpleNamespace)
    with tempfile.TemporaryDirectory() as folder:
        config = json.dumps(shortened(released_config(), 5))
        Path(folder, "config.json").write_text(config)
        sys.stdout.write(table(gpu, folder, inner) + "\n")


if __name__ == "__main__":
    main()
