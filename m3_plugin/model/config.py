"""Meaning of every MiniMax-M3 config field, for all published config.json dialects, in one place.

The rules come from the released checkpoint's config.json, the paper (arXiv 2606.13392) and the two
in-tree implementations; where those disagree the stricter reading is taken and a bad value is
refused with a `ValueError` that names the key, the rule and the value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m3_plugin.model.known_keys import require_known_keys
from m3_plugin.quantization.dialects import Quantization, read_quantization
from m3_plugin.untrusted import shown

# The page of every paged host holds one sparse block; kernels and cache layouts rely on it.
PAGED_BLOCK_SIZE = 128
# Far above any M3 (60 layers, 128 experts): names of every weight are made from these numbers.
MAX_LAYERS = 512
MAX_EXPERTS = 1024

Dialect = Literal["hub", "transformers"]


@dataclass(frozen=True)
class MSAConfig:
    """Sparse attention of one M3 model: which blocks a query row may choose, and how many.

    Attributes
    ----------
    num_index_heads : one index head per GQA group (index head g selects for KV head g)
    index_dim : channels of an index head
    block_size : tokens per block; blocks are anchored at sequence position 0
    topk_blocks : blocks attended per query row and group, forced ones included
    num_init_blocks : first blocks of the sequence that are always attended
    num_local_blocks : newest blocks, the query's own one included, that are always attended
    """

    num_index_heads: int
    index_dim: int
    block_size: int
    topk_blocks: int
    num_init_blocks: int
    num_local_blocks: int

    @property
    def dense_context(self) -> int:
        """Tokens up to which MSA equals dense attention: every visible block is chosen."""
        return self.block_size * self.topk_blocks


@dataclass(frozen=True)
class M3Config:
    """What an M3 checkpoint says about its text model; sizes are global, not per rank.

    `sparse_layers[i]` tells whether layer i uses MSA, `moe_layers[i]` whether its MLP is routed.
    `msa` is None when no layer is sparse, `quantization` when the checkpoint is not quantised.
    """

    dialect: Dialect
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rotary_dim: int
    rms_norm_eps: float
    dense_intermediate_size: int
    intermediate_size: int
    shared_intermediate_size: int
    num_shared_experts: int
    num_experts: int
    num_experts_per_token: int
    routed_scaling_factor: float
    use_routing_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    swiglu_beta: float
    sparse_layers: tuple[bool, ...]
    moe_layers: tuple[bool, ...]
    msa: MSAConfig | None
    num_mtp_modules: int
    quantization: Quantization | None

    @property
    def partial_rotary_factor(self) -> float:
        """Share of the head's channels that RoPE rotates."""
        return self.rotary_dim / self.head_dim

    @property
    def num_sparse_layers(self) -> int:
        """Layers that own index weights and an index-key cache."""
        return sum(self.sparse_layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> M3Config:
        """Read a Hugging Face config dict: hub layout, transformers-converted, or text part alone.

        Parameters
        ----------
        config : parsed config.json (or `PreTrainedConfig.to_dict()`); a `text_config` is entered,
            a `quantization_config` is looked for at both levels.

        Raises
        ------
        ValueError : a value M3 cannot be served with, or a key that nobody here knows; the message
            names key, rule and value.
        """
        text = _as_mapping(config.get("text_config"), key="text_config") or config
        fields = _Fields(text)
        num_layers = fields.positive_int("num_hidden_layers", limit=MAX_LAYERS)
        num_heads = fields.positive_int("num_attention_heads")
        num_kv_heads = fields.positive_int("num_key_value_heads")
        head_dim = fields.positive_int("head_dim")
        _require(
            num_heads % num_kv_heads == 0,
            key="num_attention_heads",
            rule=f"a multiple of num_key_value_heads={num_kv_heads}",
            value=num_heads,
        )
        _require_text_variant(fields)
        dialect: Dialect = "transformers" if "layer_types" in text else "hub"
        sparse_layers = _sparse_layers(fields, num_layers=num_layers)
        num_experts = fields.positive_int("num_local_experts", limit=MAX_EXPERTS)
        experts_per_token = fields.positive_int("num_experts_per_tok")
        _require(
            experts_per_token <= num_experts,
            key="num_experts_per_tok",
            rule=f"at most num_local_experts={num_experts}",
            value=experts_per_token,
        )
        intermediate_size = fields.positive_int("intermediate_size")
        quantization = _as_mapping(
            config.get("quantization_config") or text.get("quantization_config"),
            key="quantization_config",
        )
        read = cls(
            dialect=dialect,
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=fields.positive_int("hidden_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            rope_theta=_rope_theta(fields),
            rotary_dim=_rotary_dim(fields, head_dim=head_dim),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            dense_intermediate_size=fields.positive_int("dense_intermediate_size"),
            intermediate_size=intermediate_size,
            shared_intermediate_size=fields.integer("shared_intermediate_size", intermediate_size),
            # transformers' dialect has no key for it and always builds one shared expert
            num_shared_experts=fields.integer("n_shared_experts", 1),
            num_experts=num_experts,
            num_experts_per_token=experts_per_token,
            routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
            use_routing_bias=fields.flag("use_routing_bias", True),
            swiglu_alpha=fields.number("swiglu_alpha", 1.702),
            swiglu_limit=fields.number("swiglu_limit", 7.0),
            # the released config has no key for beta; the activation is (up + 1) * glu(gate)
            swiglu_beta=fields.number("swiglu_beta", 1.0),
            sparse_layers=sparse_layers,
            moe_layers=_moe_layers(fields, num_layers=num_layers),
            msa=_msa_config(fields, num_kv_heads=num_kv_heads) if any(sparse_layers) else None,
            num_mtp_modules=fields.integer("num_mtp_modules", 0, limit=MAX_LAYERS),
            quantization=read_quantization(quantization),
        )
        # last, because a wrong value is better named by the rule for it
        require_known_keys(config)
        return read

    def require_paged_host(self) -> None:
        """Refuse a block size that no paged host stores: page and sparse block must be one thing.

        Raises
        ------
        ValueError : the model has sparse layers whose block size is not 128.
        """
        if self.msa is not None:
            _require(
                self.msa.block_size == PAGED_BLOCK_SIZE,
                key="sparse_attention_config.sparse_block_size",
                rule=f"{PAGED_BLOCK_SIZE} on a paged host (one sparse block per cache page)",
                value=self.msa.block_size,
            )


@dataclass(frozen=True)
class _Fields:
    """One config dict with lookups that report the key they failed on."""

    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def positive_int(self, key: str, *, limit: int | None = None) -> int:
        number = _positive_int(self.values.get(key), key=key)
        return _limited(number, key=key, limit=limit)

    def integer(self, key: str, default: int, *, limit: int | None = None) -> int:
        return _limited(_integer(self.get(key, default), key=key), key=key, limit=limit)

    def number(self, key: str, default: float) -> float:
        return _number(self.get(key, default), key=key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        _require(value in (True, False), key=key, rule="true or false", value=value)
        return bool(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        return _as_mapping(self.values.get(key), key=key) or {}


def _require(ok: bool, *, key: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"config key {key!r} must be {rule}; got {shown(value)}")


def _as_mapping(value: object, *, key: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    _require(isinstance(value, Mapping), key=key, rule="a mapping", value=value)
    assert isinstance(value, Mapping)
    return value


def _integer(value: object, *, key: str) -> int:
    ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    _require(ok, key=key, rule="an integer, zero or positive, below 2**31", value=value)
    assert isinstance(value, int)
    return value


def _limited(number: int, *, key: str, limit: int | None) -> int:
    ok = limit is None or number <= limit
    _require(ok, key=key, rule=f"at most {limit} for any MiniMax-M3", value=number)
    return number


def _positive_int(value: object, *, key: str) -> int:
    number = _integer(value, key=key)
    _require(number > 0, key=key, rule="a positive integer", value=value)
    return number


def _number(value: object, *, key: str) -> float:
    # infinity too is JSON for Python
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    _require(ok, key=key, rule="a positive number below 1e30", value=value)
    assert isinstance(value, int | float)
    return float(value)


def _flags(value: object, *, key: str, length: int) -> tuple[bool, ...]:
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
    _require(ok, key=key, rule=f"a list of {length} flags, one per layer", value=value)
    assert isinstance(value, Sequence)
    return tuple(bool(flag) for flag in value)


def _layer_types(value: object, *, key: str, length: int, names: Mapping[str, bool]) -> tuple:
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
    _require(ok, key=key, rule=f"a list of {length} layer types", value=value)
    assert isinstance(value, Sequence)
    for index, name in enumerate(value):
        known = isinstance(name, str) and name in names
        _require(known, key=f"{key}[{index}]", rule=f"one of {sorted(names)}", value=name)
    return tuple(names[name] for name in value)


def _require_text_variant(fields: _Fields) -> None:
    """The branches M3 does not take are refused, not guessed."""
    for key, wanted in {
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
    }.items():
        value = fields.get(key, wanted)
        _require(value == wanted, key=key, rule=f"{wanted!r} for MiniMax-M3", value=value)
    # transformers rewrites the released "swigluoai" to "silu" in memory and still computes
    # SwiGLU-OAI; both names therefore mean the same activation here.
    act = fields.get("hidden_act", "swigluoai")
    _require(
        act in ("swigluoai", "silu"),
        key="hidden_act",
        rule="'swigluoai' (or 'silu' as transformers writes it)",
        value=act,
    )


def _rope_parameters(fields: _Fields) -> Mapping[str, Any]:
    parameters = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    _require(
        rope_type in (None, "default"),
        key="rope_parameters.rope_type",
        rule="absent or 'default' (M3 is trained to its full context without RoPE scaling; "
        "remove the override)",
        value=rope_type,
    )
    return parameters


def _rope_theta(fields: _Fields) -> float:
    value = fields.get("rope_theta", _rope_parameters(fields).get("rope_theta"))
    return _number(value, key="rope_theta")


def _rotary_dim(fields: _Fields, *, head_dim: int) -> int:
    """`rotary_dim` and `partial_rotary_factor` say the same thing and must agree.

    transformers reads only the factor, SGLang only `rotary_dim`, vLLM only the factor: a config
    with both and a contradiction would give three different models.
    """
    dim = fields.get("rotary_dim")
    factor = fields.get(
        "partial_rotary_factor", _rope_parameters(fields).get("partial_rotary_factor")
    )
    _require(
        dim is not None or factor is not None,
        key="rotary_dim",
        rule="given, or partial_rotary_factor be given",
        value=None,
    )
    if factor is not None:
        from_factor = round(head_dim * _number(factor, key="partial_rotary_factor"))
        _require(
            dim is None or dim == from_factor,
            key="rotary_dim",
            rule=f"head_dim * partial_rotary_factor = {head_dim} * {factor} = {from_factor}",
            value=dim,
        )
        dim = from_factor
    dim = _positive_int(dim, key="rotary_dim")
    _require(
        dim <= head_dim and dim % 2 == 0,
        key="rotary_dim",
        rule=f"even and at most head_dim={head_dim}",
        value=dim,
    )
    return dim


def _sparse_layers(fields: _Fields, *, num_layers: int) -> tuple[bool, ...]:
    if fields.get("layer_types") is not None:
        names = {"minimax_m3_sparse": True, "full_attention": False}
        return _layer_types(
            fields.get("layer_types"), key="layer_types", length=num_layers, names=names
        )
    sparse = fields.mapping("sparse_attention_config")
    if not sparse or not sparse.get("use_sparse_attention", True):
        return (False,) * num_layers
    return _flags(
        sparse.get("sparse_attention_freq"),
        key="sparse_attention_config.sparse_attention_freq",
        length=num_layers,
    )


def _moe_layers(fields: _Fields, *, num_layers: int) -> tuple[bool, ...]:
    if fields.get("mlp_layer_types") is not None:
        names = {"sparse": True, "dense": False}
        return _layer_types(
            fields.get("mlp_layer_types"), key="mlp_layer_types", length=num_layers, names=names
        )
    return _flags(fields.get("moe_layer_freq"), key="moe_layer_freq", length=num_layers)


def _msa_config(fields: _Fields, *, num_kv_heads: int) -> MSAConfig:
    sparse = fields.mapping("sparse_attention_config")
    prefix = "sparse_attention_config."
    if not sparse:
        # transformers flattens the section into index_* keys and knows no init blocks
        sparse = {
            "sparse_num_index_heads": fields.get("index_n_heads"),
            "sparse_index_dim": fields.get("index_head_dim"),
            "sparse_block_size": fields.get("index_block_size"),
            "sparse_topk_blocks": fields.get("index_topk_blocks"),
            "sparse_local_block": fields.get("index_local_blocks"),
        }
    _require(
        sparse.get("sparse_local_block") is not None,
        key=f"{prefix}sparse_local_block",
        rule="given (the hosts disagree on its default: 0 or 1)",
        value=None,
    )
    score_type = sparse.get("sparse_score_type", "max")
    _require(
        score_type == "max",
        key=f"{prefix}sparse_score_type",
        rule="'max' (block score = maximum over the block's keys)",
        value=score_type,
    )
    _require_no_index_value(fields, sparse, key=f"{prefix}sparse_disable_index_value")
    num_index_heads = _positive_int(
        sparse.get("sparse_num_index_heads"), key=f"{prefix}sparse_num_index_heads"
    )
    _require(
        num_index_heads == num_kv_heads,
        key=f"{prefix}sparse_num_index_heads",
        rule=f"num_key_value_heads={num_kv_heads} (index head g selects for KV head g)",
        value=num_index_heads,
    )
    topk = _positive_int(sparse.get("sparse_topk_blocks"), key=f"{prefix}sparse_topk_blocks")
    local = _integer(sparse["sparse_local_block"], key=f"{prefix}sparse_local_block")
    init = _integer(sparse.get("sparse_init_block") or 0, key=f"{prefix}sparse_init_block")
    _require(
        init + local <= topk,
        key=f"{prefix}sparse_topk_blocks",
        rule=f"at least sparse_init_block + sparse_local_block = {init + local}",
        value=topk,
    )
    return MSAConfig(
        num_index_heads=num_index_heads,
        index_dim=_positive_int(sparse.get("sparse_index_dim"), key=f"{prefix}sparse_index_dim"),
        block_size=_positive_int(sparse.get("sparse_block_size"), key=f"{prefix}sparse_block_size"),
        topk_blocks=topk,
        num_init_blocks=init,
        num_local_blocks=local,
    )


def _require_no_index_value(fields: _Fields, sparse: Mapping[str, Any], *, key: str) -> None:
    """The index-value path has no weights in any M3 checkpoint; a config that enables it lies."""
    disabled = sparse.get("sparse_disable_index_value")
    if disabled is None:
        return
    layers = _sparse_layers(fields, num_layers=fields.positive_int("num_hidden_layers"))
    if isinstance(disabled, bool | int):
        disabled = [disabled] * len(layers)
    flags = _flags(disabled, key=key, length=len(layers))
    enabled = [
        i
        for i, (is_sparse, off) in enumerate(zip(layers, flags, strict=True))
        if is_sparse and not off
    ]
    _require(
        not enabled,
        key=key,
        rule="1 on every sparse layer (the index value path is not part of M3)",
        value=f"enabled on layers {enabled}",
    )


def local_heads(num_heads: int, tp_size: int) -> int:
    """Heads of one rank: an even share, or one replicated head when ranks exceed heads.

    Raises
    ------
    ValueError : neither number divides the other.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size must be at least 1; got {tp_size}")
    small, large = sorted((num_heads, tp_size))
    if large % small:
        raise ValueError(
            f"tp_size must divide the {num_heads} heads or be a multiple of them; got {tp_size}"
        )
    return max(1, num_heads // tp_size)
