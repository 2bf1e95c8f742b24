"""The MSA session of one SGLang worker: SGLang's limits and dtypes in the words of m3_plugin."""

from __future__ import annotations

from typing import Any

import torch

from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.model.config import M3Config
from m3_sglang.compat import tensor_parallel_size


def worker_session(config: M3Config, runner: Any) -> MSASession | None:
    """The session for a model runner whose cache pools exist; None if no layer is sparse."""
    if config.msa is None:
        return None
    return make_session(
        config,
        device=torch.device(runner.device),
        dtype=runner.dtype,
        cache_dtype=runner.kv_cache_dtype,
        index_dtype=index_dtype(runner),
        tensor_parallel_size=tensor_parallel_size(),
        capacity=step_capacity(runner),
    )


def index_dtype(runner: Any) -> torch.dtype:
    """How SGLang's pool keeps index keys: e4m3 beside an e4m3 cache on SM90, int8 if asked to."""
    pool = runner.token_to_kv_pool
    return pool.get_index_k_buffer(next(iter(pool.sparse_layer_id_mapping))).dtype


def step_capacity(runner: Any) -> StepCapacity:
    """The largest step SGLang schedules or captures.

    Chunked prefill bounds a prefill step by its chunk, otherwise one prompt may be as long as the
    context. Decode requests may ride along, each with all the rows of a verified chain.
    """
    arguments = runner.server_args
    pool = runner.req_to_token_pool
    chunk = arguments.chunked_prefill_size
    longest = chunk if chunk is not None and chunk > 0 else pool.req_to_token.shape[1]
    chain = arguments.speculative_num_draft_tokens or 1
    return StepCapacity(
        max_requests=pool.size,
        max_rows=max(arguments.max_prefill_tokens, longest) + pool.size * chain,
        max_seq_len=pool.req_to_token.shape[1],
    )
