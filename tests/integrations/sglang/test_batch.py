"""Translation of SGLang's own ForwardBatch, and what is refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def forward_batch(mode: str, *, seq_lens: list[int], **fields: Any) -> Any:
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


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
def test_speculative_steps_are_refused(mode: str) -> None:
    from m3_sglang.batch import msa_batch

    step = forward_batch(mode, seq_lens=[10], out_cache_loc=torch.arange(4))
    with pytest.raises(NotImplementedError, match=mode):
        msa_batch(step, req_to_token=REQ_TO_TOKEN)


def server_args(**given: Any) -> Any:
    plain = {"page_size": None, "attention_backend": None, "kv_cache_dtype": "auto"}
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
        {"speculative_algorithm": "EAGLE"},
        {"pp_size": 2},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"enable_dp_attention": True},
    ],
)
def test_what_is_not_served_is_refused_with_argument_and_value(given: dict[str, Any]) -> None:
    from m3_sglang.options import m3_defaults

    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be .*{value!r}"):
        m3_defaults(server_args(**given), None)


def test_graph_capture_is_refused_with_the_way_out() -> None:
    from m3_sglang.backend import M3AttentionBackend

    backend = object.__new__(M3AttentionBackend)
    with pytest.raises(NotImplementedError, match="--disable-cuda-graph"):
        backend.init_cuda_graph_state(8, 64)
