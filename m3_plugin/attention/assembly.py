"""From a model's config and the user's settings to a session: the same steps in both hosts."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import torch

from m3_kernels.index_pages import PLANES_DTYPE
from m3_kernels.sparse_attention import flashinfer_refusal
from m3_kernels.testing.cases import PageLayout
from m3_kernels.tuning import arch_of
from m3_kernels.work_plan import DECODE_ROWS
from m3_plugin.attention.backends import KernelChoice, choose_kernels, require_served
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.checks import StepChecker
from m3_plugin.attention.observers import ExportedStatistics, TimedSession
from m3_plugin.attention.recorder import SelectionRecorder
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.sharing import Gather, make_sharing
from m3_plugin.attention.transfers import TransferVerifier
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.host.metrics import export_presence
from m3_plugin.model.config import M3Config, MSAConfig, local_heads
from m3_plugin.settings import Settings

logger = logging.getLogger(__name__)


def make_session(
    config: M3Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    index_dtype: torch.dtype,
    tensor_parallel_size: int,
    capacity: StepCapacity,
    tensor_parallel_rank: int = 0,
    gather: Gather | None = None,
    pages: tuple[PageLayout, ...] = ("planes",),
    beside: MSASession | None = None,
) -> MSASession | None:
    """The MSA session of one worker, None for a model without sparse layers.

    On a GPU the workspace is allocated here, and the kernels are tried once on small steps of the
    model's geometry: kernels that nobody has run on this chip must not serve wrong tokens.

    Parameters
    ----------
    config : the model
    device : of the worker
    dtype : of activations
    cache_dtype, index_dtype : of the pages of K and V, and of index keys
    capacity : the largest step of the host
    tensor_parallel_rank : whose heads these are
    gather : the host's exchange among the ranks that share attention heads
    pages : how the host lays out K and V, one way or another (`m3_kernels.testing.cases.Case`)
    beside : the session of a target whose draft this one is for; they share their scratch

    Raises
    ------
    NoKernelError : no kernel family can serve this device, or not with this cache.
    KernelsAreWrongError : the kernels give wrong results on this device.
    """
    if config.msa is None:
        return None
    settings = Settings.from_environment()
    kernels = choose_kernels(device.type, settings.kernels)
    require_served(
        kernels,
        arch=arch_of(device) if device.type == "cuda" else None,
        cache_dtype=cache_dtype,
        index_dtype=index_dtype,
    )
    if index_dtype == torch.int8:
        logger.info(
            "m3-plugin: index keys are kept in int8 with a scale each; blocks of nearly equal "
            "scores may be chosen otherwise than from unquantised keys"
        )
    if index_dtype == PLANES_DTYPE:
        logger.info(
            "m3-plugin: index keys are kept in two planes of bytes with a scale each; one of them "
            "is read whole, both where it matters"
        )
    sharing = make_sharing(
        config.msa,
        settings,
        rank=tensor_parallel_rank,
        ranks=tensor_parallel_size,
        gather=gather,
    )
    if sharing is not None:
        if kernels.family == "triton":
            raise ValueError(
                "M3_PLUGIN_INDEX_SHARING=scan: no kernel on a GPU scans a share of the blocks yet; "
                "unset it, and each rank scans all of them"
            )
        logger.info("m3-plugin: %s", sharing.describe())
    shape = LayerShape(
        num_q_heads=local_heads(config.num_attention_heads, tensor_parallel_size),
        num_kv_heads=local_heads(config.num_key_value_heads, tensor_parallel_size),
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        index_dtype=index_dtype,
    )
    workspace = None
    if kernels.family == "triton":
        if settings.statistics:
            raise ValueError(
                "M3_PLUGIN_STATISTICS=1 reads each layer's selection back, which kernels on a GPU "
                "must not wait for; unset it, or serve on a CPU"
            )
        if settings.timings:
            raise ValueError(
                "M3_PLUGIN_TIMINGS=1 reads the wall clock around each kernel, which on a GPU says "
                "how long its launch takes; unset it, or serve on a CPU"
            )
        try_kernels(
            config.msa,
            shape,
            kernels=replace(kernels, prefill=None, refused=()),
            device=device,
            pages=pages,
            decode_rows=capacity.decode_rows,
            max_seq_len=capacity.max_seq_len,
        )
        if device.type == "cuda":
            kernels = with_flashinfer(config.msa, shape, kernels=kernels, device=device)
        workspace = allocate_workspace(
            config.msa,
            shape,
            capacity,
            device=device,
            beside=None if beside is None else beside.workspace,
        )
        logger.info("m3-plugin: %s", workspace.describe())
    nvfp4 = settings.cache_values == "nvfp4"
    if nvfp4:
        logger.info(
            "m3-plugin: K, V and index keys of MSA layers are rounded to NVFP4 before they are "
            "stored, in plain torch"
        )
    session = (TimedSession if settings.timings else MSASession)(
        config.msa,
        kernels=kernels,
        scale=config.head_dim**-0.5,
        workspace=workspace,
        nvfp4=nvfp4,
        sharing=sharing,
    )
    if settings.statistics:
        session.statistics = ExportedStatistics()
    if settings.check:
        session.checker = StepChecker(settings.check, config.msa)
    if settings.record_blocks is not None:
        session.recorder = SelectionRecorder(settings.record_blocks, config.msa)
    if settings.verify_transfer is not None:
        if settings.index_keys != "auto":
            raise ValueError(
                "M3_PLUGIN_VERIFY_TRANSFER compares rows, and index keys of "
                f"M3_PLUGIN_INDEX_KEYS={settings.index_keys} have scales elsewhere in their page; "
                "unset one of them"
            )
        session.transfers = TransferVerifier(
            settings.verify_transfer,
            first_head=tensor_parallel_rank * config.num_key_value_heads // tensor_parallel_size,
        )
        logger.warning(
            "m3-plugin: rows of MSA's caches are compared with those in %s; every step reads its "
            "whole context",
            settings.verify_transfer,
        )
    export_presence(kernels.family, refused=kernels.refused, device_type=device.type)
    return session


@cache
def try_kernels(
    msa: MSAConfig,
    shape: LayerShape,
    *,
    kernels: KernelChoice,
    device: torch.device,
    pages: tuple[PageLayout, ...] = ("planes",),
    decode_rows: int = DECODE_ROWS,
    max_seq_len: int | None = None,
) -> None:
    """Run the self-test of `self_test` on the layers that will be served, once per process.

    A draft of the target's geometry is served by kernels that have passed.

    Parameters
    ----------
    pages, decode_rows, max_seq_len : as in `make_session`, of its capacity

    Raises
    ------
    KernelsAreWrongError : with the numbers.
    """
    # imported here: it brings the test cases, which only a GPU's session needs
    from m3_plugin.attention.self_test import require_right, self_test

    findings = self_test(
        msa,
        kernels=kernels,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=shape.rotary_dim,
        dtype=shape.dtype,
        kv_dtype=shape.cache_dtype,
        index_dtype=shape.index_dtype,
        device=device,
        pages=pages,
        decode_rows=decode_rows,
        max_seq_len=max_seq_len,
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    require_right(findings, kernels=kernels, device=name)
    logger.info("m3-plugin: MSA kernels (%s) gave right results on %s", kernels.name, name)


def with_flashinfer(
    msa: MSAConfig, shape: LayerShape, *, kernels: KernelChoice, device: torch.device
) -> KernelChoice:
    """The choice with FlashInfer for prefill attention, or with the reason why not.

    FlashInfer is used where its limits fit and it passed the self-test here, unless the user named
    Triton. It is optional, so nothing that it does wrong may end a server that did not ask for it.

    Raises
    ------
    NoKernelError : it was asked for by name and cannot serve.
    """
    if kernels.forced and kernels.prefill is None:
        return kernels
    refusal = flashinfer_refusal(
        arch=arch_of(device),
        dtype=shape.dtype,
        kv_dtype=shape.cache_dtype,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=msa.block_size,
        topk=msa.topk_blocks,
    )
    wanted = replace(kernels, prefill="flashinfer")
    if refusal is not None:
        return wanted.without_flashinfer(refusal)
    try:
        # by name, so that pages which it refuses are a fault of the test and not left to ours
        try_kernels(msa, shape, kernels=replace(wanted, forced=True), device=device)
    except Exception as error:
        # It compiles at its first call, and can fail in any way.
        reason = f"its test failed: {type(error).__name__}: {error}"
        logger.warning("m3-plugin: flashinfer is not used: %s", reason)
        return wanted.without_flashinfer(reason)
    return wanted
