"""Attention of draft models: one backend per drafting step, MSA for MTP, the host's for others.

SGLang keeps closed lists of backends which may draft, and whose extend step it captures in graphs;
where it consults them, hooks of ours answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.speculative.eagle_utils import per_step_draft_out_cache_loc

from m3_sglang import cpu_repairs
from m3_sglang.backend import M3AttentionBackend, dense_backend_name
from m3_sglang.batch import UniformStep, msa_batch
from m3_sglang.cpu_dense import cpu_dense_backend
from m3_sglang.hooks import apply_around
from m3_sglang.options import BACKEND_NAME
from m3_sglang.ours import is_ours

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor

logger = logging.getLogger(__name__)


class NoDenseLayers(AttentionBackend):
    """The dense backend of a draft model whose only layer is sparse: nothing to plan or keep."""

    needs_cpu_seq_lens = False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Nothing: no layer reads it."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: no layer reads it."""

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Nothing: no layer reads it."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Nothing: no layer reads it."""


class M3DraftBackends:
    """Backends of the steps after the first: step i reads keys that steps before it have stored.

    Parameters
    ----------
    runner : SGLang's model runner of the draft model
    num_steps : tokens drafted per round; the first comes with the draft model's extend step
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, *, num_steps: int) -> None:
        self.num_steps = num_steps
        self.attn_backends = [
            M3AttentionBackend(runner, dense=NoDenseLayers()) for _ in range(num_steps - 1)
        ]

    def slots(self, forward_batch: ForwardBatch) -> Tensor:
        """Slots each step writes: int64 [num_steps, requests]."""
        assert forward_batch.out_cache_loc is not None
        # SGLang's is a transposed view as soon as there are two requests
        return per_step_draft_out_cache_loc(
            forward_batch.out_cache_loc, forward_batch.batch_size, 1, self.num_steps
        ).contiguous()

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan all steps of an eager round."""
        slots = self.slots(forward_batch)
        for i, backend in enumerate(self.attn_backends):
            batch = msa_batch(
                forward_batch,
                req_to_token=backend.req_to_token,
                drafted=i + 1,
                slot_mapping=slots[i],
            )
            backend.plan = backend.session.plan(batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for backend in self.attn_backends:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before a graph is captured: plans on buffers that stay. Before a replay: nothing."""
        if not in_capture:
            return
        for i, backend in enumerate(self.attn_backends):
            backend.plan_capture(drafting_step(i), num_reqs=forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Recorded as the graph's first operations: refill the buffers of all steps."""
        slots = self.slots(forward_batch)
        for i, backend in enumerate(self.attn_backends):
            backend.refill_capture(forward_batch, drafting_step(i), slots=slots[i])


def drafting_step(index: int) -> UniformStep:
    """Step `index` sees what steps 0 to `index` have stored beyond SGLang's `seq_lens`."""
    return UniformStep(query_len=1, unseen=index + 1)


class PlainDraftBackends:
    """The same for a dense draft model on a CPU, where SGLang has no backend that drafts."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any, *, num_steps: int) -> None:
        self.attn_backends = [
            cpu_dense_backend(runner, drafted=i + 1) for i in range(num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def create_decode_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """AROUND hook on `DraftBackendFactory.create_decode_backend`."""
    runner, num_steps = factory.draft_model_runner, factory.speculative_num_steps
    if num_steps <= 1:
        return original(factory)
    if is_ours(runner.model_config.hf_config):
        return _named(M3DraftBackends(runner, num_steps=num_steps))
    if torch.device(runner.device).type == "cpu":
        return _named(PlainDraftBackends(runner, num_steps=num_steps))
    return original(_with_dense_name(factory))


def create_draft_extend_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """AROUND hook on `DraftBackendFactory.create_draft_extend_backend`."""
    runner = factory.draft_model_runner
    if is_ours(runner.model_config.hf_config):
        return _named(M3AttentionBackend(runner, dense=NoDenseLayers()))
    if torch.device(runner.device).type == "cpu":
        return _named(cpu_dense_backend(runner))
    return original(_with_dense_name(factory))


def capture_graphs(original: Callable[[Any], None], worker: Any) -> None:
    """AROUND hook on `EagleDraftWorker._capture_cuda_graphs`: the extend step of an MTP module too.

    SGLang captures it for backends on a list of its own. A step that cannot be replayed, such as a
    prompt's, stays eager (`EAGLEDraftExtendCudaGraphRunner.can_run_graph`).
    """
    original(worker)
    if not extend_step_is_left_out(worker):
        return
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import (
        EAGLEDraftExtendCudaGraphRunner,
    )

    worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)
    logger.info("m3-plugin: the extend step of the MTP module is captured in CUDA graphs")


def extend_step_is_left_out(worker: Any) -> bool:
    """Whether SGLang captured the draft's steps, or would have, but not the extend step of ours."""
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )

    return (
        torch.device(worker.device).type == "cuda"
        and isinstance(worker.draft_extend_attn_backend, M3AttentionBackend)
        and worker.cuda_graph_runner_for_draft_extend is None
        and not envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get()
        and not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)
    )


def _with_dense_name(factory: Any) -> Any:
    """A dense draft model beside a target on `msa` takes what it would take alone."""
    if factory.draft_attn_backend is None:
        factory.draft_attn_backend = dense_backend_name(factory.draft_model_runner)
    return factory


def _named(backend: Any) -> Any:
    """What SGLang notes on every draft backend it creates."""
    for each in (backend, *getattr(backend, "attn_backends", ())):
        if isinstance(each, AttentionBackend):
            each.prefill_attention_backend_str = BACKEND_NAME
            each.decode_attention_backend_str = BACKEND_NAME
    return backend


_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
HOOKS = {
    f"{_FACTORY}.create_decode_backend": create_decode_backend,
    f"{_FACTORY}.create_draft_extend_backend": create_draft_extend_backend,
    "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs": capture_graphs,
}


def prepare_speculation(*, device_type: str) -> None:
    """Apply the hooks that only speculation needs, before SGLang makes its draft model.

    Raises
    ------
    PluginRefusal : a hook's target is gone.
    """
    apply_around(HOOKS, needed_for="speculative decoding (--speculative-algorithm)")
    if device_type == "cpu":
        cpu_repairs.put_in_place()
