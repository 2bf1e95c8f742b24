"""The MSA session of one SGLang worker: SGLang's limits and dtypes in the words of m3_plugin."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from m3_kernels.work_plan import DECODE_ROWS, allocate_work_plan
from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.model.config import M3Config, local_heads
from m3_sglang.compat import resolved, tensor_parallel_size

# By SGLang's pool of requests, which a worker's target and draft share, and by what the kernels see
# of a layer. Their layers run one after another on one stream, so one scratch serves them.
_SESSIONS: WeakKeyDictionary[Any, dict[tuple[object, ...], MSASession]] = WeakKeyDictionary()


def worker_session(config: M3Config, runner: Any) -> MSASession | None:
    """The session for a model runner whose cache pools exist; None if no layer is sparse.

    The first of a worker is made and tested; further ones, of a draft model and of each of its
    drafting steps, use its scratch and have plans of their own.
    """
    if config.msa is None:
        return None
    size = tensor_parallel_size()
    geometry = (
        config.msa,
        local_heads(config.num_attention_heads, size),
        local_heads(config.num_key_value_heads, size),
        (config.head_dim, config.rotary_dim),
        (runner.dtype, runner.kv_cache_dtype, index_dtype(runner)),
        torch.device(runner.device),
    )
    sessions = _SESSIONS.setdefault(runner.req_to_token_pool, {})
    if geometry in sessions:
        return beside(sessions[geometry])
    session = make_session(
        config,
        device=torch.device(runner.device),
        dtype=runner.dtype,
        cache_dtype=runner.kv_cache_dtype,
        index_dtype=index_dtype(runner),
        tensor_parallel_size=size,
        capacity=step_capacity(runner),
    )
    assert session is not None
    sessions[geometry] = session
    return session


def beside(session: MSASession) -> MSASession:
    """Another session on the same scratch, for layers that never run at the same time.

    Its plans are its own: SGLang plans all drafting steps of a round before it runs the first.
    """
    other = copy.copy(session)
    if session.workspace is not None:
        capacity = session.workspace.capacity
        other.workspace = replace(
            session.workspace,
            plan_buffers=allocate_work_plan(
                max_reqs=capacity.max_requests,
                max_rows=capacity.max_rows,
                device=session.workspace.plan_buffers.cum_blocks.device,
            ),
            shared=True,
        )
    return other


def index_dtype(runner: Any) -> torch.dtype:
    """How SGLang's pool keeps index keys: e4m3 beside an e4m3 cache on SM90, int8 if asked to."""
    pool = runner.token_to_kv_pool
    return pool.get_index_k_buffer(next(iter(pool.sparse_layer_id_mapping))).dtype


def step_capacity(runner: Any) -> StepCapacity:
    """The largest step SGLang schedules or captures.

    Chunked prefill bounds a prefill step by its chunk, otherwise one prompt may be as long as the
    context. Decode requests may ride along, each with all the rows of a verified chain.
    """
    arguments = resolved(runner.server_args)
    pool = runner.req_to_token_pool
    chunk = arguments.chunked_prefill_size
    longest = chunk if chunk is not None and chunk > 0 else pool.req_to_token.shape[1]
    chain = arguments.speculative_num_draft_tokens or 1
    return StepCapacity(
        max_requests=pool.size,
        max_rows=max(arguments.max_prefill_tokens, longest) + pool.size * chain,
        max_seq_len=pool.req_to_token.shape[1],
        decode_rows=min(chain, DECODE_ROWS),
    )
