"""LoRA adapters: which layers take them, and what an adapter's file calls those layers.

Hosts look for a layer of an adapter's name and pass over names without one, so that a model with
half an adapter answers. Here each name is either a layer that takes adapters, or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from m3_plugin.checkpoint.names import linear_shape
from m3_plugin.model.config import M3Config

# Projections that take adapters, by their names in the checkpoint.
ADAPTED_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "index_q_proj", "index_k_proj")
ADAPTED_MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTED = (*ADAPTED_ATTENTION, *ADAPTED_MLP)

# What an adapter has for each of its projections.
ADAPTER_PARTS = ("lora_A.weight", "lora_B.weight")

# Keys of adapter_config.json that change what its tensors mean, and the values that do not.
# Those of `init_lora_weights` only say where training began; others change the base weights.
_MEANT: dict[str, tuple[object, ...]] = {
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, {}),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
}

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


def adapted_tensor(name: str, config: M3Config) -> tuple[str, str]:
    """Module and part (of `ADAPTER_PARTS`) that a tensor of an adapter is.

    Parameters
    ----------
    name : of the tensor, with or without PEFT's `base_model.model.`

    Returns
    -------
    The module as of `adapted_module`, and the part.

    Raises
    ------
    ValueError : it is neither A nor B of a projection that takes adapters.
    """
    for part in ADAPTER_PARTS:
        if name.endswith(f".{part}"):
            module = name.removeprefix("base_model.model.").removesuffix(f".{part}")
            return adapted_module(module, config), part
    raise ValueError(
        f"adapter tensor {name!r}: only lora_A and lora_B of projections are taken; save the "
        "adapter without modules_to_save and embeddings, or merge it into the weights"
    )


def wanted_projections(
    targets: Iterable[str] | None, *, fused: Mapping[str, tuple[str, ...]]
) -> frozenset[str]:
    """Projections that `--lora-target-modules` means; all where it is left out or says `all`.

    Parameters
    ----------
    fused : a host's names of fused layers, and the projections in each

    Raises
    ------
    ValueError : it names what takes no adapters.
    """
    if targets is None or "all" in (named := set(targets)):
        return frozenset(ADAPTED)
    found = {part for name in named for part in fused.get(name, (name,))}
    if strange := sorted(found - {*ADAPTED}):
        raise ValueError(
            f"m3-plugin: --lora-target-modules {' '.join(strange)}: adapters are taken by "
            f"{', '.join(ADAPTED)} of the text model; leave the others out"
        )
    return frozenset(found)


def require_adapter_config(values: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json whose tensors mean more than B A times alpha / r.

    For a host that reads none of these keys and would answer as if they were not there.

    Raises
    ------
    ValueError : names the key and its value.
    """
    for key, meant in _MEANT.items():
        if (value := values.get(key)) not in meant:
            served = " or ".join(json.dumps(choice) for choice in meant[1:])
            raise ValueError(
                f"adapter_config.json key {key!r} must be {served}; got {value!r}: merge such an "
                "adapter into the weights"
            )


def require_adapter_shapes(
    module: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int,
    config: M3Config,
) -> None:
    """Refuse A and B that do not belong to a module of this model.

    Parameters
    ----------
    module : as of `adapted_module`
    shapes : by part, of `ADAPTER_PARTS`
    rank : of the adapter

    Raises
    ------
    ValueError : one is missing or has another shape; names it.
    """
    rows, columns = linear_shape(config, module)
    wanted = dict(zip(ADAPTER_PARTS, ((rank, columns), (rows, rank)), strict=True))
    for part, shape in wanted.items():
        if part not in shapes:
            raise ValueError(f"adapter tensor {module}.{part} is missing; the other half is there")
        if shapes[part] != shape:
            raise ValueError(
                f"adapter tensor {module}.{part} must have shape {list(shape)} at r = {rank}; got "
                f"{list(shapes[part])}"
            )


def adapted_modules(config: M3Config) -> tuple[str, ...]:
    """All modules that take adapters, by their names as of `adapted_module`."""
    return tuple(
        f"model.layers.{layer}.{part}"
        for layer in range(config.num_hidden_layers)
        for part in _parts(config, layer)
    )


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
