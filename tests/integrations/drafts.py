"""Draft checkpoints beside a target's, in the layouts both hosts read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def separate_mtp(target: Path, folder: Path) -> Path:
    """The target's MTP modules as a checkpoint of their own, with a flat config."""
    folder.mkdir()
    tensors = {}
    for shard in target.glob("*.safetensors"):
        tensors |= {
            name.removeprefix("language_model."): tensor
            for name, tensor in load_file(shard).items()
            if ".mtp." in name
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())["text_config"]
    config |= {"architectures": ["MiniMaxM3MTP"], "model_type": "minimax_m3_mtp"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def eagle3_head(target: Path, folder: Path, *, aux_layers: tuple[int, ...], seed: int = 0) -> Path:
    """A random EAGLE3 head of one Llama layer: the format in which heads for M3 are published."""
    text = json.loads((target / "config.json").read_text())["text_config"]
    hidden, vocab, heads, head_dim = text["hidden_size"], text["vocab_size"], 4, 64
    intermediate = 2 * hidden
    shapes = {
        "fc.weight": (hidden, len(aux_layers) * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        **{f"midlayer.self_attn.{n}_proj.weight": (heads * head_dim, 2 * hidden) for n in "qkv"},
        "midlayer.self_attn.o_proj.weight": (hidden, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": (intermediate, hidden),
        "midlayer.mlp.up_proj.weight": (intermediate, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, intermediate),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        if len(shape) > 1
        else torch.ones(shape)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "eagle_aux_hidden_state_layer_ids": list(aux_layers),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "vocab_size": vocab,
        "draft_vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
