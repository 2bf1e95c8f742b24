"""Names of the tensors a MiniMax-M3 checkpoint must hold, so that no loader can miss one silently.

Hosts track loading by *parameter*: a fused parameter counts as loaded once any of its parts is, so
a missing expert or a lost `index_k_proj` goes unnoticed there. The names below are the official
ones, relative to the text model: `model...` and `lm_head...`, without the hub's `language_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from m3_plugin.model.config import M3Config

TEXT_PREFIX = "language_model."
EMBEDDING = "model.embed_tokens."
MTP_PREFIX = "model.mtp.layers."
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MTP = re.compile(r"(^|\.)mtp\.")
# The draft model that M3.1 is published with, in a folder or under names of its own.
_DSPARK = re.compile(r"(language_model\.)?(model\.)?dspark\.")
# How transformers calls them in memory, and writes with `save_original_format=False`.
_OF_TRANSFORMERS = re.compile(
    r"model\.(language_model|vision_tower|multi_modal_projector)\.|model\.layers\.\d+\."
    r"(mlp\.experts\.(gate_up|down)_proj$|self_attn\.indexer\.)"
)
# What its conversion back to the published names gets wrong.
_SAVED_BY_TRANSFORMERS = re.compile(
    r"model\.layers\.\d+\.block_sparse_moe\.(gate|up|down)_proj\.weight$"
)
_INDEX_BRANCH = re.compile(r"(.+\.self_attn)\.index_[qk]_(?:proj|norm)\.")
_MTP_LAYER = re.compile(r"(?:^|\.)mtp\.layers\.(\d+)\.")


def is_mtp_tensor(name: str) -> bool:
    """Whether a tensor belongs to a multi-token-prediction module, which the target never loads."""
    return _MTP.search(name) is not None


def is_draft_tensor(name: str) -> bool:
    """Whether a tensor belongs to a model that drafts for the target, which never loads it."""
    return is_mtp_tensor(name) or _DSPARK.match(name) is not None


def is_tensor_of_draft(name: str, *, num_modules: int) -> bool:
    """Whether a tensor belongs to one of the first `num_modules` MTP modules."""
    match = _MTP_LAYER.search(name)
    return match is not None and int(match.group(1)) < num_modules


def layer_prefixes(config: M3Config, *, draft: bool = False) -> tuple[str, ...]:
    """Names of a model's decoder layers, in order.

    Parameters
    ----------
    config : the target, or the draft as a model of its own (`m3_plugin.model.mtp.mtp_config`)
    draft : whether it is the draft, whose layers are its modules'
    """
    name = f"{MTP_PREFIX}{{}}.transformer_layer" if draft else "model.layers.{}"
    return tuple(name.format(layer) for layer in range(config.num_hidden_layers))


def text_modules(config: M3Config, *, layers: Iterable[int] | None = None) -> frozenset[str]:
    """Modules whose weights a text model must find: names as in the checkpoint, without suffix.

    Parameters
    ----------
    config : the model
    layers : decoder layers to list; all by default (a pipeline stage passes its own)
    """
    names = {"model.embed_tokens", "model.norm", "lm_head"}
    for layer in range(config.num_hidden_layers) if layers is None else layers:
        names |= _layer_modules(
            config,
            f"model.layers.{layer}",
            sparse=config.sparse_layers[layer],
            moe=config.moe_layers[layer],
        )
    return frozenset(names)


def mtp_modules(config: M3Config, *, num_modules: int) -> frozenset[str]:
    """Modules whose weights the draft model of `num_modules` MTP modules must find.

    Embedding and head are the target's and not listed; a separate draft checkpoint may repeat them.
    """
    names = set()
    for index in range(num_modules):
        module = f"{MTP_PREFIX}{index}"
        names |= {f"{module}.{part}" for part in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
        names |= _layer_modules(config, f"{module}.transformer_layer", sparse=True, moe=True)
    return frozenset(names)


def count_mtp_modules(names: Iterable[str]) -> int:
    """How many MTP modules a checkpoint with tensors of these names holds.

    Counted from the tensors because config.json does not tell: the released one says 7 beside a
    checkpoint without any.

    Raises
    ------
    ValueError : modules are not numbered 0, 1, ... without a gap.
    """
    found = {int(match.group(1)) for name in names if (match := _MTP_LAYER.search(name))}
    if found != set(range(len(found))):
        raise ValueError(
            f"MTP modules must be numbered from 0 without a gap, got {sorted(found)}; "
            "check that all shards of the checkpoint are there"
        )
    return len(found)


def _layer_modules(config: M3Config, prefix: str, *, sparse: bool, moe: bool) -> set[str]:
    """Modules of one decoder layer whose names begin with `prefix`."""
    names = {f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"}
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"]
    if sparse:
        attention += ["index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"]
    names |= {f"{prefix}.self_attn.{module}" for module in attention}
    mlp = ["gate_proj", "up_proj", "down_proj"]
    if not moe:
        return names | {f"{prefix}.mlp.{module}" for module in mlp}
    experts = f"{prefix}.block_sparse_moe"
    names.add(f"{experts}.gate")
    if config.use_routing_bias:
        names.add(f"{experts}.e_score_correction_bias")
    if config.num_shared_experts:
        names |= {f"{experts}.shared_experts.{module}" for module in mlp}
    return names | {
        f"{experts}.experts.{expert}.{module}"
        for expert in range(config.num_experts)
        for module in ("w1", "w2", "w3")
    }


def linear_shape(config: M3Config, module: str) -> tuple[int, int]:
    """[rows, columns] of a linear weight of the text model or its draft, named relative to it.

    Raises
    ------
    KeyError : not a linear weight of M3.
    """
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projection = module.rpartition(".")[2]
    if projection.startswith("index_"):
        assert config.msa is not None
        heads = {"index_q_proj": config.msa.num_index_heads, "index_k_proj": 1}[projection]
        return heads * config.msa.index_dim, hidden
    if module == "lm_head":
        return config.vocab_size, hidden
    if projection == "eh_proj":
        return hidden, 2 * hidden
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    if ".self_attn." in module:
        return attention[projection]
    if ".shared_experts." in module:
        width = config.shared_intermediate_size * config.num_shared_experts
    elif ".experts." in module:
        width = config.intermediate_size
    else:
        width = config.dense_intermediate_size
    up, down = (width, hidden), (hidden, width)
    shapes = {"gate_proj": up, "up_proj": up, "down_proj": down, "w1": up, "w3": up, "w2": down}
    return shapes[projection]


def tensor_shape(config: M3Config, module: str) -> tuple[int, ...]:
    """Shape of the plain weight of any module of the text model or its draft.

    Parameters
    ----------
    module : one of `text_modules` or `mtp_modules`
    """
    own = module.rpartition(".")[2]
    if own in ("q_norm", "k_norm"):
        return (config.head_dim,)
    if own in ("index_q_norm", "index_k_norm"):
        assert config.msa is not None
        return (config.msa.index_dim,)
    if own.endswith(("norm", "layernorm")):
        return (config.hidden_size,)
    if own == "gate":
        return (config.num_experts, config.hidden_size)
    if own == "e_score_correction_bias":
        return (config.num_experts,)
    if own == "embed_tokens":
        return (config.vocab_size, config.hidden_size)
    return linear_shape(config, module)


def layer_of(name: str) -> int | None:
    """Decoder layer a tensor belongs to, None outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def is_of_stage(name: str, *, layers: range, embedding: bool, last: bool) -> bool:
    """Whether a tensor belongs to a pipeline stage.

    Parameters
    ----------
    name : relative to the text model
    layers : decoder layers of the stage
    embedding : whether it holds the embedding
    last : whether it holds the final norm and the head
    """
    layer = layer_of(name)
    if layer is not None:
        return layer in layers
    return embedding if name.startswith(EMBEDDING) else last


def expert_of(module: str) -> int | None:
    """Routed expert a module belongs to, None outside the routed experts."""
    match = _EXPERT.search(module)
    return int(match.group(1)) if match else None


@dataclass
class TensorLedger:
    """Keeps account of the tensors seen against those the config promises.

    A tensor belongs to module M when it is named M or M.<suffix>: quantised checkpoints add scales
    beside (or instead of) `weight`, and which suffixes exist is the quantisation's own affair.

    Modules of `optional` may be there or not: experts of other ranks, which a host need not read.

    Index branches are not read, and not left over, where the config declares every layer dense: so
    the same files can be served both ways and compared.
    """

    expected: frozenset[str]
    optional: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)
    leftover: list[str] = field(default_factory=list)

    def add(self, name: str) -> bool:
        """Record one tensor; False when the model has no module that reads it."""
        module = self.module_of(name)
        if module is not None:
            self.seen.add(module)
            return True
        if not self.is_unread(name):
            self.leftover.append(name)
        return False

    def module_of(self, name: str) -> str | None:
        """The expected module a tensor belongs to, None if there is none."""
        parents = (name, name.rpartition(".")[0])
        return next((module for module in parents if module in self.expected), None)

    def is_unread(self, name: str) -> bool:
        """Whether a tensor is of an index branch in a model whose layers are all dense."""
        branch = _INDEX_BRANCH.match(name)
        if branch is None or not self.knows_attention(branch.group(1)):
            return False
        return not any(".index_" in module for module in self.expected)

    def knows_attention(self, module: str) -> bool:
        """Whether the config has an attention module of that name, which itself has no weight."""
        return f"{module}.k_proj" in self.expected

    def require_complete(self, *, partial: bool = False) -> None:
        """Refuse a checkpoint with tensors missing or left over.

        Parameters
        ----------
        partial : more of it may come later, so that none counts as missing

        Raises
        ------
        ValueError : names the first few of either and counts the rest.
        """
        missing = [] if partial else sorted(self.expected - self.optional - self.seen)
        problems = []
        if missing:
            problems.append(f"missing {_sample(missing)}")
        if self.leftover:
            problems.append(f"left over {_sample(sorted(self.leftover))}")
        if problems:
            raise ValueError(
                f"checkpoint does not match its config.json: {'; '.join(problems)}. "
                + _cure(self.leftover)
            )


def _cure(leftover: Iterable[str]) -> str:
    """What to do about tensors of other names, by whose names they are."""
    names = list(leftover)
    if any(_OF_TRANSFORMERS.match(name) for name in names):
        return (
            "These are transformers' own names; save the model once more with "
            "save_pretrained(FOLDER, save_original_format=True)."
        )
    if any(_SAVED_BY_TRANSFORMERS.match(name) for name in names):
        return (
            "transformers 5.19 saves the MLP of dense layers under the name of the experts; rename "
            "layers.N.block_sparse_moe.{gate,up,down}_proj.weight to layers.N.mlp.* in the files "
            "and their index."
        )
    return "Check that all shards are there and that the config is the checkpoint's own."


def _sample(names: list[str], *, limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor(s): {', '.join(names[:limit])}{more}"


def require_mtp_modules(tensor_names: Iterable[str], *, checkpoint: str) -> int:
    """Number of MTP modules in a checkpoint that is to draft with them.

    Raises
    ------
    ValueError : it holds none.
    """
    count = count_mtp_modules(tensor_names)
    if count == 0:
        raise ValueError(
            f"{checkpoint} holds no MTP weights (model.mtp.layers.*), as no public MiniMax-M3 "
            "checkpoint does, so it cannot draft with MTP: use an EAGLE3 head trained for "
            "MiniMax-M3 (method EAGLE3 with its own draft checkpoint) or n-gram drafting instead."
        )
    return count
