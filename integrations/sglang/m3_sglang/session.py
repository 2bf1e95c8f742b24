"""The MSA session of one SGLang worker: SGLang's limits and dtypes in the words of m3_plugin."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from m3_kernels.work_plan import DECODE_ROWS, allocate_work_plan
from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, workspace_bytes
from m3_plugin.model.config import PAGED_BLOCK_SIZE, M3Config, local_heads
from m3_plugin.settings import Settings
from m3_sglang.compat import (
    attention_parallel_rank,
    attention_parallel_size,
    gather_of_attention,
    read_config,
    resolved,
)

# SGLang's own limits of a worker: requests where none is asked for, and slots of a request's row
# behind the context, for drafts and whole pages (`get_req_to_token_extra_context_len`).
MOST_REQUESTS = 4096
ROOM_BEHIND_CONTEXT = 2 * PAGED_BLOCK_SIZE

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
    size = attention_parallel_size()
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
        tensor_parallel_rank=attention_parallel_rank(),
        gather=gather_of_attention,
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
    pool = runner.req_to_token_pool
    return _capacity(runner.server_args, requests=pool.size, max_seq_len=pool.req_to_token.shape[1])


def _capacity(server_args: Any, *, requests: int, max_seq_len: int) -> StepCapacity:
    arguments = resolved(server_args)
    chunk = arguments.chunked_prefill_size
    longest = chunk if chunk is not None and chunk > 0 else max_seq_len
    chain = arguments.speculative_num_draft_tokens or 1
    return StepCapacity(
        max_requests=requests,
        max_rows=max(arguments.max_prefill_tokens, longest) + requests * chain,
        max_seq_len=max_seq_len,
        decode_rows=min(chain, DECODE_ROWS),
    )


def workspace_of_pool(sizing: Any) -> int:
    """Bytes of the workspace a worker's target will allocate; 0 where its kernels need none.

    SGLang settles the number of requests after the caches, by their size, so it is the largest it
    may settle: what was asked for, or 4096 (`KVCacheConfigurator.resolve_max_num_reqs`).
    """
    device = torch.device(sizing.device)
    kernels = choose_kernels(device.type, Settings.from_environment().kernels)
    config = read_config(sizing.model_config.hf_config)
    if config.msa is None or kernels.family != "triton":
        return 0
    size = attention_parallel_size()
    asked = resolved(sizing.server_args).max_running_requests
    shape = LayerShape(
        num_q_heads=local_heads(config.num_attention_heads, size),
        num_kv_heads=local_heads(config.num_key_value_heads, size),
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        dtype=sizing.model_dtype,
        cache_dtype=sizing.kv_cache_dtype,
        # the scratch holds scores of keys, in fp32, and never keys
        index_dtype=sizing.model_dtype,
    )
    capacity = _capacity(
        sizing.server_args,
        requests=MOST_REQUESTS if asked is None else asked,
        max_seq_len=sizing.model_config.context_len + ROOM_BEHIND_CONTEXT,
    )
    return workspace_bytes(config.msa, shape, capacity, device=device)
