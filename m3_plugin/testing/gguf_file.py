"""A test checkpoint as one GGUF file, for llama.cpp and whatever else reads that format.

Metadata and tensor names are those of llama.cpp's architecture `minimax-m3`; text only, as that is.
The tensors are the checkpoint's own numbers in its own data type, but for what llama.cpp's
converter changes too: norms hold 1 + w, the experts of a layer lie in one tensor, and what is small
or decides (norms, router, index projections) is float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3_plugin.checkpoint.headers import INDEX_FILE
from m3_plugin.testing.hub_layout import BOS_TOKEN, EOS_TOKEN, GGUF_FILE

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "minimax-m3"
# The published tokenizer's name in llama.cpp. It never cuts a word here: words are found first.
PRE_TOKENIZER = "minimax-m2"
SIGMOID_GATES = 2

_PREFIX = "language_model.model."
_WHOLE = {
    "token_embd.weight": "language_model.model.embed_tokens.weight",
    "output_norm.weight": "language_model.model.norm.weight",
    "output.weight": "language_model.lm_head.weight",
}
_ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_DENSE_MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_INDEX = {
    "indexer.q_proj.weight": "self_attn.index_q_proj.weight",
    "indexer.k_proj.weight": "self_attn.index_k_proj.weight",
    "indexer.q_norm.weight": "self_attn.index_q_norm.weight",
    "indexer.k_norm.weight": "self_attn.index_k_norm.weight",
}
_ROUTED_MLP = {
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
    "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
    "ffn_gate_shexp.weight": "block_sparse_moe.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "block_sparse_moe.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "block_sparse_moe.shared_experts.down_proj.weight",
}
# w1 is the gate, w3 the up and w2 the down projection
_EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}


@dataclass(frozen=True)
class Source:
    """Where a tensor of the file comes from.

    Attributes
    ----------
    names : of the checkpoint's tensors; several are stacked along a new first axis
    plus_one : a norm's weight, to which llama.cpp adds no one of its own
    float32 : whatever the checkpoint is stored in
    """

    names: tuple[str, ...]
    plus_one: bool = False
    float32: bool = False


def require_gguf() -> None:
    """Refuse to begin without the library that writes the format.

    Raises
    ------
    LookupError : it cannot be imported.
    """
    if find_spec("gguf") is None:
        raise LookupError(
            "a GGUF file is written by the library gguf, which cannot be imported: pip install gguf"
        )


def write_gguf(checkpoint: Path) -> Path:
    """Write the language model of a checkpoint folder made here as `model.gguf` into that folder.

    Returns
    -------
    Path : of the file

    Raises
    ------
    LookupError : the library `gguf` is missing.
    ValueError : the format has no words for what this checkpoint is.
    """
    require_gguf()
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    folder = _Folder(checkpoint)
    file = checkpoint / GGUF_FILE
    writer = GGUFWriter(file, ARCHITECTURE)
    _add_metadata(writer, folder.config["text_config"])
    _add_tokenizer(writer, folder)
    for name, source in tensor_sources(folder.config["text_config"]).items():
        tensor = folder.tensor(source)
        if tensor.itemsize == 4:
            writer.add_tensor(name, tensor.numpy())
        else:
            # numpy has no bfloat16, so the bytes go in and the type beside them
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensor_sources(text_config: Mapping[str, Any]) -> dict[str, Source]:
    """Every tensor of the file, by its name there.

    Parameters
    ----------
    text_config : of config.json

    Raises
    ------
    ValueError : names the key that the architecture has no words for.
    """
    num_dense = _leading_dense(text_config)
    found = {name: _source(name, origin) for name, origin in _WHOLE.items()}
    for layer in range(text_config["num_hidden_layers"]):
        origins = {**_ATTENTION, **(_DENSE_MLP if layer < num_dense else {**_INDEX, **_ROUTED_MLP})}
        for name, origin in origins.items():
            found[f"blk.{layer}.{name}"] = _source(name, f"{_PREFIX}layers.{layer}.{origin}")
        for name, matrix in _EXPERTS.items() if layer >= num_dense else ():
            moe = f"{_PREFIX}layers.{layer}.block_sparse_moe.experts"
            experts = range(text_config["num_local_experts"])
            found[f"blk.{layer}.{name}"] = Source(
                tuple(f"{moe}.{e}.{matrix}.weight" for e in experts)
            )
    return found


def _source(name: str, origin: str) -> Source:
    norm = origin.endswith("norm.weight")
    decides = name in _INDEX or name in ("ffn_gate_inp.weight", "exp_probs_b.bias")
    return Source((origin,), plus_one=norm, float32=norm or decides)


def _leading_dense(text_config: Mapping[str, Any]) -> int:
    """How many layers, all of them at the beginning, are dense; everything else is checked too."""
    sparse = text_config["sparse_attention_config"]
    routed = list(text_config["moe_layer_freq"])
    num_dense = routed.index(1) if 1 in routed else len(routed)
    behind = [0] * num_dense + [1] * (len(routed) - num_dense)
    fixed = {
        "moe_layer_freq": (routed, behind),
        "sparse_attention_freq": (list(sparse["sparse_attention_freq"]), behind),
        "sparse_init_block": (sparse["sparse_init_block"], 0),
        "sparse_score_type": (sparse["sparse_score_type"], "max"),
        "shared_intermediate_size": (
            text_config["shared_intermediate_size"],
            text_config["intermediate_size"],
        ),
        "scoring_func": (text_config["scoring_func"], "sigmoid"),
        "swiglu_alpha": (text_config["swiglu_alpha"], 1.702),
        "swiglu_limit": (text_config["swiglu_limit"], 7.0),
    }
    for key, (given, only) in fixed.items():
        if given != only:
            raise ValueError(
                f"a GGUF file of {ARCHITECTURE} has no words for {key} {given}, only for {only}: "
                "its sparse layers, all behind the dense ones, choose by score alone"
            )
    return num_dense


def _add_metadata(writer: Any, text_config: Mapping[str, Any]) -> None:
    sparse = text_config["sparse_attention_config"]
    stored_as_float32 = text_config["torch_dtype"] == "float32"
    writer.add_string("general.name", "MiniMax-M3 test checkpoint of m3-plugin")
    writer.add_uint32("general.file_type", 0 if stored_as_float32 else 32)
    integers = {
        "context_length": text_config["max_position_embeddings"],
        "embedding_length": text_config["hidden_size"],
        "block_count": text_config["num_hidden_layers"],
        "leading_dense_block_count": _leading_dense(text_config),
        "feed_forward_length": text_config["dense_intermediate_size"],
        "vocab_size": text_config["vocab_size"],
        "attention.head_count": text_config["num_attention_heads"],
        "attention.head_count_kv": text_config["num_key_value_heads"],
        "attention.key_length": text_config["head_dim"],
        "attention.value_length": text_config["head_dim"],
        "attention.indexer.head_count": sparse["sparse_num_index_heads"],
        "attention.indexer.key_length": sparse["sparse_index_dim"],
        "attention.indexer.top_k": sparse["sparse_topk_blocks"],
        "attention.indexer.block_size": sparse["sparse_block_size"],
        "attention.indexer.local_blocks": sparse["sparse_local_block"],
        "rope.dimension_count": text_config["rotary_dim"],
        "expert_count": text_config["num_local_experts"],
        "expert_used_count": text_config["num_experts_per_tok"],
        "expert_shared_count": text_config["n_shared_experts"],
        "expert_feed_forward_length": text_config["intermediate_size"],
        "expert_gating_func": SIGMOID_GATES,
    }
    for key, value in integers.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    reals = {
        "attention.layer_norm_rms_epsilon": text_config["rms_norm_eps"],
        "rope.freq_base": text_config["rope_theta"],
        "expert_weights_scale": text_config["routed_scaling_factor"],
    }
    for key, value in reals.items():
        writer.add_float32(f"{ARCHITECTURE}.{key}", float(value))
    writer.add_bool(f"{ARCHITECTURE}.expert_weights_norm", True)


def _add_tokenizer(writer: Any, folder: _Folder) -> None:
    """Words are user-defined tokens: engines find those before a pre-tokenizer cuts the text.

    So " amber?" stays one token whatever the engine's rules are. Every word begins with its only
    space and longer ones are looked for first, hence a text of words has one reading.
    """
    from gguf import TokenType

    texts, types = [], []
    for text, kind in folder.tokens:
        texts.append(text)
        types.append(int(TokenType[kind]))
    for at in range(len(texts), folder.config["text_config"]["vocab_size"]):
        # rows behind the tokenizer's ids
        texts.append(f"[PAD{at}]")
        types.append(int(TokenType.UNUSED))
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", PRE_TOKENIZER)
    writer.add_array("tokenizer.ggml.tokens", texts)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_array("tokenizer.ggml.merges", [folder.merge])
    writer.add_uint32("tokenizer.ggml.bos_token_id", texts.index(BOS_TOKEN))
    writer.add_uint32("tokenizer.ggml.eos_token_id", texts.index(EOS_TOKEN))
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    template = (folder.path / "chat_template.jinja").read_text(encoding="utf-8")
    writer.add_string("tokenizer.chat_template", template)


class _Folder:
    """What a checkpoint folder written here holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        self._tokenizer = _read_json(path / "tokenizer.json")
        self._shard_of = _read_json(path / INDEX_FILE)["weight_map"]

    def tensor(self, source: Source) -> torch.Tensor:
        """A tensor as the file stores it."""
        import torch

        parts = [self._stored(name) for name in source.names]
        tensor = parts[0] if len(parts) == 1 else torch.stack(parts)
        if source.float32 or tensor.dtype is not torch.bfloat16:
            tensor = tensor.float()
        return tensor + 1.0 if source.plus_one else tensor

    def _stored(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.path / self._shard_of[name], framework="pt") as shard:
            return shard.get_tensor(name)

    @cached_property
    def tokens(self) -> Sequence[tuple[str, str]]:
        """Per id its text and GGUF token type; bytes and the merged word are spelled in bytes."""
        return list(self._tokens())

    def _tokens(self) -> Iterator[tuple[str, str]]:
        from tokenizers import decoders

        decoder = decoders.ByteLevel()
        added = {token["id"]: token["special"] for token in self._tokenizer["added_tokens"]}
        ids = self._tokenizer["model"]["vocab"]
        for entry, token_id in sorted(ids.items(), key=lambda item: item[1]):
            if token_id in added:
                yield entry, "CONTROL" if added[token_id] else "USER_DEFINED"
            elif len(entry) == 1 or (len(entry) == 2 and entry == self._merged):
                yield entry, "NORMAL"
            else:
                yield decoder.decode([entry]), "USER_DEFINED"

    @property
    def merge(self) -> str:
        """The one merge rule; llama.cpp reads no vocabulary of bytes without any."""
        return " ".join(self._merged[:2])

    @cached_property
    def _merged(self) -> str:
        """A word of two bytes, which the rule makes; without one, a word that it begins."""
        added = {token["content"] for token in self._tokenizer["added_tokens"]}
        words = [w for w in self._tokenizer["model"]["vocab"] if len(w) > 1 and w not in added]
        return next((word for word in words if len(word) == 2 and word[1].isalpha()), words[0])


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
