"""MiniMax-M3's multi-token-prediction module: what both hosts need beside their own layers.

    e  = embedding of the next token, zero at position 0
    h  = the target's last hidden state (after its final norm), or this module's own output before
         `final_layernorm` when it is applied again for a further token
    x  = eh_proj(concat(enorm(e), hnorm(h)))
    y  = transformer_layer(x)               one decoder layer with MSA and routed experts
    logits = lm_head(final_layernorm(y))    the target's head

The norms are Gemma norms (1 + weight). Embedding and head are the target's. One trained module is
applied again for every further token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from m3_plugin.model.config import M3Config

Norm = Callable[[Tensor], Tensor]


def mtp_input(
    embeddings: Tensor, hidden_states: Tensor, positions: Tensor, *, enorm: Norm, hnorm: Norm
) -> Tensor:
    """What `eh_proj` reads: the two normalised halves, embedding first.

    Parameters
    ----------
    embeddings : [rows, hidden], of the token after each row's position
    hidden_states : [rows, hidden], of the row's position
    positions : integer [rows]; a sequence's first row gets no embedding
    enorm, hnorm : the module's norms

    Returns
    -------
    [rows, 2 * hidden]
    """
    embeddings = torch.where(positions.unsqueeze(-1) == 0, 0.0, embeddings)
    return torch.cat([enorm(embeddings), hnorm(hidden_states)], dim=-1)


def mtp_config(config: Mapping[str, Any], *, num_modules: int) -> M3Config:
    """The draft model as a config of its own: `num_modules` layers, all of them sparse and routed.

    Parameters
    ----------
    config : config.json of the target, or of a separate draft checkpoint, whose per-layer lists
        describe the target or one layer; they are not looked at
    num_modules : modules the checkpoint holds (`count_mtp_modules`)

    Raises
    ------
    ValueError : as `M3Config.from_hf`; also when the config has no sparse attention section.
    """
    text = dict(config.get("text_config") or config)
    sparse = text.get("sparse_attention_config")
    if not sparse:
        raise ValueError(
            "config key 'sparse_attention_config' must be given for the MTP module, whose layer is "
            "always sparse; got None"
        )
    ones = [1] * num_modules
    text |= {
        "num_hidden_layers": num_modules,
        "num_mtp_modules": num_modules,
        "moe_layer_freq": ones,
        "sparse_attention_config": dict(sparse)
        | {
            "use_sparse_attention": True,
            "sparse_attention_freq": ones,
            "sparse_disable_index_value": ones,
        },
    }
    quantization = config.get("quantization_config")
    return M3Config.from_hf(text | ({"quantization_config": quantization} if quantization else {}))
