"""LoRA adapters: which layers take them, and what an adapter's file calls those layers.

Hosts look for a layer of an adapter's name and pass over names without one, so that a model with
half an adapter answers. Here each name is either a layer that takes adapters, or refused.
"""

from __future__ import annotations

import re

from m3_plugin.model.config import M3Config

# Projections that take adapters, by their names in the checkpoint.
ADAPTED_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "index_q_proj", "index_k_proj")
ADAPTED_MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTED = (*ADAPTED_ATTENTION, *ADAPTED_MLP)

_LAYER = re.compile(r"(?:(?:model\.)?language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
# transformers' names in memory, with which PEFT writes an adapter: ours
_OF_TRANSFORMERS = {
    **{f"self_attn.indexer.{part}_proj": f"self_attn.index_{part}_proj" for part in "qk"},
    **{f"mlp.shared_experts.{p}": f"block_sparse_moe.shared_experts.{p}" for p in ADAPTED_MLP},
}


def adapted_module(name: str, config: M3Config) -> str:
    """The module of the text model that a module of an adapter changes.

    Parameters
    ----------
    name : of the module in the adapter's file, without PEFT's `base_model.model.`; as published, or
        as transformers calls it in memory

    Returns
    -------
    Its name as in the checkpoint without `language_model.`, such as
    `model.layers.3.self_attn.q_proj`.

    Raises
    ------
    ValueError : no layer of this model that takes adapters has this name.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        raise ValueError(f"adapter module {name!r}: {_taken()}; train the adapter for those only")
    layer, part = int(match.group(1)), match.group(2)
    if layer >= config.num_hidden_layers:
        raise ValueError(
            f"adapter module {name!r}: the model has layers 0 to {config.num_hidden_layers - 1}; "
            "the adapter belongs to another model"
        )
    part = _OF_TRANSFORMERS.get(part, part)
    taken = _parts(config, layer)
    if part not in taken:
        raise ValueError(
            f"adapter module {name!r}: {_taken()}, of layer {layer} {', '.join(taken)}; "
            "train the adapter for those only, or merge it into the weights"
        )
    return f"model.layers.{layer}.{part}"


def _taken() -> str:
    return (
        "adapters are taken by projections of attention and of its index branch, of dense MLPs and "
        "of shared experts"
    )


def _parts(config: M3Config, layer: int) -> tuple[str, ...]:
    """Modules of a decoder layer that take adapters."""
    own = ADAPTED_ATTENTION if config.sparse_layers[layer] else ADAPTED_ATTENTION[:4]
    attention = tuple(f"self_attn.{projection}" for projection in own)
    if not config.moe_layers[layer]:
        return (*attention, *(f"mlp.{projection}" for projection in ADAPTED_MLP))
    if not config.num_shared_experts:
        return attention
    shared = (f"block_sparse_moe.shared_experts.{projection}" for projection in ADAPTED_MLP)
    return (*attention, *shared)
