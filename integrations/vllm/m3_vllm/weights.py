"""vLLM's names for what the checkpoint holds; `m3_plugin.checkpoint.loading` loads it."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from vllm.config import ParallelConfig
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from m3_plugin.checkpoint.loading import Shard, WeightLoader, chosen_rewriter
from m3_plugin.checkpoint.names import (
    EMBEDDING,
    expert_of,
    is_mtp_tensor,
    is_of_stage,
    mtp_modules,
    text_modules,
)
from m3_plugin.checkpoint.plan import index_is_alike
from m3_plugin.model.config import M3Config
from m3_plugin.settings import Settings

FUSED: dict[str, tuple[str, Shard]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "index_q_proj": ("qkv_proj", "index_q"),
    "index_k_proj": ("qkv_proj", "index_k"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
# Index projections that are not fused with q, k and v: a layer of their own, whole on every rank.
_INDEX_APART: dict[str, tuple[str, Shard]] = {
    "index_q_proj": ("index_proj", 0),
    "index_k_proj": ("index_proj", 1),
}
# Every fused layer with one projection at least, whichever way index projections are stored.
FUSED_EITHER_WAY = FUSED | _INDEX_APART


@cache
def fused_projections(
    config: M3Config, *, draft: bool = False, adapted: bool = False
) -> dict[str, tuple[str, Shard]]:
    """Projection of the checkpoint -> our fused layer, and its part of it.

    Index projections are apart with `M3_PLUGIN_INDEX_SHARING`, too: ranks then need all of them.

    Parameters
    ----------
    config : the target, or the draft as a model of its own (`m3_plugin.model.mtp.mtp_config`)
    draft : whether it is the draft, which may be stored otherwise
    adapted : whether vLLM puts LoRA layers around them; it has none for q, k, v and index in one
    """
    settings = Settings.from_environment()
    alike = index_is_alike(config, dequantise=settings.dequantize, draft=draft)
    whole = adapted or settings.index_sharing != "off"
    return FUSED if alike and not whole else FUSED | _INDEX_APART


def text_weight_loader(
    model: nn.Module,
    *,
    config: M3Config,
    layers: range,
    embedding: bool,
    last_stage: bool,
    unread: frozenset[int] = frozenset(),
    adapted: bool = False,
) -> WeightLoader:
    """A loader for one pipeline stage.

    Parameters
    ----------
    model : our causal LM
    config : what the checkpoint promises
    layers : decoder layers of this stage
    embedding : whether the stage holds the embedding
    last_stage : whether it holds the final norm and the head
    unread : experts whose files vLLM does not read for this rank (`unread_experts`)
    adapted : as of `fused_projections`
    """
    # a pooling model has none
    has_head = any(name.startswith("lm_head.") for name, _ in model.named_parameters())

    def is_elsewhere(name: str) -> bool:
        if name.startswith("lm_head.") and not has_head:
            return True
        return not is_of_stage(name, layers=layers, embedding=embedding, last=last_stage)

    return _weight_loader(
        model,
        config=config,
        fused=fused_projections(config, adapted=adapted),
        expected=text_modules(config),
        unread=unread,
        is_elsewhere=is_elsewhere,
    )


def mtp_weight_loader(
    model: nn.Module,
    *,
    config: M3Config,
    embedding: bool,
    unread: frozenset[int] = frozenset(),
) -> WeightLoader:
    """A loader for the MTP draft model, which passes over everything of the target's.

    Parameters
    ----------
    model : our draft model
    config : the draft as a model of its own (`m3_plugin.model.mtp.mtp_config`)
    embedding : whether the draft holds an embedding of its own, as on a later pipeline stage
    unread : as of `text_weight_loader`
    """
    expected = mtp_modules(config, num_modules=config.num_mtp_modules)
    if embedding:
        expected |= {EMBEDDING.removesuffix(".")}

    def is_foreign(name: str) -> bool:
        return not (is_mtp_tensor(name) or (embedding and name.startswith(EMBEDDING)))

    return _weight_loader(
        model,
        config=config,
        fused=fused_projections(config, draft=True),
        expected=expected,
        unread=unread,
        is_foreign=is_foreign,
    )


def unread_experts(config: M3Config, parallel: ParallelConfig) -> frozenset[int]:
    """Experts of other ranks, which `--enable-ep-weight-filter` leaves in the files.

    Those that vLLM's layers place elsewhere: of one group of experts they are never placed round
    robin, whatever its filter was told.
    """
    if not (parallel.enable_expert_parallel and parallel.enable_ep_weight_filter):
        return frozenset()
    group = get_ep_group()
    own = compute_local_expert_ids(
        config.num_experts,
        group.world_size,
        group.rank_in_group,
        placement="linear",
    )
    return frozenset() if own is None else frozenset(range(config.num_experts)) - own


def _weight_loader(
    model: nn.Module,
    *,
    config: M3Config,
    fused: dict[str, tuple[str, Shard]],
    expected: frozenset[str],
    unread: frozenset[int],
    **rules: Any,
) -> WeightLoader:
    return WeightLoader(
        model,
        config=config,
        expected=expected,
        fused=fused,
        experts=fused_moe_make_expert_params_mapping(
            model,
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=config.num_experts,
        ),
        default_loader=default_weight_loader,
        # vLLM's mxfp8 layers call the stored block scale by the name without "_inv"
        rename=lambda name: name.replace("weight_scale_inv", "weight_scale"),
        rewriter=chosen_rewriter(model, config),
        optional=frozenset(module for module in expected if expert_of(module) in unread),
        **rules,
    )
