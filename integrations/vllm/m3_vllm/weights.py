"""vLLM's names for what the checkpoint holds; the loading itself is `m3_plugin.loading`."""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.weight_utils import (
    default_weight_loader,
    maybe_remap_kv_scale_name,
)

from m3_plugin.checkpoint import layer_of, text_modules
from m3_plugin.config import M3Config
from m3_plugin.loading import Shard, WeightLoader, chosen_dequantiser

_FUSED: dict[str, tuple[str, Shard]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "index_q_proj": ("qkv_proj", "index_q"),
    "index_k_proj": ("qkv_proj", "index_k"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def text_weight_loader(
    model: nn.Module, *, config: M3Config, layers: range, first_stage: bool, last_stage: bool
) -> WeightLoader:
    """A loader for one pipeline stage.

    Parameters
    ----------
    model : our causal LM
    config : what the checkpoint promises
    layers : decoder layers of this stage
    first_stage, last_stage : whether it holds the embedding, the final norm and the head
    """

    def is_elsewhere(name: str) -> bool:
        layer = layer_of(name)
        if layer is not None:
            return layer not in layers
        return not (first_stage if name.startswith("model.embed_tokens.") else last_stage)

    return WeightLoader(
        model,
        expected=text_modules(config),
        fused=_FUSED,
        experts=fused_moe_make_expert_params_mapping(
            model,
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=config.num_experts,
        ),
        default_loader=default_weight_loader,
        scale_alias=maybe_remap_kv_scale_name,
        is_elsewhere=is_elsewhere,
        # vLLM's mxfp8 layers call the stored block scale by the name without "_inv"
        rename=lambda name: name.replace("weight_scale_inv", "weight_scale"),
        dequantiser=chosen_dequantiser(config),
    )
