"""Steps as SGLang makes them, for tests of what we make of them."""

from __future__ import annotations

from typing import Any

import torch


def forward_batch(mode: str, *, seq_lens: list[int], **fields: Any) -> Any:
    """A batch of SGLang's own class, request r in row r of its table."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    lengths = torch.tensor(seq_lens)
    return ForwardBatch(
        forward_mode=ForwardMode[mode],
        batch_size=len(seq_lens),
        input_ids=torch.zeros(1, dtype=torch.long),
        req_pool_indices=torch.arange(len(seq_lens)),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        seq_lens_sum=sum(seq_lens),
        **fields,
    )


def verify_step(*, seq_lens: list[int], query_len: int, out_cache_loc: torch.Tensor) -> Any:
    """A verify step as SGLang's EAGLE worker makes it: lengths without the drafted tokens."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    spec_info = EagleVerifyInput.create_idle_input(1, query_len - 1, query_len, "cpu")
    return forward_batch(
        "TARGET_VERIFY", seq_lens=seq_lens, spec_info=spec_info, out_cache_loc=out_cache_loc
    )
