"""Captured steps read memory that lives as long as they do, and replay what an eager step computes.

SGLang captures one batch size after another and runs eager steps in between; a graph it captured
first must still find its tensors after all of them.
"""

from __future__ import annotations

import gc
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import MSAConfig
from m3_plugin.model.rope import RowAngles
from tests.integrations.recorded_graph import (
    FreedMemoryError,
    RecordedGraph,
    record_kernels,
)
from tests.integrations.sglang.steps import forward_batch, verify_step

DIM, HEADS, KV_HEADS, HIDDEN, PAGES, REQUESTS = 128, 4, 2, 32, 24, 6
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    record_kernels(monkeypatch, "m3_sglang.graphs.fill_page_table")


class Layer(nn.Module):
    """Projections, norms, angles and pages of one sparse layer."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        self.projection = normal(HIDDEN, (HEADS + 2 * KV_HEADS + KV_HEADS + 1) * DIM)
        self.norms = HeadNorms(*(normal(DIM) for _ in range(4)), eps=1e-6)
        self.angles = RowAngles(rotary_dim=64, theta=5e6)
        self.caches = MSACaches(
            normal(PAGES, KV_HEADS, 128, DIM),
            normal(PAGES, KV_HEADS, 128, DIM),
            normal(PAGES, 128, DIM),
        )

    def head_norms(self) -> HeadNorms:
        return self.norms

    def restore_pages(self) -> None:
        """As they were before any step, in the same memory."""
        for name in ("k_pages", "v_pages", "index_k_pages"):
            getattr(self.caches, name).copy_(getattr(Layer().caches, name))


def session() -> MSASession:
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
    capacity = StepCapacity(max_requests=REQUESTS, max_rows=8 * REQUESTS, max_seq_len=4 * 128)
    return MSASession(
        msa,
        kernels=KernelChoice(family="triton", reason="tested", refused=()),
        scale=1.0,
        workspace=allocate_workspace(msa, shape, capacity, device=CPU),
    )


def backend(layer: Layer, *, max_bs: int, max_rows: int) -> Any:
    """Our backend for that layer, with buffers for graphs."""
    from m3_sglang.backend import M3AttentionBackend
    from m3_sglang.speculation import NoDenseLayers

    made: Any = object.__new__(M3AttentionBackend)
    made.dense = NoDenseLayers()
    pages = torch.arange(PAGES).view(REQUESTS, -1)
    slots = pages[..., None] * 128 + torch.arange(128)
    made.req_to_token = slots.flatten(1).to(torch.int32)
    made.session = session()
    made.plan = made.graph_buffers = None
    made.layers = {3: layer}
    made.pool = SimpleNamespace(get_key_buffer=lambda layer: None)
    made.caches = {3: layer.caches}
    made.init_cuda_graph_state(max_bs, max_rows)
    return made


ATTENTION = SimpleNamespace(
    layer_id=3,
    tp_q_head_num=HEADS,
    tp_k_head_num=KV_HEADS,
    tp_v_head_num=KV_HEADS,
    head_dim=DIM,
    v_head_dim=DIM,
)


def run(made: Any, layer: Layer, step: Any, hidden: Tensor) -> Tensor:
    """What a model's layer does with the backend."""
    widths = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, DIM]
    q, k, v, index_q, index_k = (hidden @ layer.projection).split(widths, dim=1)
    cos_sin = layer.angles(step.positions)
    index_q = index_q.unflatten(1, (KV_HEADS, DIM))
    return made.forward(q, k, v, ATTENTION, step, idx_q=index_q, idx_k=index_k, cos_sin=cos_sin)[1]


def step_of(kind: str, lengths: list[int], *, query_len: int) -> Any:
    """A step whose requests have those lengths, the rows of the step included in no one's."""
    rows = query_len * len(lengths)
    first = [(4 * 128 * r + n - (kind == "DECODE")) for r, n in enumerate(lengths)]
    slots = torch.tensor([slot + i for slot in first for i in range(query_len)])
    if kind == "DECODE":
        step = forward_batch("DECODE", seq_lens=lengths, out_cache_loc=slots)
    elif kind == "TARGET_VERIFY":
        step = verify_step(seq_lens=lengths, query_len=query_len, out_cache_loc=slots)
    else:
        total = [n + query_len for n in lengths]
        step = forward_batch(
            kind,
            seq_lens=total,
            out_cache_loc=slots,
            extend_seq_lens=torch.full((len(lengths),), query_len),
            extend_seq_lens_cpu=[query_len] * len(lengths),
        )
    step.input_ids = torch.zeros(rows, dtype=torch.long)
    step.positions = slots % (4 * 128)
    return step


class Server:
    """SGLang's static inputs of one captured batch size, and the graph on them."""

    def __init__(self, made: Any, layer: Layer, kind: str, *, num_reqs: int, query_len: int):
        self.made, self.layer, self.kind, self.query_len = made, layer, kind, query_len
        self.step = step_of(kind, [1] * num_reqs, query_len=query_len)
        self.hidden = torch.zeros(num_reqs * query_len, HIDDEN)
        self.graph = RecordedGraph()
        # the order of SGLang's DecodeCudaGraphRunner.capture_one_shape
        made.init_forward_metadata_out_graph(self.step, in_capture=True)
        with self.graph.capture():
            made.init_forward_metadata_in_graph(self.step)
            self.out = run(made, layer, self.step, self.hidden)

    def serve(self, lengths: list[int], hidden: Tensor) -> Tensor:
        live = step_of(self.kind, lengths, query_len=self.query_len)
        for name in ("seq_lens", "req_pool_indices", "out_cache_loc", "positions"):
            getattr(self.step, name).copy_(getattr(live, name))
        self.hidden.copy_(hidden)
        self.made.init_forward_metadata_out_graph(self.step)
        self.graph.replay()
        return self.out


def eager(lengths: list[int], hidden: Tensor, *, kind: str, query_len: int) -> Tensor:
    """The same step on a server of its own, in plain torch."""
    layer = Layer()
    made = backend(layer, max_bs=1, max_rows=1)
    made.session = MSASession(
        made.session.msa,
        kernels=KernelChoice(family="reference", reason="tested", refused=()),
        scale=1.0,
    )
    step = step_of(kind, lengths, query_len=query_len)
    made.init_forward_metadata(step)
    return run(made, layer, step, hidden)


# verified and extended rows of 1 drafting step and of 5
ROWS = [
    ("DECODE", 1),
    ("TARGET_VERIFY", 2),
    ("TARGET_VERIFY", 6),
    ("DRAFT_EXTEND_V2", 2),
    ("DRAFT_EXTEND_V2", 6),
]


@pytest.mark.parametrize(("kind", "query_len"), ROWS)
def test_the_first_graph_finds_its_memory_after_all_others(kind: str, query_len: int) -> None:
    layer = Layer()
    made = backend(layer, max_bs=4, max_rows=4 * query_len)
    servers = {
        count: Server(made, layer, kind, num_reqs=count, query_len=query_len) for count in (4, 2, 1)
    }
    # eager steps in between give the plan away, too
    made.init_forward_metadata(step_of("DECODE", [5, 6, 7], query_len=1))
    gc.collect()
    random = torch.Generator().manual_seed(1)
    for count, lengths in ((4, [300, 127, 129, 400]), (2, [260, 31]), (4, [128, 2, 385, 256])):
        layer.restore_pages()
        hidden = torch.randn(count * query_len, HIDDEN, generator=random)
        expected = eager(lengths, hidden, kind=kind, query_len=query_len)
        found = servers[count].serve(lengths, hidden)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "query_len"), [("DECODE", 1), ("TARGET_VERIFY", 2), ("DRAFT_EXTEND_V2", 4)]
)
def test_a_graph_with_padded_requests_serves_the_others(kind: str, query_len: int) -> None:
    """SGLang gives them length 1, row 0 and slot 0, whatever the number of their rows."""
    layer = Layer()
    made = backend(layer, max_bs=4, max_rows=4 * query_len)
    server = Server(made, layer, kind, num_reqs=4, query_len=query_len)
    lengths = [300, 129]
    hidden = torch.randn(2 * query_len, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = eager(
        [9, *lengths], torch.cat([hidden[:query_len], hidden]), kind=kind, query_len=query_len
    )
    # request 0 of the pool is nobody's: the live ones are 1 and 2, as on a server
    live = step_of(kind, [9, *lengths], query_len=query_len)
    layer.restore_pages()
    server.step.seq_lens.fill_(made.get_cuda_graph_seq_len_fill_value())
    for name in ("req_pool_indices", "out_cache_loc", "positions"):
        getattr(server.step, name).zero_()
    server.step.seq_lens[:2].copy_(live.seq_lens[1:])
    server.step.req_pool_indices[:2].copy_(live.req_pool_indices[1:])
    for name in ("out_cache_loc", "positions"):
        getattr(server.step, name)[: 2 * query_len].copy_(getattr(live, name)[query_len:])
    server.hidden.zero_()
    server.hidden[: 2 * query_len].copy_(hidden)
    server.graph.replay()
    # the projections of three requests and of four round otherwise
    torch.testing.assert_close(server.out[: 2 * query_len], expected[query_len:])
    assert server.out.isfinite().all()
    assert made.plan is not None
    # no row of a padded request lies before position 0
    assert (made.plan.batch.seq_lens >= query_len).all()


def test_a_replay_reads_of_the_page_table_what_its_lengths_need() -> None:
    layer = Layer()
    made = backend(layer, max_bs=4, max_rows=4)
    server = Server(made, layer, "DECODE", num_reqs=4, query_len=1)
    table = made.graph_buffers.page_table
    table.fill_(-7)
    server.serve([300, 127, 128, 129], torch.zeros(4, HIDDEN))
    assert [int((line != -7).sum()) for line in table] == [3, 1, 1, 2]


class DraftServer:
    """SGLang's static inputs of a captured round of an MTP module, and the graph on them."""

    def __init__(self, layer: Layer, *, num_steps: int, first: Any):
        self.layer = layer
        self.backends = drafting(layer, num_steps=num_steps, first=first)
        self.backends.init_cuda_graph_state(4, 4)
        self.graphs: dict[int, tuple[Any, Tensor, RecordedGraph, list[Tensor]]] = {}

    def capture(self, num_reqs: int) -> None:
        """In the order of SGLang's EAGLEDraftCudaGraphRunner."""
        step = draft_round([1] * num_reqs, num_steps=self.backends.num_steps)
        hidden = torch.zeros(num_reqs, HIDDEN)
        graph = RecordedGraph()
        self.backends.init_forward_metadata_out_graph(step, in_capture=True)
        with graph.capture():
            self.backends.init_forward_metadata_in_graph(step)
            out = run_round(self.backends, self.layer, step, hidden)
        self.graphs[num_reqs] = (step, hidden, graph, out)

    def serve(self, lengths: list[int], given: Tensor) -> list[Tensor]:
        step, hidden, graph, out = self.graphs[len(lengths)]
        live = draft_round(lengths, num_steps=self.backends.num_steps)
        for name in ("seq_lens", "req_pool_indices", "out_cache_loc", "positions"):
            getattr(step, name).copy_(getattr(live, name))
        hidden.copy_(given)
        self.backends.init_forward_metadata_out_graph(step)
        graph.replay()
        return out


def drafting(layer: Layer, *, num_steps: int, first: Any = None) -> Any:
    """Our backends of the steps of a round, on one scratch as a worker makes them."""
    from m3_sglang.session import beside
    from m3_sglang.speculation import M3DraftBackends

    made: Any = object.__new__(M3DraftBackends)
    made.num_steps = num_steps
    made.attn_backends = [backend(layer, max_bs=1, max_rows=1) for _ in range(num_steps - 1)]
    for each in made.attn_backends:
        if first is None:
            choice = KernelChoice(family="reference", reason="tested", refused=())
            each.session = MSASession(each.session.msa, kernels=choice, scale=1.0)
        else:
            each.session = beside(first)
    return made


def draft_round(lengths: list[int], *, num_steps: int) -> Any:
    """A round behind requests of those lengths: one slot for each step of each request."""
    slots = [4 * 128 * r + n + i for r, n in enumerate(lengths) for i in range(num_steps)]
    step = forward_batch("DECODE", seq_lens=lengths, out_cache_loc=torch.tensor(slots))
    step.positions = torch.tensor(lengths)
    return step


def run_round(backends: Any, layer: Layer, step: Any, hidden: Tensor) -> list[Tensor]:
    """What a draft model's layer does in the steps after the first, each on the one before."""
    out = []
    for i, made in enumerate(backends.attn_backends):
        live = SimpleNamespace(positions=step.positions + i)
        out.append(run(made, layer, live, hidden * (i + 1)))
    return out


@pytest.mark.parametrize("num_steps", [2, 5])
def test_rounds_of_drafting_find_their_memory_after_all_others(num_steps: int) -> None:
    """One step drafts with the extend step alone; each further one has a backend of its own."""
    layer = Layer()
    server = DraftServer(layer, num_steps=num_steps, first=session())
    for count in (4, 2, 1):
        server.capture(count)
    # eager rounds in between, of fewer requests
    server.backends.init_forward_metadata(draft_round([5, 6, 7], num_steps=num_steps))
    gc.collect()
    random = torch.Generator().manual_seed(1)
    for lengths in ([300, 126, 129, 400], [260, 31]):
        layer.restore_pages()
        hidden = torch.randn(len(lengths), HIDDEN, generator=random)
        other = Layer()
        eagerly = drafting(other, num_steps=num_steps)
        live = draft_round(lengths, num_steps=num_steps)
        eagerly.init_forward_metadata(live)
        expected = run_round(eagerly, other, live, hidden)
        found = server.serve(lengths, hidden)
        assert len(found) == num_steps - 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_recorder_sees_memory_that_nobody_owns() -> None:
    """As a step whose row starts are the plan's alone: the next capture frees them."""
    layer = Layer()
    made = backend(layer, max_bs=4, max_rows=4)
    first = Server(made, layer, "DECODE", num_reqs=4, query_len=1)
    made.graph_buffers.starts.clear()
    Server(made, layer, "DECODE", num_reqs=2, query_len=1)
    with pytest.raises(FreedMemoryError, match=r"fill_work_plan reads torch.int32 \[5\]"):
        first.serve([9, 8, 7, 6], torch.zeros(4, HIDDEN))


def test_sglang_captures_as_recorded_here() -> None:
    """One batch size after another, metadata first; a replay prepares nothing but its inputs."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    one = inspect.getsource(DecodeCudaGraphRunner.capture_one_shape)
    out = one.index("attn_backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)")
    assert out < one.index("self.backend.capture_one(")
    assert "capture_inputs=None" in one
    assert "reversed(self.capture_bs)" in inspect.getsource(
        DecodeCudaGraphRunner._capture_one_stream
    )
