"""Translation of SGLang's own ForwardBatch, and what is refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.sglang.steps import forward_batch, verify_step
from tests.plugin.model.test_config import hub


def slots(*pages: int) -> torch.Tensor:
    """Slots of the tokens of whole pages, as SGLang's paged allocator hands them out."""
    return torch.cat([torch.arange(page * 128, (page + 1) * 128) for page in pages])


REQ_TO_TOKEN = torch.stack([slots(5, 2, 9), slots(7, 1, 4)]).to(torch.int32)


def test_decode() -> None:
    from m3_sglang.batch import msa_batch

    batch = msa_batch(
        forward_batch("DECODE", seq_lens=[129, 300], out_cache_loc=torch.tensor([256, 555])),
        req_to_token=REQ_TO_TOKEN,
    )
    assert batch.cu_seqlens_q.tolist() == [0, 1, 2]
    assert batch.seq_lens.tolist() == [129, 300]
    assert batch.page_table.tolist() == [[5, 2, 9], [7, 1, 4]]
    assert batch.slot_mapping.tolist() == [256, 555]
    assert (batch.max_query_len, batch.max_seq_len) == (1, 300)
    assert batch.seq_lens.dtype == batch.page_table.dtype == batch.cu_seqlens_q.dtype == torch.int32


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED"])
def test_chunk_behind_a_prefix_beside_a_decoding_request(mode: str) -> None:
    from m3_sglang.batch import msa_batch

    batch = msa_batch(
        forward_batch(
            mode,
            seq_lens=[200, 131],
            out_cache_loc=torch.arange(73),
            extend_seq_lens=torch.tensor([72, 1]),
            extend_seq_lens_cpu=[72, 1],
        ),
        req_to_token=REQ_TO_TOKEN,
    )
    assert batch.cu_seqlens_q.tolist() == [0, 72, 73]
    assert batch.page_table.tolist() == [[5, 2], [7, 1]]
    assert (batch.max_query_len, batch.max_seq_len) == (72, 200)


def test_verified_chain_crosses_a_page() -> None:
    """Rows at 126..129 of a request with 126 committed tokens: the drafts are in its pages too."""
    from m3_sglang.batch import msa_batch

    step = verify_step(seq_lens=[126, 250], query_len=4, out_cache_loc=torch.arange(8))
    batch = msa_batch(step, req_to_token=REQ_TO_TOKEN)
    assert batch.cu_seqlens_q.tolist() == [0, 4, 8]
    assert batch.seq_lens.tolist() == [130, 254]
    assert batch.page_table.tolist() == [[5, 2], [7, 1]]
    assert (batch.max_query_len, batch.max_seq_len) == (4, 254)


def test_draft_extend_counts_its_own_tokens() -> None:
    from m3_sglang.batch import msa_batch

    step = forward_batch(
        "DRAFT_EXTEND_V2",
        seq_lens=[130, 254],
        out_cache_loc=torch.arange(8),
        extend_seq_lens=torch.tensor([4, 4]),
        extend_seq_lens_cpu=[4, 4],
    )
    batch = msa_batch(step, req_to_token=REQ_TO_TOKEN)
    assert batch.cu_seqlens_q.tolist() == [0, 4, 8]
    assert batch.seq_lens.tolist() == [130, 254]
    assert (batch.max_query_len, batch.max_seq_len) == (4, 254)


def test_drafting_steps_see_what_was_drafted_before() -> None:
    from m3_sglang.batch import msa_batch

    step = forward_batch("DECODE", seq_lens=[127, 255], out_cache_loc=torch.arange(6))
    batches = [
        msa_batch(step, req_to_token=REQ_TO_TOKEN, drafted=i + 1, slot_mapping=torch.tensor(slots))
        for i, slots in enumerate(([767, 255], [256, 512]))
    ]
    assert [batch.seq_lens.tolist() for batch in batches] == [[128, 256], [129, 257]]
    assert [batch.page_table.shape[1] for batch in batches] == [2, 3]
    assert batches[1].slot_mapping.tolist() == [256, 512]


def visible_pages(batch: Any) -> list[list[int]]:
    """Of each request, the pages of its tokens: beyond them a replay leaves what was there."""
    lengths, table = batch.seq_lens.tolist(), batch.page_table.tolist()
    return [row[: -(-length // 128)] for length, row in zip(lengths, table, strict=True)]


def graph_backend(*, max_bs: int, max_rows: int) -> Any:
    """Our backend around a dense one that needs nothing, with buffers for graphs."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from m3_plugin.attention.backends import choose_kernels
    from m3_plugin.attention.session import MSASession
    from m3_plugin.model.config import MSAConfig
    from m3_sglang.backend import M3AttentionBackend

    class Dense(AttentionBackend):
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...

    msa = MSAConfig(
        num_index_heads=2,
        index_dim=128,
        block_size=128,
        topk_blocks=4,
        num_init_blocks=0,
        num_local_blocks=1,
    )
    backend = object.__new__(M3AttentionBackend)
    backend.dense = Dense()
    backend.req_to_token = REQ_TO_TOKEN
    backend.session = MSASession(msa, kernels=choose_kernels("cpu"), scale=1.0)
    backend.plan, backend.graph_buffers = None, None
    backend.init_cuda_graph_state(max_bs, max_rows)
    return backend


@pytest.mark.parametrize("query_len", [1, 4])
def test_a_replayed_graph_reads_what_an_eager_step_would(query_len: int) -> None:
    """Captured on one content, refilled with another: the views the kernels hold have the new one.

    Graphs hold addresses, so the tensors of the plan must stay the same objects.
    """
    from m3_sglang.batch import msa_batch

    def step(lengths: list[int], slots: list[int]) -> Any:
        if query_len == 1:
            return forward_batch("DECODE", seq_lens=lengths, out_cache_loc=torch.tensor(slots))
        loc = torch.tensor([slot + i for slot in slots for i in range(query_len)])
        return verify_step(seq_lens=lengths, query_len=query_len, out_cache_loc=loc)

    backend = graph_backend(max_bs=4, max_rows=16)
    captured = step([1, 1], [0, 0])
    backend.init_forward_metadata_out_graph(captured, in_capture=True)
    backend.init_forward_metadata_in_graph(captured)
    plan = backend.plan
    held = (plan.batch.seq_lens, plan.batch.page_table, plan.batch.slot_mapping)
    live = step([380, 124], [1180, 1000])
    backend.init_forward_metadata_out_graph(live)
    backend.init_forward_metadata_in_graph(live)
    eager = msa_batch(live, req_to_token=REQ_TO_TOKEN)
    assert backend.plan.batch is plan.batch
    assert all(
        kept is now
        for kept, now in zip(
            held, (plan.batch.seq_lens, plan.batch.page_table, plan.batch.slot_mapping), strict=True
        )
    )
    assert plan.batch.cu_seqlens_q.tolist() == eager.cu_seqlens_q.tolist()
    assert plan.batch.seq_lens.tolist() == eager.seq_lens.tolist()
    assert plan.batch.slot_mapping.tolist() == eager.slot_mapping.tolist()
    assert visible_pages(plan.batch) == visible_pages(eager)
    assert plan.batch.max_query_len == eager.max_query_len
    assert plan.batch.max_seq_len >= eager.max_seq_len


def test_a_graph_smaller_than_the_buffers_and_a_padded_request() -> None:
    """One live request in a graph of three: the others have SGLang's fill length and slot 0."""
    backend = graph_backend(max_bs=4, max_rows=4)
    fill = backend.get_cuda_graph_seq_len_fill_value()
    step = forward_batch(
        "DECODE", seq_lens=[200, fill, fill], out_cache_loc=torch.tensor([327, 0, 0])
    )
    step.req_pool_indices = torch.tensor([1, 0, 0])
    backend.init_forward_metadata_out_graph(step, in_capture=True)
    backend.init_forward_metadata_in_graph(step)
    batch = backend.plan.batch
    assert batch.num_reqs == 3
    assert batch.seq_lens.tolist() == [200, 1, 1]
    assert visible_pages(batch) == [[7, 1], [5], [5]]
    assert batch.slot_mapping.tolist() == [327, 0, 0]


def test_a_layer_turns_by_the_angles_beside_its_index_queries() -> None:
    """Norms are those of the layer at the time of the call; angles past the rows are left alone."""
    from m3_kernels.norm_rope_store import HeadNorms
    from m3_kernels.paged import MSACaches
    from m3_plugin.model.rope import RowAngles

    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def empty() -> MSACaches:
        k_pages, v_pages = torch.full((10, 2, 128, 256), torch.nan).split(128, dim=-1)
        return MSACaches(k_pages, v_pages, torch.full((10, 128, 128), torch.nan))

    backend = graph_backend(max_bs=2, max_rows=2)
    rows = 2
    step = forward_batch("DECODE", seq_lens=[1, 1], out_cache_loc=torch.tensor([640, 896]))
    backend.init_forward_metadata_out_graph(step, in_capture=True)
    backend.init_forward_metadata_in_graph(step)
    norms = HeadNorms(*(normal(128) for _ in range(4)), eps=1e-6)
    layer = SimpleNamespace(
        layer_id=3, tp_q_head_num=4, tp_k_head_num=2, tp_v_head_num=2, head_dim=128, v_head_dim=128
    )
    backend.layers = {3: SimpleNamespace(head_norms=lambda: norms)}
    backend.pool = SimpleNamespace(get_key_buffer=lambda layer: None)
    backend.caches = {3: empty()}
    q, k, v = normal(rows, 8 * 128).split([512, 256, 256], dim=1)
    index_q, index_k = normal(rows, 2, 128), normal(rows, 128)
    cos_sin = RowAngles(rotary_dim=64, theta=5e6)(torch.tensor([7, 300, 5]))
    _, found = backend.forward(q, k, v, layer, step, idx_q=index_q, idx_k=index_k, cos_sin=cos_sin)
    expected = torch.empty(rows, 4, 128)
    caches = empty()
    backend.session.run(
        backend.plan,
        q.view(rows, 4, 128),
        k.view(rows, 2, 128),
        v.view(rows, 2, 128),
        index_q,
        index_k,
        norms=norms,
        cos_sin=cos_sin[:rows],
        caches=caches,
        out=expected,
    )
    assert torch.equal(found, expected.flatten(1))
    for name, count in (("k_pages", 2), ("v_pages", 2), ("index_k_pages", 1)):
        written, wanted = getattr(backend.caches[3], name), getattr(caches, name)
        assert written.isfinite().sum() == rows * count * 128
        assert torch.equal(written.nan_to_num(), wanted.nan_to_num())


def test_steps_of_prompts_are_not_captured() -> None:
    backend = graph_backend(max_bs=4, max_rows=16)
    step = forward_batch("EXTEND", seq_lens=[5], out_cache_loc=torch.arange(5))
    with pytest.raises(NotImplementedError, match="--cuda-graph-backend-prefill disabled"):
        backend.init_forward_metadata_out_graph(step, in_capture=True)


def server_args(**given: Any) -> Any:
    plain = {
        "page_size": None,
        "attention_backend": None,
        "kv_cache_dtype": "auto",
        "cuda_graph_backend_prefill": None,
        "speculative_algorithm": None,
        "speculative_draft_model_path": None,
        "model_path": "the/target",
        "device": "cpu",
        "disable_cuda_graph": False,
    }
    split = {"prefill_attention_backend": None, "decode_attention_backend": None}
    return SimpleNamespace(**{**plain, **split, **given})


def test_defaults_leave_a_chosen_dense_backend_alone() -> None:
    from m3_sglang.options import m3_defaults

    assert m3_defaults(server_args(), None) == {"page_size": 128, "attention_backend": "msa"}
    chosen = server_args(attention_backend="triton", page_size=128)
    assert m3_defaults(chosen, None) == {"page_size": 128}


@pytest.mark.parametrize(
    "given",
    [
        {"page_size": 64},
        {"speculative_algorithm": "NGRAM"},
        {"speculative_eagle_topk": 4},
        {"enable_multi_layer_eagle": True},
        {"attn_cp_size": 2},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"cuda_graph_backend_prefill": "breakable"},
        {"enable_dp_lm_head": True},
    ],
)
def test_what_is_not_served_is_refused_with_argument_and_value(given: dict[str, Any]) -> None:
    from m3_sglang.options import m3_defaults

    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be .*{value!r}"):
        m3_defaults(server_args(**given), None)


def test_speculation_without_a_draft_checkpoint_is_refused() -> None:
    from m3_sglang.options import m3_defaults

    for algorithm in ("NEXTN", "EAGLE3"):
        with pytest.raises(ValueError, match="needs --speculative-draft-model-path"):
            m3_defaults(server_args(speculative_algorithm=algorithm), None)


def test_a_cpu_must_not_capture_graphs_of_drafts() -> None:
    from m3_sglang.options import m3_defaults

    given = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "a/head"}
    with pytest.raises(ValueError, match="needs --disable-cuda-graph"):
        m3_defaults(server_args(**given), None)
    m3_defaults(server_args(**given, disable_cuda_graph=True), None)


def test_an_older_sglang_does_not_speculate(monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang import compat
    from m3_sglang.options import m3_defaults

    monkeypatch.setattr(compat, "sglang_version", lambda: "0.5.22")
    with pytest.raises(ValueError, match=r"needs SGLang 0\.5\.23"):
        m3_defaults(
            server_args(speculative_algorithm="NEXTN", speculative_draft_model_path="x"), None
        )


def hf_config(architecture: str) -> Any:
    """A config as SGLang holds it: of M3's shape, under any architecture's name."""
    from transformers import PretrainedConfig

    values = hub()
    text = PretrainedConfig(**values.pop("text_config"))
    config = PretrainedConfig(**values)
    config.text_config = text
    config.architectures = [architecture]
    return config


def test_a_draft_is_configured_as_one_sparse_layer_with_index_keys() -> None:
    """Of a target's config; a target itself, and another model that drafts, stay as they are."""
    from m3_sglang.registration import configure_draft, has_index_keys

    def model(architecture: str, *, is_draft_model: bool) -> Any:
        config = hf_config(architecture)
        return SimpleNamespace(hf_config=config, is_draft_model=is_draft_model)

    released = "MiniMaxM3SparseForConditionalGeneration"
    for untouched in (
        model(released, is_draft_model=False),
        model("LlamaForCausalLMEagle3", is_draft_model=True),
    ):
        configure_draft(None, untouched)
        assert untouched.hf_config.text_config.num_hidden_layers == 60
        assert not has_index_keys(False, untouched.hf_config)
    draft = model(released, is_draft_model=True)
    configure_draft(None, draft)
    text = draft.hf_config.text_config
    assert (text.num_hidden_layers, text.moe_layer_freq) == (1, [1])
    assert text.sparse_attention_config["sparse_attention_freq"] == [1]
    assert text.sparse_attention_config["sparse_index_dim"] == 128
    assert has_index_keys(False, draft.hf_config)


def test_drafting_rounds_in_a_graph_equal_eager_ones() -> None:
    from m3_sglang.speculation import M3DraftBackends

    backends = object.__new__(M3DraftBackends)
    backends.num_steps = 3
    backends.attn_backends = [graph_backend(max_bs=2, max_rows=2) for _ in range(2)]
    # 3 slots per request, of which the last is written by nobody
    slots = torch.tensor([767, 256, 257, 255, 512, 513])
    live = forward_batch("DECODE", seq_lens=[127, 255], out_cache_loc=slots)
    backends.init_forward_metadata(live)
    eager = [backend.plan.batch for backend in backends.attn_backends]
    assert [batch.seq_lens.tolist() for batch in eager] == [[128, 256], [129, 257]]
    assert [batch.slot_mapping.tolist() for batch in eager] == [[767, 255], [256, 512]]
    # as the kernels require
    assert all(batch.slot_mapping.is_contiguous() for batch in eager)
    captured = forward_batch("DECODE", seq_lens=[1, 1], out_cache_loc=torch.zeros_like(slots))
    backends.init_forward_metadata_out_graph(captured, in_capture=True)
    backends.init_forward_metadata_in_graph(captured)
    backends.init_forward_metadata_out_graph(live)
    backends.init_forward_metadata_in_graph(live)
    for backend, batch in zip(backends.attn_backends, eager, strict=True):
        graph = backend.plan.batch
        assert graph.seq_lens.tolist() == batch.seq_lens.tolist()
        assert graph.slot_mapping.tolist() == batch.slot_mapping.tolist()
        assert visible_pages(graph) == visible_pages(batch)


def test_torch_native_attention_is_given_lengths_it_knows() -> None:
    from m3_sglang.plain_dense import plain_step

    verify: Any = plain_step(
        verify_step(seq_lens=[126, 250], query_len=4, out_cache_loc=torch.arange(8))
    )
    assert verify.seq_lens.tolist() == [130, 254]
    assert verify.extend_prefix_lens.tolist() == [126, 250]
    assert verify.extend_seq_lens.tolist() == [4, 4]
    decode = forward_batch("DECODE", seq_lens=[5], out_cache_loc=torch.arange(1))
    assert plain_step(decode) is decode
    assert plain_step(decode, drafted=2).seq_lens.tolist() == [7]
    assert decode.seq_lens.tolist() == [5]


def test_fp8_pages_and_scales_of_sglang_s_pool() -> None:
    """As the pool gives them out: K and V as fp8, index keys in the model's dtype."""
    from m3_plugin.checkpoint.cache_scales import CacheScales
    from m3_sglang.backend import M3AttentionBackend
    from m3_sglang.options import require_served

    e4m3 = torch.float8_e4m3fn
    pool = SimpleNamespace(
        get_key_buffer=lambda layer: torch.zeros(256, 2, 128).to(e4m3),
        get_value_buffer=lambda layer: torch.zeros(256, 2, 128).to(e4m3),
        get_index_k_buffer=lambda layer: torch.zeros(256, 1, 128).bfloat16(),
    )
    scales = CacheScales(torch.rand(2), torch.rand(1))
    backend = object.__new__(M3AttentionBackend)
    backend.pool, backend.caches = pool, {}  # type: ignore[assignment]
    layer = SimpleNamespace(scales_for=scales.for_pages)
    backend.layers = {4: layer}  # type: ignore[dict-item]
    caches = backend._caches(4)
    assert caches.k_pages.shape == caches.v_pages.shape == (2, 2, 128, 128)
    assert (caches.k_pages.dtype, caches.index_k_pages.dtype) == (e4m3, torch.bfloat16)
    assert (caches.k_scale, caches.v_scale) == (scales.k, scales.v)
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        require_served(server_args(kv_cache_dtype=dtype, device="cuda", pp_size=1, ep_size=1))
