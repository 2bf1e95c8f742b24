"""Dense layers on a CPU through our kernel, in the place of SGLang's torch-native attention.

SGLang's gathers keys one by one and computes a whole square for every chunk of a prompt. Its cache
pool stores keys as before; our kernel reads the pages as they lie there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import AttentionType

from m3_kernels.capability import Implementation
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.dense import DenseAttention, DenseChoice, choose_dense
from m3_plugin.settings import Settings
from m3_sglang.batch import msa_batch, paged
from m3_sglang.plain_dense import PlainDenseBackend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor


def dense_choice(runner: Any) -> DenseChoice:
    """Whether our kernel attends in this runner's dense layers."""
    return choose_dense(
        torch.device(runner.device).type,
        cache_dtype=runner.kv_cache_dtype,
        settings=Settings.from_environment(),
    )


def cpu_dense_backend(runner: Any, *, drafted: int = 0) -> PlainDenseBackend:
    """The backend of dense layers on a CPU, for every kind of step.

    Parameters
    ----------
    drafted : in a drafting step, tokens drafted before this one plus one; 0 in any other
    """
    choice = dense_choice(runner)
    if choice.backend is None:
        return PlainDenseBackend(runner, drafted=drafted)
    return M3DenseBackend(runner, kernel=choice.backend, drafted=drafted)


class M3DenseBackend(PlainDenseBackend):
    """Our kernel for causal attention over everything; SGLang's own for layers of another kind.

    Parameters
    ----------
    runner : SGLang's model runner
    kernel : of the op `dense_attention`
    drafted : in a drafting step, tokens drafted before this one plus one; 0 in any other
    """

    def __init__(self, runner: Any, *, kernel: Implementation, drafted: int = 0) -> None:
        super().__init__(runner, drafted=drafted)
        self.dense = DenseAttention(kernel, settings=Settings.from_environment())
        self.step: MSABatch | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        # the first dense layer describes the step for all of them
        self.step = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        if forward_batch.forward_mode.is_idle() or kwargs or not is_plain(layer):
            return super().forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        if self.step is None:
            assert self.req_to_token_pool is not None
            self.step = msa_batch(
                forward_batch,
                req_to_token=self.req_to_token_pool.req_to_token,
                drafted=self.drafted,
            )
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(q)
        self.dense.attend(
            self.step,
            q,
            paged(self.token_to_kv_pool.get_key_buffer(layer.layer_id)),
            paged(self.token_to_kv_pool.get_value_buffer(layer.layer_id)),
            scale=layer.scaling,
            out=out,
        )
        return out.flatten(1)


def is_plain(layer: RadixAttention) -> bool:
    """Whether a layer is causal attention over everything, which is all that ours computes."""
    window = layer.sliding_window_size
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.qk_head_dim == layer.v_head_dim
        and not layer.logit_cap
        and (window is None or window <= -1)
    )
