"""M3.1's draft model as it is published beside the target: `dspark/`, with a config of its own.

Names, dtypes and keys are the published ones, sizes are the target's, numbers are zero. No host
serves it here; it is there so that loading, sizing and refusals meet what they meet in the wild.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3_plugin.checkpoint.headers import DSPARK_FOLDER, INDEX_FILE
from m3_plugin.testing.hub_layout import DSPARK_SHARD

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "language_model.model.dspark."
_NUM_LAYERS = 5
_MARKOV_RANK = 32
_WINDOW = 4096


def add_dspark(checkpoint: Path) -> Path:
    """Write the draft's folder into a checkpoint of M3.1; the folder.

    Parameters
    ----------
    checkpoint : its config.json says how large the draft is
    """
    from safetensors.torch import save_file

    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    tensors = dict(_tensors(text))
    folder = checkpoint / DSPARK_FOLDER
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / DSPARK_SHARD, metadata={"format": "pt"})
    (folder / DSPARK_SHARD).chmod((checkpoint / "config.json").stat().st_mode)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(tensors, DSPARK_SHARD),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(_config(text), indent=2) + "\n")
    return folder


def _config(text: dict[str, Any]) -> dict[str, Any]:
    last = text["num_hidden_layers"] - 1
    shared = (
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "dense_intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rotary_dim",
        "partial_rotary_factor",
        "use_gemma_norm",
    )
    return {
        "architectures": ["DSparkMiniMaxDraftModel"],
        "model_type": "minimax_m3_vl",
        "text_config": {
            **{key: text[key] for key in shared if key in text},
            "num_hidden_layers": _NUM_LAYERS,
            "dspark_ffn_hidden_size": text["dense_intermediate_size"],
            "dspark_markov_rank": _MARKOV_RANK,
            "dspark_markov_head_type": "vanilla",
            "dspark_block_size": 7,
            "dspark_noise_token_id": 0,
            "dspark_use_dense_ffn": True,
            "dspark_hybrid_context_fusion": False,
            "dspark_target_layer_ids": [round(last * i / 4) for i in range(5)],
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention"] * _NUM_LAYERS,
            "moe_layer_freq": [0] * _NUM_LAYERS,
            "sparse_attention_config": None,
        },
        "quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
    }


def _tensors(text: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    import torch

    hidden, vocab, dim = text["hidden_size"], text["vocab_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
    wide = text["dense_intermediate_size"]

    def bf16(name: str, *shape: int) -> tuple[str, Tensor]:
        return f"{PREFIX}{name}", torch.zeros(shape, dtype=torch.bfloat16)

    yield bf16("fc.weight", hidden, 5 * hidden)
    yield bf16("hidden_norm.weight", hidden)
    yield bf16("final_norm.weight", hidden)
    yield bf16("markov_head.markov_w1.weight", vocab, _MARKOV_RANK)
    yield bf16("markov_head.markov_w2.weight", vocab, _MARKOV_RANK)
    yield bf16("confidence_head.proj.weight", 1, hidden + _MARKOV_RANK)
    yield bf16("confidence_head.proj.bias", 1)
    for layer in range(_NUM_LAYERS):
        inside = f"layers.{layer}.decoder_layer."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield bf16(f"{inside}{norm}.weight", hidden)
        for norm in ("q_norm", "k_norm"):
            yield bf16(f"{inside}self_attn.{norm}.weight", dim)
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ):
            values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
            yield f"{PREFIX}{inside}{name}.weight", values
            exponents = torch.full((rows, columns // 32), 127, dtype=torch.uint8)
            yield f"{PREFIX}{inside}{name}.weight_scale_inv", exponents
