"""SGLang's torch-native attention in the steps of speculation, which it does not know.

It knows prompts and decoding. A verified chain is a prompt's chunk behind a prefix, and a drafting
step is decoding at a later position, so that other lengths are all it needs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from m3_sglang.batch import uniform_step

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from torch import Tensor


class PlainDenseBackend(TorchNativeAttnBackend):
    """Torch-native attention which also verifies chains and drafts.

    Parameters
    ----------
    drafted : in a drafting step, tokens drafted before this one plus one; 0 in any other
    """

    def __init__(self, runner: Any, *, drafted: int = 0) -> None:
        super().__init__(runner)
        self.drafted = drafted

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
        step = plain_step(forward_batch, drafted=self.drafted)
        return super().forward(q, k, v, layer, step, save_kv_cache, **kwargs)


def plain_step(forward_batch: ForwardBatch, *, drafted: int = 0) -> ForwardBatch:
    """The step with lengths as in a prompt's chunk or in decoding; unchanged if it is one.

    Parameters
    ----------
    drafted : as in `m3_sglang.batch.uniform_step`
    """
    uniform = uniform_step(forward_batch, drafted=drafted)
    if uniform is None or uniform.unseen == 0:
        return forward_batch
    step = copy.copy(forward_batch)
    step.seq_lens = forward_batch.seq_lens + uniform.unseen
    if uniform.query_len > 1 or forward_batch.forward_mode.is_target_verify():
        step.extend_prefix_lens = forward_batch.seq_lens
        step.extend_seq_lens = torch.full_like(forward_batch.seq_lens, uniform.query_len)
    return step
