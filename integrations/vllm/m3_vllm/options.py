"""vLLM's options that MiniMax-M3 cannot be served with here, and those it makes nothing of.

vLLM asks a layer's backend or implementation about most of its features; MSA layers bring their own
op, and are not asked about these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from m3_plugin.model.config import M3Config
from m3_plugin.settings import Settings

logger = init_logger("vllm.m3_plugin.options")

# (is it asked for?, what is refused, why and what to do)
_REFUSED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda c: c.parallel_config.use_ubatching,
        "--enable-dbo and --ubatch-size",
        "m3-plugin plans one step at a time: two micro-batches in flight would overwrite each "
        "other's plan; start vLLM without --enable-dbo and --ubatch-size",
    ),
    (
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "--decode-context-parallel-size",
        "every rank of MSA reads whole contexts; leave it out, or shard by --tensor-parallel-size "
        "and --data-parallel-size",
    ),
    (
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "--prefill-context-parallel-size",
        "every rank of MSA selects over whole contexts; leave it out",
    ),
    (
        lambda c: c.parallel_config.enable_eplb,
        "--enable-eplb",
        "experts of this model are not moved between ranks, so redundant ones would take memory "
        "and no load; leave it out",
    ),
    (
        lambda c: (
            c.parallel_config.enable_expert_parallel
            and c.parallel_config.enable_ep_weight_filter
            and c.parallel_config.expert_placement_strategy != "linear"
        ),
        "--enable-ep-weight-filter with --expert-placement-strategy",
        "vLLM places experts of one group linearly all the same, and its filter would leave others "
        "in the files than it needs; leave one of them out",
    ),
    (
        lambda c: c.lora_config is not None and c.speculative_config is not None,
        "--enable-lora with --speculative-config",
        "drafts would be those of the model without its adapter, which nobody has tried; leave one "
        "of them out",
    ),
    (
        lambda c: c.lora_config is not None and Settings.from_environment().index_sharing != "off",
        "--enable-lora with M3_PLUGIN_INDEX_SHARING=scan",
        "adapters of index projections were never run where ranks share scans; leave one of them "
        "out",
    ),
    (
        lambda c: c.lora_config is not None and c.lora_config.enable_tower_connector_lora,
        "enable_tower_connector_lora",
        "adapters of the vision tower are not taken; leave it out, and merge such an adapter into "
        "the weights",
    ),
    (
        lambda c: getattr(c.attention_config, "hisparse_config", None) is not None,
        "hisparse_config in --attention-config",
        "MSA pages lie on the GPU; leave it out, or offload whole blocks by --kv-offloading-size",
    ),
)

# the same, for which MSA layers are not the reason
_REFUSED_MEDIA: tuple[tuple[str, str, str], ...] = (
    (
        "mm_encoder_only",
        "--mm-encoder-only",
        "the vision tower runs beside the text model; leave it out, or share the tower out by "
        "--mm-encoder-tp-mode data",
    ),
    (
        "enable_mm_embeds",
        "--enable-mm-embeds",
        "pictures and videos are taken as files or pixels, from which their tokens are laid out; "
        "leave it out and send image_url or video_url",
    ),
)

# (is it asked for?, what of it is not heard), each for a recipe written for vLLM's own M3
_UNHEARD: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda c: (
            getattr(c.attention_config, "minimax_m3_msa_decode_backend", "triton") != "triton"
        ),
        "minimax_m3_msa_decode_backend in --attention-config chooses kernels of vLLM's own MSA "
        "layers; M3_PLUGIN_KERNELS chooses ours",
    ),
    (
        lambda c: getattr(c.attention_config, "minimax_m3_indexer_cp", False),
        "minimax_m3_indexer_cp in --attention-config shares out the index scan of vLLM's own MSA "
        "layers; M3_PLUGIN_INDEX_SHARING=scan that of ours, on a CPU",
    ),
    (
        lambda c: getattr(c.attention_config, "indexer_sparse_logits", False),
        "indexer_sparse_logits in --attention-config is of other models' indexers",
    ),
)


def require_served(vllm_config: VllmConfig, config: M3Config) -> None:
    """Refuse options under which the model would be wrong or do nothing; log what is not heard.

    Raises
    ------
    ValueError : names the option, the reason and the way out.
    """
    for asked, option, reason in _REFUSED:
        if asked(vllm_config):
            raise ValueError(f"{option} cannot be used with MSA layers: {reason}")
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    # the decoding half of a disaggregated pair has it set by vLLM, which nobody asked for
    unasked = {"enable_mm_embeds"} if getattr(media, "allow_missing_mm_embeddings", 0) else set()
    for name, option, reason in _REFUSED_MEDIA:
        if getattr(media, name, False) and name not in unasked:
            raise ValueError(f"{option} cannot be used with MiniMax-M3: {reason}")
    _require_one_cache_dtype(vllm_config, config)
    for asked, message in _UNHEARD:
        if asked(vllm_config):
            logger.warning("m3-plugin: %s", message)


def _require_one_cache_dtype(vllm_config: VllmConfig, config: M3Config) -> None:
    """MSA layers share one session, and so one dtype of K and V."""
    cache = vllm_config.cache_config
    skipped = getattr(cache, "kv_cache_dtype_skip_layers", None) or []
    sparse = [name for name in skipped if name.isdigit() and _is_sparse(config, int(name))]
    if sparse and cache.cache_dtype != "auto":
        raise ValueError(
            "--kv-cache-dtype-skip-layers cannot be used with MSA layers, whose pages are all kept "
            f"in one dtype; got {', '.join(sparse)}, leave them out or set --kv-cache-dtype auto"
        )


def _is_sparse(config: M3Config, layer: int) -> bool:
    return layer < config.num_hidden_layers and config.sparse_layers[layer]
