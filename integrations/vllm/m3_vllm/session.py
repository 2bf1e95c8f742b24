"""The MSA session of one vLLM worker: vLLM's limits and dtypes in the words of m3_plugin."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)

from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.model.config import M3Config
from m3_plugin.settings import Settings
from m3_vllm import cpu_repairs
from m3_vllm.caches import M3SparseCacheLayer, cache_dtype, index_dtype
from m3_vllm.compat import device_type, requests_of_step
from m3_vllm.options import require_served
from m3_vllm.orphans import end_with_starter, engine_of_first_worker

ATTENTION_OP = "vllm::m3_msa_attention"


def worker_session(config: M3Config, vllm_config: VllmConfig) -> MSASession | None:
    """The session for the model being built, None if no layer of it is sparse.

    Raises
    ------
    ValueError : an option of vLLM's cannot be served (`m3_vllm.options`); an `M3_PLUGIN_` variable
        is misspelt.
    """
    # dense models of ours too: registration could not know that M3 is served
    Settings.from_environment()
    if config.msa is None:
        return None
    require_served(vllm_config, config)
    if device_type() == "cpu":
        cpu_repairs.take_draws_back()
        if vllm_config.parallel_config.data_parallel_size > 1:
            cpu_repairs.gather_rows_of_ranks()
    if (engine := engine_of_first_worker()) is not None:
        end_with_starter(engine)
    keep_attention_out_of_piecewise_graphs(vllm_config)
    session = make_session(
        config,
        device=torch.device(device_type()),
        dtype=vllm_config.model_config.dtype,
        cache_dtype=cache_dtype(vllm_config),
        index_dtype=index_dtype(vllm_config),
        tensor_parallel_size=get_tensor_model_parallel_world_size(),
        tensor_parallel_rank=get_tensor_model_parallel_rank(),
        gather=gather_of_ranks,
        capacity=step_capacity(vllm_config),
        # K beside V; the layout decides whether heads or slots lie side by side
        pages=("packed-slots", "packed-heads"),
        beside=_earlier_session(vllm_config),
    )
    if session is not None and session.checker is not None:
        session.checker.names = requests_of_step
    return session


def gather_of_ranks(part: Tensor) -> Tensor:
    """[n, ...] of this rank -> [ranks * n, ...] of all tensor-parallel ranks, in order."""
    return get_tp_group().all_gather(part, dim=0)


def _earlier_session(vllm_config: VllmConfig) -> MSASession | None:
    """The session of the target, if the model being built is its draft: it was built before."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return next((x.session for x in layers if isinstance(x, M3SparseCacheLayer)), None)


def step_capacity(vllm_config: VllmConfig) -> StepCapacity:
    """The largest step vLLM schedules or captures."""
    scheduler = vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    drafted = speculative.num_speculative_tokens if speculative is not None else 0
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return StepCapacity(
        max_requests=scheduler.max_num_seqs,
        max_rows=max(scheduler.max_num_batched_tokens, captured),
        # the host's upper bound of a length runs ahead of it by the tokens that may be rejected
        max_seq_len=vllm_config.model_config.max_model_len + drafted + 1,
        decode_rows=min(DECODE_ROWS, 1 + drafted),
    )


def keep_attention_out_of_piecewise_graphs(vllm_config: VllmConfig) -> None:
    """Make torch.compile split the model at our op wherever it splits at vLLM's own attention.

    A piecewise CUDA graph that held the op would replay the metadata of the step it was captured
    on, which is none at all. vLLM's list of such ops is fixed; ours is added to the copy in the
    configuration.
    """
    splitting = vllm_config.compilation_config.splitting_ops
    if splitting and ATTENTION_OP not in splitting:
        splitting.append(ATTENTION_OP)
