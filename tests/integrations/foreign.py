"""Configs under M3's architecture names which this plugin must leave to the hosts' own classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from m3_plugin.model.released import released_config

MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]}
# dotted path of a key -> what another model might say there
FOREIGN: dict[str, object] = {
    "quantization_config.moe_quant_algo": "INT2",
    "quantization_config.moe_quant_format": "int2-pack-quantized",
    "quantization_config.router_quant_algo": "FP8",
    "moe_quant_algo": "NVFP4",
    "text_config.moe_quant_format": "nvfp4-pack-quantized",
    "text_config.linear_attention_config": {"linear_attention_freq": [1, 0] * 30},
    "text_config.dspark_config": {"use_dense_ffn": True},
    "text_config.dflash_config": {"num_target_layers": 60},
    "text_config.index_topk_freq": 2,
    "text_config.sliding_window": 4096,
    "text_config.attention_bias": True,
    "text_config.scoring_func": "softmax",
    "text_config.sparse_attention_config.sparse_score_type": "lse",
    "text_config.sparse_attention_config.sparse_selection_rule": "threshold",
    "text_config.sparse_attention_config.sparse_local_block": None,
    "vision_config.rope_mode": "2d",
    "vision_config.window_size": 112,
    "vision_feature_layer": -2,
    "audio_config": {"hidden_size": 1280},
}


def changed(path: str, value: object, *, quantized: bool | None = None) -> dict[str, Any]:
    """The released config with one key set, or taken out where the value is None."""
    config = released_config()
    if quantized or path.startswith("quantization_config"):
        config = {**config, "quantization_config": MXFP8}
    return with_key(config, path, value)


def with_key(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of a config with the key at that path set, or taken out where the value is None."""
    config = copy.deepcopy(config)
    *sections, key = path.split(".")
    holder = config
    for section in sections:
        holder = holder[section]
    if value is None:
        del holder[key]
    else:
        holder[key] = value
    return config


def write(folder: Path, config: dict[str, Any]) -> Path:
    """The config in a folder of its own, as the hosts read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
