"""Draft checkpoints beside a target's, and what the MTP module of one has to draft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from m3_plugin.testing.mtp_reference import MTPReference
from tests.integrations.cases import random_prompt
from tests.integrations.speculation import image, image_text

# (prompt, max_tokens) to the one request's answer and the drafts of each of its steps after the
# prompt; a prompt of text has `image` in it
Ask = Callable[[list[int] | str, int], tuple[list[int], list[list[int]]]]

# An EAGLE3 head for the released model: one Llama layer, as many KV heads as query heads, a
# vocabulary of its own.
LARGE_HEAD = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 200064,
    "draft_vocab_size": 32000,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
}


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


def require_the_references_drafts(checkpoint: Path, ask: Ask, *, scratch: Path) -> None:
    """All drafts are those of a plain torch reference of module 0.

    Of a few tokens over many steps, where every key of the module's own cache weighs; of many, past
    the budget; and of a text whose drafts need the picture in it.
    """
    from transformers import AutoProcessor

    reference = MTPReference(checkpoint, scratch=scratch)
    for prompt, max_tokens in ((random_prompt(5, seed=2), 10), (random_prompt(700, seed=1), 2)):
        answer, drafts = ask(prompt, max_tokens)
        for known, drafted in steps(answer, drafts):
            right = reference.draft([*prompt, *answer[:known]], num_drafts=len(drafted))
            assert drafted == right.token_ids, (len(prompt), known)
    text = image_text("water and ")
    inputs = AutoProcessor.from_pretrained(checkpoint)(
        text=text, images=[image()], return_tensors="pt"
    )
    token_ids = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask")
    (first, _), (drafted, *_) = ask(text, 2)
    seeing, blind = (
        reference.draft([*token_ids, first], num_drafts=len(drafted), text_only=text_only, **inputs)
        for text_only in (False, True)
    )
    assert drafted == seeing.token_ids
    assert blind.logprobs.sub(seeing.logprobs).abs().max() > 0.01


def steps(
    answer: Sequence[int], drafts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Sequence[int]]]:
    """Tokens of the answer that were known when each step's drafts were made, and the drafts."""
    known = 1
    for drafted in drafts:
        if known >= len(answer):
            return
        yield known, drafted
        for token in drafted:
            if answer[known : known + 1] != [token]:
                break
            known += 1
        known += 1
