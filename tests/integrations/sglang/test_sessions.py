"""One scratch per worker, scales and weights that are updated in place, steps without the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.checkpoint.loading import interleave_gate_up
from m3_plugin.model.config import M3Config, local_heads
from tests.integrations.sglang.steps import forward_batch
from tests.integrations.sglang.test_graphs import session
from tests.plugin.model.test_config import hub


def runner(pool: Any) -> Any:
    cache = SimpleNamespace(
        sparse_layer_id_mapping={0: 0},
        get_index_k_buffer=lambda layer: torch.empty(0, dtype=torch.bfloat16),
    )
    return SimpleNamespace(
        dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        device="cpu",
        req_to_token_pool=pool,
        token_to_kv_pool=cache,
        server_args=SimpleNamespace(
            chunked_prefill_size=128, speculative_num_draft_tokens=None, max_prefill_tokens=128
        ),
    )


class Pool:
    size = 4
    req_to_token = torch.zeros(5, 512, dtype=torch.int32)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5])
def test_a_draft_and_all_its_steps_use_the_targets_scratch(
    monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """Each with a plan of its own, for SGLang plans all steps of a round before the first runs."""
    from m3_sglang import session as sessions

    made: list[Any] = []

    def make_session(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["capacity"])
        return session()

    monkeypatch.setattr(sessions, "make_session", make_session)
    monkeypatch.setattr(sessions, "attention_parallel_size", lambda: 1)
    monkeypatch.setattr(sessions, "attention_parallel_rank", lambda: 0)
    config = M3Config.from_hf(hub())
    pool = Pool()
    target, *drafts = (sessions.worker_session(config, runner(pool)) for _ in range(1 + num_steps))
    assert len(made) == 1
    assert target is not None
    assert target.workspace is not None
    plans = {target.workspace.plan_buffers.row_request.data_ptr()}
    for draft in drafts:
        assert draft is not None
        assert draft.workspace is not None
        own = dict(vars(draft.workspace))
        theirs = dict(vars(target.workspace))
        del own["plan_buffers"], theirs["plan_buffers"]
        assert all(own[name] is theirs[name] for name in theirs if name not in ("shared",))
        plans.add(draft.workspace.plan_buffers.row_request.data_ptr())
    assert len(plans) == 1 + num_steps
    # another worker has another pool, and a session of its own
    sessions.worker_session(config, runner(Pool()))
    assert len(made) == 2


@pytest.mark.parametrize("asked", ["", "nvfp4"])
def test_a_workers_session_rounds_what_it_stores_if_asked(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """The target's, and that of each drafting step beside it."""
    from m3_sglang import session as sessions

    monkeypatch.setenv("M3_PLUGIN_CACHE_VALUES", asked)
    monkeypatch.setattr(sessions, "attention_parallel_size", lambda: 1)
    monkeypatch.setattr(sessions, "attention_parallel_rank", lambda: 0)
    config, pool = M3Config.from_hf(hub()), Pool()
    for _ in range(2):
        made = sessions.worker_session(config, runner(pool))
        assert made is not None
        assert made.nvfp4 is (asked == "nvfp4")


# SGLang's pools of requests: by memory, or 48 beside speculation
@pytest.mark.parametrize(("chain", "requests"), [(None, 2048), (None, 4096), (4, 48)])
@pytest.mark.parametrize(("ranks", "bound"), [(8, 1.0), (4, 1.0), (2, 1.0), (1, 2.0)])
def test_the_workspace_at_sglangs_own_limits(
    ranks: int, bound: float, chain: int | None, requests: int
) -> None:
    """GiB at 1M tokens, on meta tensors, of the released model on a rank of that many."""
    from m3_sglang.session import step_capacity

    pool = SimpleNamespace(
        size=requests, req_to_token=torch.empty(requests, 2**20, dtype=torch.int32, device="meta")
    )
    arguments = SimpleNamespace(
        chunked_prefill_size=8192, max_prefill_tokens=16384, speculative_num_draft_tokens=chain
    )
    capacity = step_capacity(SimpleNamespace(server_args=arguments, req_to_token_pool=pool))
    config = M3Config.from_hf(hub())
    assert config.msa is not None
    heads = local_heads(config.num_attention_heads, ranks)
    kv_heads = local_heads(config.num_key_value_heads, ranks)
    dtype = torch.bfloat16
    shape = LayerShape(heads, kv_heads, config.head_dim, config.rotary_dim, dtype, dtype, dtype)
    workspace = allocate_workspace(config.msa, shape, capacity, device=torch.device("meta"))
    assert workspace.num_bytes / 2**30 < bound


def test_a_step_without_the_hosts_lengths_asks_no_device() -> None:
    from m3_sglang.batch import msa_batch

    class OnDevice(Tensor):
        def cpu(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("waits for the device")

        tolist = item = __int__ = cpu

    step = forward_batch("DECODE", seq_lens=[129, 300], out_cache_loc=torch.tensor([256, 555]))
    step.seq_lens = step.seq_lens.as_subclass(OnDevice)
    step.seq_lens_cpu = None
    table = torch.arange(512, dtype=torch.int32).repeat(2, 1)
    batch = msa_batch(step, req_to_token=table)
    assert batch.max_seq_len == 512
    assert batch.page_table.shape == (2, 4)


def test_lengths_are_copied_for_dense_backends_alone() -> None:
    from m3_sglang.backend import M3AttentionBackend
    from m3_sglang.speculation import M3DraftBackends, NoDenseLayers

    backend = object.__new__(M3AttentionBackend)
    for wanted in (True, False):
        backend.dense = NoDenseLayers()
        backend.dense.needs_cpu_seq_lens = wanted
        assert backend.needs_cpu_seq_lens is wanted
    assert not M3DraftBackends.needs_cpu_seq_lens
    assert backend.extend_dummy_seqs_capped_by_req_pool


def test_an_idle_rank_returns_zeros() -> None:
    from m3_sglang.backend import M3AttentionBackend

    backend = object.__new__(M3AttentionBackend)
    backend.plan = None
    layer: Any = SimpleNamespace(tp_q_head_num=2, head_dim=4)
    rows: dict[str, Any] = {name: torch.ones(3, 1, 4) for name in ("idx_q", "idx_k", "cos_sin")}
    q = torch.full((3, 8), torch.nan)
    _, out = backend.forward(q, q, q, layer, SimpleNamespace(), **rows)  # pyright: ignore
    assert torch.equal(out, torch.zeros(3, 8))


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    from m3_sglang import attention as module

    monkeypatch.setattr(module, "attention_parallel_size", lambda: 1)
    monkeypatch.setattr(module, "attention_parallel_rank", lambda: 0)
    monkeypatch.setattr(module, "attention_parallel_rank", lambda: 0)
    layer: Any = object.__new__(module.M3SparseAttention)
    nn.Module.__init__(layer)
    layer.q_norm = nn.LayerNorm(4)
    layer.total_kv_heads = 2
    layer.cache_scales, layer.scales_are_read = CacheScales(), False
    return layer


def scales(k: float, v: float) -> CacheScales:
    return CacheScales(torch.tensor([k]), torch.tensor([v]))


def test_scales_of_new_weights_are_where_graphs_read_the_old_ones(attention: Any) -> None:
    attention.take_cache_scales(scales(2.0, 3.0))
    read = attention.scales_for(torch.float8_e4m3fn)
    attention.take_cache_scales(scales(4.0, 5.0))
    assert (read.k.item(), read.v.item()) == (4.0, 5.0)
    attention.take_cache_scales(CacheScales())
    assert (read.k.item(), read.v.item()) == (1.0, 1.0)


def test_scales_cannot_come_to_a_server_that_started_without(attention: Any) -> None:
    attention.take_cache_scales(CacheScales())
    assert attention.scales_for(torch.bfloat16) == CacheScales()
    attention.take_cache_scales(scales(2.0, 3.0))
    attention.cache_scales = CacheScales()
    attention.scales_for(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="restart it with these"):
        attention.take_cache_scales(scales(2.0, 3.0))


def test_an_update_of_experts_meets_rows_in_the_checkpoints_order() -> None:
    """The CPU's kernel has them in another order, and an update writes halves."""
    from m3_sglang.moe import M3MoE

    moe: Any = object.__new__(M3MoE)
    nn.Module.__init__(moe)
    stored = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    moe.experts = nn.Module()
    moe.experts.w13_weight = nn.Parameter(stored.clone(), requires_grad=False)
    moe.interleave, moe.is_interleaved = True, False
    moe.finish_loading()
    assert torch.equal(moe.experts.w13_weight, interleave_gate_up(stored))
    moe.start_loading()
    assert torch.equal(moe.experts.w13_weight, stored)
    moe.experts.w13_weight.data[1, :3] = 7.0
    moe.finish_loading()
    assert (moe.experts.w13_weight[1, 0::2] == 7.0).all()
    assert torch.equal(moe.experts.w13_weight[1, 1::2], stored[1, 3:])


def test_embeddings_of_a_request_must_be_as_wide_as_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from m3_sglang import registration
    from m3_sglang.registration import REQUEST_CHECK, check_embeddings

    monkeypatch.setattr(registration, "is_ours", lambda config: True)

    assert REQUEST_CHECK.endswith(f".{TokenizerManager._validate_one_request.__name__}")
    config = SimpleNamespace(
        architectures=["MiniMaxM3SparseForConditionalGeneration"],
        text_config=SimpleNamespace(hidden_size=4),
    )
    manager = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    check_embeddings(manager, SimpleNamespace(input_embeds=None), [1, 2])
    check_embeddings(manager, SimpleNamespace(input_embeds=[[0.0] * 4] * 3), [1, 2])
    with pytest.raises(ValueError, match="hidden_size=4 numbers; got 3"):
        check_embeddings(manager, SimpleNamespace(input_embeds=[[0.0] * 4, [0.0] * 3]), [1, 2])


def test_layouts_that_deep_gemm_chooses_between_are_all_asked() -> None:
    from m3_sglang.moe import expert_layouts

    deep_gemm: Any = SimpleNamespace(runner_backend=SimpleNamespace(is_deep_gemm=lambda: True))
    other: Any = SimpleNamespace(runner_backend=SimpleNamespace(is_deep_gemm=lambda: False))
    assert [layout for layout, _ in expert_layouts(deep_gemm)] == ["masked", "compact"]
    assert [layout for layout, _ in expert_layouts(other)] == [""]


@pytest.mark.parametrize(
    ("device", "decode", "setting", "ours", "captured"),
    [
        ("cuda", "full", False, True, True),
        ("cuda", "disabled", False, True, False),
        ("cuda", "full", True, True, False),
        ("cuda", "full", False, False, False),
        ("cpu", "full", False, True, False),
    ],
)
def test_the_extend_step_of_the_mtp_module_is_captured(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    decode: str,
    setting: bool,
    ours: bool,
    captured: bool,
) -> None:
    """SGLang's own capture passes our backend over, which is on no list of its."""
    from sglang.srt.environ import envs
    from sglang.srt.model_executor import cuda_graph_config
    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as runners
    from sglang.srt.speculative import eagle_worker_v2 as host

    from m3_sglang.backend import M3AttentionBackend
    from m3_sglang.speculation import NoDenseLayers, capture_graphs

    made: list[Any] = []

    class Runner:
        def __init__(self, worker: Any) -> None:
            made.append(worker)

    def disabled(phase: Any, backend: Any) -> bool:
        return decode == "disabled"

    for module in (host, cuda_graph_config):
        monkeypatch.setattr(module, "check_cuda_graph_backend", disabled)
    for module in (host, runners):
        monkeypatch.setattr(module, "EAGLEDraftExtendCudaGraphRunner", Runner)
    for name, value in (("_is_cpu", False), ("_is_hip", False), ("_is_npu", False)):
        monkeypatch.setattr(host, name, value)
    monkeypatch.setattr(host, "get_batch_sizes_to_capture", lambda runner: ([1], []))
    monkeypatch.setattr(host, "get_model", lambda: SimpleNamespace(model_impl="auto"), raising=True)
    graphs = SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="")))
    monkeypatch.setattr(host, "get_exec", lambda: SimpleNamespace(graph=graphs))
    backend = object.__new__(M3AttentionBackend) if ours else NoDenseLayers()
    worker = SimpleNamespace(
        device=device,
        target_worker=SimpleNamespace(device=device),
        draft_runner=None,
        speculative_num_steps=1,
        draft_attn_backend=None,
        draft_extend_attn_backend=backend,
        speculative_algorithm=SimpleNamespace(name="EAGLE"),
    )
    with envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.override(setting):
        capture_graphs(host.EagleDraftWorker._capture_cuda_graphs, worker)
    assert made == ([worker] if captured else [])
    assert isinstance(worker.cuda_graph_runner_for_draft_extend, Runner) is captured
