"""SGLang's attention backend `msa`: MSA layers through MSASession, dense ones by a dense backend.

K, V and index keys live in SGLang's `MiniMaxSparseKVPool`. Index keys share the slots of K and V
there, so that paged allocation, radix cache, eviction and retraction need nothing from us.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from m3_kernels.index_pages import views_of
from m3_kernels.paged import MSACaches
from m3_plugin.attention.backends import INDEX_KEYS
from m3_plugin.attention.session import MSAPlan
from m3_plugin.host.presence import PluginRefusal, attestation
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_plugin.settings import Settings
from m3_sglang.attention import M3DenseAttention, M3SparseAttention
from m3_sglang.batch import UniformStep, captured_step, msa_batch, paged
from m3_sglang.compat import (
    attention_parallel_size,
    read_config,
    read_draft_config,
    resolved,
    sglang_version,
)
from m3_sglang.cpu_dense import cpu_dense_backend
from m3_sglang.graphs import GraphBuffers
from m3_sglang.hooks import WRAPPER, wrapper_hook_is_applied
from m3_sglang.options import require_served
from m3_sglang.ours import MODEL_PACKAGE, is_ours
from m3_sglang.plain_dense import PlainDenseBackend
from m3_sglang.session import index_dtype, worker_session

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.speculative.spec_info import SpecInput
    from torch import Tensor

logger = logging.getLogger(__name__)


def create_backend(runner: Any) -> AttentionBackend:
    """Backend `msa` around the dense backend SGLang would choose for this machine.

    A dense draft model beside an M3 target is started under the target's name; it gets the dense
    backend alone.
    """
    dense = dense_backend(runner)
    if runner.is_draft_worker and not is_ours(runner.model_config.hf_config):
        return dense
    return around(dense, runner)


def around(dense: AttentionBackend, runner: Any) -> AttentionBackend:
    """Our backend around a dense one; where no layer of this process is sparse, that one alone."""
    if not runner.is_draft_worker and not has_sparse_layers(runner):
        return dense
    return attested(M3AttentionBackend(runner, dense=dense), runner)


def has_sparse_layers(runner: Any) -> bool:
    """Whether MSA layers are in this process; a pipeline stage may have dense ones alone."""
    if read_config(runner.model_config.hf_config).msa is None:
        return False
    # another class than ours is refused where our backend meets it
    if not type(runner.model).__module__.startswith(f"{MODEL_PACKAGE}."):
        return True
    return any(isinstance(module, M3SparseAttention) for module in runner.model.modules())


def attested(backend: M3AttentionBackend, runner: Any) -> M3AttentionBackend:
    """Log that this runner's model is ours, and what runs its layers."""
    modules = list(runner.model.modules())
    sparse, dense = (
        sum(isinstance(module, kind) for module in modules)
        for kind in (M3SparseAttention, M3DenseAttention)
    )
    logger.info(
        "%s",
        attestation(
            host="SGLang",
            host_version=sglang_version(),
            kernels=backend.session.kernels.describe(),
            detail=f"{'drafting for' if runner.is_draft_worker else 'serving'} MiniMax-M3 with "
            f"{sparse} MSA and {dense} dense attention layers "
            f"in this process, dense ones on {type(backend.dense).__name__}",
        ),
    )
    return backend


def dense_backend(runner: Any) -> AttentionBackend:
    """For dense attention ours on a CPU, else the host's own choice; takes part in speculation."""
    if torch.device(runner.device).type == "cpu":
        return cpu_dense_backend(runner)
    return speculating(runner, ATTENTION_BACKENDS[dense_backend_name(runner)](runner))


def speculating(runner: Any, dense: AttentionBackend) -> AttentionBackend:
    """The same backend, for torch-native attention one that knows the steps of speculation."""
    return PlainDenseBackend(runner) if type(dense) is TorchNativeAttnBackend else dense


def dense_backend_name(runner: Any) -> str:
    """The host's own choice for dense attention, were there no sparse layers."""
    if torch.device(runner.device).type == "cpu":
        return "torch_native"
    from sglang.srt.arg_groups.overrides import get_default_attn_backend

    name = get_default_attn_backend(runner.server_args, False, runner.model_config)
    if resolved(runner.server_args).speculative_algorithm is not None:
        name = _speculating_name() or name
    # SGLang applies these two rules by the name that was asked for, which is ours
    if name == "fa3" and runner.kv_cache_dtype == torch.float8_e5m2:
        return "triton"
    if name == "trtllm_mha" and not has_grouped_heads(runner.model_config):
        return "fa4"
    return name


def _speculating_name() -> str | None:
    """What SGLang chooses on this chip without speculation; None for any other chip's choice.

    With pages of several tokens it leaves these backends out because of draft trees. Ours are
    chains, and its own provider for M3 keeps them.
    """
    from sglang.srt.runtime_context import get_platform

    if get_platform().is_hopper_with_cuda_12_3:
        return "fa3"
    return "trtllm_mha" if get_platform().is_sm100 else None


def has_grouped_heads(model_config: Any) -> bool:
    """Whether several query heads share a KV head on each rank, which trtllm_mha needs here."""
    size = attention_parallel_size()
    return model_config.num_attention_heads // size > model_config.get_num_kv_heads(size)


class M3AttentionBackend(AttentionBackend):
    """Plans each step once for all MSA layers; hands dense layers to the backend it holds.

    Parameters
    ----------
    runner : SGLang's model runner, with model and cache pool already built
    dense : the host's backend for layers without an index branch

    Raises
    ------
    PluginRefusal : SGLang is only half ours (model, hook or pool are its own).
    """

    # a trial step of more requests than the pool has would be larger than our workspace
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(self, runner: Any, *, dense: AttentionBackend) -> None:
        super().__init__()
        require_served(runner.server_args)
        require_complete_presence(runner)
        drafting = runner.is_draft_worker
        read = read_draft_config if drafting else read_config
        config = read(runner.model_config.hf_config)
        session = worker_session(config, runner)
        if session is None:
            raise PluginRefusal(
                "no layer of this checkpoint is sparse: it needs the dense backend alone"
            )
        self.config = config
        self.dense = dense
        self.pool = runner.token_to_kv_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        # SGLang reads it where it knows no lengths
        self.max_context_len = self.req_to_token.shape[1]
        self.session = session
        self.plan: MSAPlan | None = None
        self.caches: dict[int, MSACaches] = {}
        self.layers = {
            module.attn.layer_id: module
            for module in runner.model.modules()
            if isinstance(module, M3SparseAttention)
        }
        self.graph_buffers: GraphBuffers | None = None
        if drafting:
            # selections are recorded of the target alone
            session.recorder = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager step, for both kinds of layer."""
        if forward_batch.forward_mode.is_idle():
            self.plan = None
            return
        self.dense.init_forward_metadata(forward_batch)
        self.plan = self.session.plan(msa_batch(forward_batch, req_to_token=self.req_to_token))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured steps of up to `max_bs` requests read."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)
        self.graph_buffers = GraphBuffers.allocate(
            self.req_to_token, num_reqs=max_bs, num_rows=max_num_tokens
        )

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before a graph is captured: a plan on buffers that stay. Before a replay: nothing."""
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if in_capture:
            self.plan_capture(self.captured_step(forward_batch), num_reqs=forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Recorded as the graph's first operations: refill the buffers from SGLang's own."""
        self.dense.init_forward_metadata_in_graph(forward_batch)
        assert forward_batch.out_cache_loc is not None
        self.refill_capture(
            forward_batch,
            self.captured_step(forward_batch),
            slots=forward_batch.out_cache_loc,
        )

    def captured_step(self, forward_batch: ForwardBatch) -> UniformStep:
        """The step as graphs are captured for.

        Raises
        ------
        NotImplementedError : requests bring lengths of their own.
        """
        step = captured_step(forward_batch)
        if step is None:
            raise NotImplementedError(
                f"m3-plugin captures no graph of {forward_batch.forward_mode.name} steps: they "
                "stay eager; start SGLang with --cuda-graph-backend-prefill disabled"
            )
        return step

    def plan_capture(self, step: UniformStep, *, num_reqs: int) -> None:
        """Plan a step on the buffers of `init_cuda_graph_state`; outside the graph."""
        if self.graph_buffers is None:
            raise RuntimeError("init_cuda_graph_state must be called before a graph is captured")
        self.plan = self.session.plan(self.graph_buffers.batch(step, num_reqs=num_reqs))

    def refill_capture(
        self, forward_batch: ForwardBatch, step: UniformStep, *, slots: Tensor
    ) -> None:
        """Refill the buffers of the step planned last; inside the graph."""
        assert self.graph_buffers is not None
        assert self.plan is not None
        self.graph_buffers.refill(
            self.plan.batch,
            step,
            seq_lens=forward_batch.seq_lens,
            rows=forward_batch.req_pool_indices,
            slots=slots,
        )
        # recorded after the lengths it divides the work by
        self.plan = self.session.plan(self.plan.batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        # a padded request sees one key, as in SGLang's own backends
        return 1

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        return 1

    def on_after_cuda_graph_warmup(self) -> None:
        self.dense.on_after_cuda_graph_warmup()

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Ours are read by the graph's first operations, as SGLang assumes by default."""
        ends = (super().shared_read_ends(fm), self.dense.shared_read_ends(fm))
        return SharedReadEnds.max_of(ends)

    @property
    def verify_mask(self) -> Any:
        # a chain's rows see a prefix each, so that MSA layers need no mask; dense ones may
        return self.dense.verify_mask

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: SpecInput, cuda_graph_bs: int | None
    ) -> None:
        self.dense.update_verify_buffers_to_fill_after_draft(spec_info, cuda_graph_bs)

    @property
    def needs_cpu_seq_lens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # each step's copy of the lengths to the host waits for the device; MSA layers need none
        return self.dense.needs_cpu_seq_lens

    def support_triton(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.dense.support_triton()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        *,
        idx_q: Tensor | None = None,
        idx_k: Tensor | None = None,
        cos_sin: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend for one layer; a layer that brings `idx_q` and `idx_k` is an MSA layer.

        Parameters
        ----------
        q, k, v : [rows, heads * head_dim] or [rows, heads, head_dim]; of a dense layer after norm
            and RoPE, of an MSA layer before
        idx_q : [rows, index heads, index_dim]; the name is SGLang's, which looks for it
        idx_k : [rows, index_dim]
        cos_sin : [rows, rotary_dim] at least, of an MSA layer

        Returns
        -------
        [rows, heads * head_dim]; for an MSA layer (None, that), as SGLang expects beside `idx_q`
        """
        if idx_q is None:
            return self.dense.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        assert idx_k is not None
        assert cos_sin is not None
        if not save_kv_cache:
            raise NotImplementedError("an MSA layer always stores its keys before reading them")
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        if self.plan is None:
            # an idle rank's rows may still meet those of others
            return None, torch.zeros_like(q).flatten(1)
        out = torch.empty_like(q)
        self.session.run(
            self.plan,
            q,
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            idx_q,
            idx_k,
            norms=self.layers[layer.layer_id].head_norms(),
            cos_sin=cos_sin[: q.shape[0]],
            caches=self._caches(layer.layer_id),
            out=out,
        )
        return None, out.flatten(1)

    def _caches(self, layer_id: int) -> MSACaches:
        """Pages of one layer as views of SGLang's pool, whose rows are slots: page * 128 + offset.

        [slots, heads, dim] -> [pages, heads, 128, dim]; the index pool has a single head.
        """
        # asked for in every step: with HiCache it waits until the layer's pages are back
        keys = self.pool.get_key_buffer(layer_id)
        if layer_id not in self.caches:
            k_pages = paged(keys)
            scales = self.layers[layer_id].scales_for(k_pages.dtype)
            index = views_of(paged(self.pool.get_index_k_buffer(layer_id)).squeeze(1))
            self.caches[layer_id] = MSACaches(
                k_pages=k_pages,
                v_pages=paged(self.pool.get_value_buffer(layer_id)),
                index_k_pages=index.keys,
                k_scale=scales.k,
                v_scale=scales.v,
                index_k_scales=index.scales,
                index_k_low=index.low,
            )
        return self.caches[layer_id]


def require_complete_presence(runner: Any) -> None:
    """Refuse to run beside pieces of SGLang's own MiniMax-M3.

    SGLang logs and passes over an import error in our model package, a hook target it does not
    find, and another plugin that replaces what we registered. Each would leave a server that is
    half ours.

    Raises
    ------
    PluginRefusal : names the piece that is not ours, or not what we need.
    """
    model = type(runner.model)
    if not model.__module__.startswith(f"{MODEL_PACKAGE}."):
        raise PluginRefusal(
            f"the model was built by {model.__module__}.{model.__qualname__}, not by m3-plugin; "
            f"an import error of {MODEL_PACKAGE} is in the log above, or another plugin owns it"
        )
    if not wrapper_hook_is_applied():
        raise PluginRefusal(f"SGLang did not apply our hook: {WRAPPER} is gone or was replaced")
    missing = [
        name
        for name in ("get_key_buffer", "get_value_buffer", "get_index_k_buffer")
        if not hasattr(runner.token_to_kv_pool, name)
    ]
    if missing:
        raise PluginRefusal(
            f"SGLang's cache pool {type(runner.token_to_kv_pool).__name__} keeps no index keys "
            f"(no {', '.join(missing)})"
        )
    require_index_dtype(runner)
    if runner.page_size != PAGED_BLOCK_SIZE:
        raise PluginRefusal(
            f"page size must be {PAGED_BLOCK_SIZE} (one sparse block per page); "
            f"got {runner.page_size}"
        )


def require_index_dtype(runner: Any) -> None:
    """Refuse a pool whose index keys are not as asked: SGLang only logs a vanished hook target.

    Raises
    ------
    PluginRefusal : a dtype was asked for, and this SGLang made the pool otherwise.
    """
    dtype, asked = index_dtype(runner), Settings.from_environment().index_keys
    if asked != "auto" and dtype != INDEX_KEYS[asked]:
        raise PluginRefusal(
            f"M3_PLUGIN_INDEX_KEYS={asked} needs SGLang 0.5.21 or later, whose cache pool asks for "
            f"the dtype of index keys; this one, {sglang_version()}, keeps them as {dtype}"
        )
