"""Captured steps of vLLM: all steps of a draft in one graph, padded requests, idle ranks.

vLLM's own classes make the metadata, on its persistent buffers. A recorder stands for CUDA graphs:
it keeps addresses, and a replay that reads memory nobody owns is an error.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.utils import AttentionGroup

from m3_kernels.norm_rope_store import HeadNorms
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import MSAConfig
from m3_plugin.model.rope import RowAngles
from m3_vllm import caches
from m3_vllm.caches import M3SparseCacheLayer, m3_msa_attention
from tests.integrations.recorded_graph import FreedMemoryError, RecordedGraph, record_kernels

HEADS, KV_HEADS, DIM, PAGES, REQUESTS, BLOCKS = 4, 2, 128, 24, 4, 4
PADDING = -1
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    record_kernels(monkeypatch)
    # of every kernel in plain torch, for each server
    monkeypatch.setattr(caches, "warm_up", lambda session, pages: 0)


def session(family: Any) -> MSASession:
    msa = MSAConfig(
        num_index_heads=KV_HEADS,
        index_dim=DIM,
        block_size=128,
        topk_blocks=2,
        num_init_blocks=0,
        num_local_blocks=1,
    )
    dtype = torch.float32
    shape = LayerShape(HEADS, KV_HEADS, DIM, 64, dtype, dtype, dtype)
    capacity = StepCapacity(max_requests=REQUESTS, max_rows=8 * REQUESTS, max_seq_len=512)
    workspace = allocate_workspace(msa, shape, capacity, device=CPU)
    return MSASession(
        msa,
        kernels=KernelChoice(family=family, reason="tested", refused=()),
        scale=1.0,
        workspace=workspace if family == "triton" else None,
    )


class Server:
    """An MSA layer with its pages, vLLM's input buffers, and the groups that make metadata."""

    def __init__(self, family: Any = "triton") -> None:
        config = VllmConfig()
        config.model_config = SimpleNamespace(dtype=torch.float32)  # type: ignore[assignment]
        config.cache_config.block_size = 128
        with set_current_vllm_config(config):
            self.layer = M3SparseCacheLayer(
                session=session(family), num_kv_heads=KV_HEADS, head_dim=DIM, prefix="layer"
            )
        main, index = self.layer, self.layer.index_cache
        for cache, pages in zip((main, index), pages_of_a_cache(), strict=True):
            cache.bind_kv_cache(pages)
        self.buffers = InputBuffers(REQUESTS, 8 * REQUESTS, CPU)
        self.table = torch.zeros(REQUESTS, BLOCKS, dtype=torch.int32)
        self.slots = torch.full((8 * REQUESTS,), PADDING)
        self.groups = []
        for cache, name in ((main, "layer"), (index, index.prefix)):
            spec = cache.get_kv_cache_spec(config)
            group = AttentionGroup(cache.get_attn_backend(), [name], spec, 0)
            group.create_metadata_builders(config, CPU)
            self.groups.append(group)
        random = torch.Generator().manual_seed(0)
        self.norms = HeadNorms(*(torch.randn(DIM, generator=random) for _ in range(4)), eps=1e-6)
        self.angles = RowAngles(rotary_dim=64, theta=5e6)

    def dummy(self, num_reqs: int, num_tokens: int) -> None:
        """vLLM's inputs of a step that nobody asked for, as of a capture or of an idle rank."""
        InputBatch.make_dummy(num_reqs, num_tokens, self.buffers)
        self.table.zero_()
        self.slots.fill_(PADDING)

    def requests(self, lengths: list[int], *, rows: int) -> None:
        """Inputs of requests with those lengths, these rows among them."""
        count = len(lengths)
        self.dummy(count, count * rows)
        self.buffers.seq_lens[:count] = torch.tensor(lengths)
        self.table.copy_(1 + torch.arange(REQUESTS * BLOCKS).view(REQUESTS, BLOCKS))
        positions = [n - rows + i for n in lengths for i in range(rows)]
        self.buffers.positions[: len(positions)] = torch.tensor(positions)
        self.store_there(count, rows=rows)

    def store_there(self, count: int, *, rows: int) -> None:
        """Slots of the rows' positions, as vLLM's kernel computes them."""
        positions = self.buffers.positions[: count * rows]
        request = torch.arange(count).repeat_interleave(rows)
        page = self.table[request, positions // 128]
        self.slots[: count * rows].copy_(page * 128 + positions % 128)

    def metadata(self, count: int, *, rows: int, capturing: bool) -> dict[str, Any]:
        starts = self.buffers.query_start_loc[: count + 1]
        return build_attn_metadata(
            attn_groups=[self.groups],
            num_reqs=count,
            num_tokens=count * rows,
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts.clone(),
            max_query_len=rows,
            seq_lens=self.buffers.seq_lens[:count],
            max_seq_len=512,
            block_tables=[self.table[:count]],
            slot_mappings=self.slots[None, : count * rows],
            kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),  # type: ignore[arg-type]
            for_cudagraph_capture=capturing,
        )

    def run(self, metadata: dict[str, Any], hidden: Tensor) -> Tensor:
        """The layer as the model calls it; hidden holds all heads of each row."""
        counts = (HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1)
        *heads, index_k = hidden.split([n * DIM for n in counts], dim=1)
        heads = [part.unflatten(1, (-1, DIM)) for part in heads]
        angles = self.angles(self.buffers.positions[: len(hidden)])
        out, norms = torch.empty_like(heads[0]), self.norms
        weights = (norms.q, norms.k, norms.index_q, norms.index_k, norms.eps)
        # the function of the op: a graph holds what it launches
        attend: Any = m3_msa_attention
        with override_forward_context(ForwardContext({"layer": self.layer}, metadata, {})):
            attend(*heads, index_k, *weights, angles, out, "layer")
        return out

    def draft(self, metadata: dict[str, Any], hidden: Tensor, *, steps: int) -> list[Tensor]:
        """Further steps of a draft, each a token on: positions, lengths, slots, metadata."""
        count, out = len(hidden), []
        for step in range(1, steps):
            self.store_there(count, rows=1)
            for group in self.groups:
                group.update_draft_decode_metadata(metadata)
            out.append(self.run(metadata, hidden * step))
            self.buffers.positions[:count] += 1
            self.buffers.seq_lens[:count] += 1
        return out


def pages_of_a_cache() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    main = torch.randn(PAGES, KV_HEADS, 128, 2 * DIM, generator=random)
    return main, torch.randn(PAGES, 1, 128, DIM, generator=random)


def heads_of(rows: int, *, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, (HEADS + 3 * KV_HEADS + 1) * DIM, generator=random)


@pytest.mark.parametrize("steps", [2, 5])
def test_all_steps_of_a_draft_in_one_graph(steps: int) -> None:
    """Of several batch sizes, captured one after another; then each is replayed."""
    server, graphs = Server(), {}
    for count in (4, 2, 1):
        server.dummy(count, count)
        metadata = server.metadata(count, rows=1, capturing=True)
        hidden, graph = torch.zeros_like(heads_of(count, seed=0)), RecordedGraph()
        with graph.capture():
            out = server.draft(metadata, hidden, steps=steps)
        graphs[count] = (hidden, graph, out)
        del metadata
    gc.collect()
    for lengths in ([300, 127, 129, 400], [260, 31]):
        count = len(lengths)
        given = heads_of(count, seed=count)
        other = Server("reference")
        other.requests(lengths, rows=1)
        metadata = other.metadata(count, rows=1, capturing=False)
        expected = other.draft(metadata, given, steps=steps)
        hidden, graph, out = graphs[count]
        for cache, pages in zip(
            (server.layer, server.layer.index_cache), pages_of_a_cache(), strict=True
        ):
            cache.kv_cache.copy_(pages)
        server.requests(lengths, rows=1)
        hidden.copy_(given)
        graph.replay()
        assert len(out) == steps - 1
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_a_further_step_of_a_draft_divides_its_work_anew() -> None:
    server = Server()
    server.dummy(2, 2)
    metadata = server.metadata(2, rows=1, capturing=True)
    blocks = metadata["layer"].plan.work.cum_blocks
    before = blocks.clone()
    server.buffers.seq_lens[:2] += 200
    for group in server.groups:
        group.update_draft_decode_metadata(metadata)
    assert not torch.equal(blocks, before)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_a_captured_step_of_decoding_or_verifying(rows: int) -> None:
    """No drafted token beside each token, 1 or 5; with one request of which nothing is there."""
    server = Server()
    server.dummy(3, 3 * rows)
    metadata = server.metadata(3, rows=rows, capturing=True)
    hidden, graph = torch.zeros_like(heads_of(3 * rows, seed=0)), RecordedGraph()
    with graph.capture():
        out = server.run(metadata, hidden)
    # the next capture's
    server.dummy(1, rows)
    kept = server.metadata(1, rows=rows, capturing=True)
    del metadata
    gc.collect()
    lengths, given = [300, 129], heads_of(2 * rows, seed=1)
    other = Server("reference")
    other.requests(lengths, rows=rows)
    expected = other.run(other.metadata(2, rows=rows, capturing=False), given)
    server.requests(lengths, rows=rows)
    # a replay is planned as any step is
    server.metadata(3, rows=rows, capturing=False)
    hidden.zero_()
    hidden[: 2 * rows].copy_(given)
    graph.replay()
    assert kept
    assert torch.equal(out[: 2 * rows], expected)
    assert out.isfinite().all()


def test_the_recorder_sees_a_plan_that_nobody_owns() -> None:
    server = Server()
    server.dummy(2, 2)
    metadata = server.metadata(2, rows=1, capturing=True)
    # as a builder would that made row starts of its own
    step = metadata["layer"].plan.step
    object.__setattr__(step, "cu_seqlens_q", step.cu_seqlens_q.clone())
    hidden, graph = heads_of(2, seed=0), RecordedGraph()
    with graph.capture():
        server.run(metadata, hidden)
    del metadata, step
    gc.collect()
    with pytest.raises(FreedMemoryError, match=r"reads torch.int32 \[3\]"):
        graph.replay()


@pytest.mark.parametrize("rows", [1, 6])
def test_an_idle_rank_of_data_parallelism_stores_nothing(rows: int) -> None:
    """vLLM has it run a step of one request that nobody asked for, on page 0."""
    server = Server()
    before = [cache.kv_cache.clone() for cache in (server.layer, server.layer.index_cache)]
    server.dummy(1, rows)
    out = server.run(server.metadata(1, rows=rows, capturing=False), heads_of(rows, seed=1))
    assert out.isfinite().all()
    after = [cache.kv_cache for cache in (server.layer, server.layer.index_cache)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
