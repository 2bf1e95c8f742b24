"""Which models are ours, and what SGLang knows them and their methods by."""

from __future__ import annotations

from typing import Any

from m3_sglang.compat import why_left_alone

ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
DRAFT_ARCHITECTURE = "MiniMaxM3MTP"
MODEL_PACKAGE = "m3_sglang.models"
# Methods of stored weights that are ours.
MXFP8_METHOD = "m3_mxfp8"
STORED_METHOD = "m3_stored"

# our fused layers, and the projections of the checkpoint in the order of their rows
FUSED_LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "index_qkv_proj": ("index_q_proj", "index_k_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def is_ours(hf_config: Any, *, draft: bool = False) -> bool:
    """Whether the model of this config is M3 or its MTP module, and one that we serve exactly.

    Parameters
    ----------
    hf_config : of the model
    draft : the model is to be the MTP module, whatever architecture the config names
    """
    architecture = (hf_config.architectures or [None])[0]
    if architecture not in (*ARCHITECTURES, DRAFT_ARCHITECTURE):
        return False
    draft = draft or architecture == DRAFT_ARCHITECTURE
    return why_left_alone(hf_config, draft=draft) is None
