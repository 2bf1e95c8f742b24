"""Does MiniMax-M3 fit, and with how much context? Weights and caches per rank, from its config.

Computed, not measured: weights and cache bytes follow from shapes and formats; what a server needs
beside them (activations, graphs, communication, the CUDA context) is an allowance the caller sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from m3_plugin.model.config import PAGED_BLOCK_SIZE, M3Config, local_heads
from m3_plugin.quantization.dialects import PLAIN, Quantization
from m3_plugin.quantization.formats import stored_bytes
from m3_plugin.sizing.cache_bytes import CacheBytes, CacheDType, cache_bytes_per_token
from m3_plugin.untrusted import shown

GIB = 2**30
# What a server may use of a device, and what it needs beside weights and cache: allowances.
UTILIZATION = 0.9
RESERVE = 6 * GIB

Split = Literal["ranks", "kv heads", "none"]


@dataclass(frozen=True)
class Weight:
    """Equal weights of the model.

    Attributes
    ----------
    module : name relative to the text model, which tells how it is stored; empty for what no
        exporter quantises
    shape : of one of them
    copies : how many there are
    split : over all ranks, by KV head (replicated beyond their number), or a copy on every rank
    plain_bytes : bytes per number where it is not quantised
    """

    module: str
    shape: tuple[int, ...]
    split: Split
    copies: int = 1
    plain_bytes: int = 2


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights: all of them, and those of one tensor parallel rank."""

    total: int
    per_rank: int


@dataclass(frozen=True)
class Fit:
    """What is left for the cache of one rank, and what goes into it.

    Attributes
    ----------
    budget : bytes for the cache of one rank; negative when the weights alone are too large
    cache : bytes per token and rank
    tokens : tokens of all requests together, in whole pages
    longest_context : of one request, within the model's positions
    requests : that fit at once at `context` tokens each
    """

    budget: int
    cache: CacheBytes
    tokens: int
    longest_context: int
    context: int
    requests: int


def text_weights(config: M3Config) -> Iterator[Weight]:
    """Every weight of the text model; one of a layer's experts stands for all of them."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield Weight("model.embed_tokens", (config.vocab_size, hidden), "ranks")
    yield Weight("lm_head", (config.vocab_size, hidden), "ranks")
    yield Weight("model.norm", (hidden,), "none")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield Weight(f"{prefix}.input_layernorm", (hidden,), "none", copies=2)
        yield Weight(f"{attention}.q_norm", (head,), "none", copies=2)
        yield Weight(f"{attention}.q_proj", (queries, hidden), "ranks")
        yield Weight(f"{attention}.k_proj", (keys, hidden), "kv heads")
        yield Weight(f"{attention}.v_proj", (keys, hidden), "kv heads")
        yield Weight(f"{attention}.o_proj", (hidden, queries), "ranks")
        if config.msa is not None and config.sparse_layers[layer]:
            index = config.msa.index_dim
            index_queries = config.msa.num_index_heads * index
            yield Weight(f"{attention}.index_q_norm", (index,), "none", copies=2)
            yield Weight(f"{attention}.index_q_proj", (index_queries, hidden), "kv heads")
            yield Weight(f"{attention}.index_k_proj", (index, hidden), "none")
        if not config.moe_layers[layer]:
            yield from _mlp(f"{prefix}.mlp", hidden, config.dense_intermediate_size)
            continue
        moe, experts = f"{prefix}.block_sparse_moe", config.num_experts
        yield Weight("", (experts, hidden), "none", plain_bytes=4)
        if config.use_routing_bias:
            yield Weight("", (experts,), "none", plain_bytes=4)
        if config.num_shared_experts:
            shared = config.num_shared_experts * config.shared_intermediate_size
            yield from _mlp(f"{moe}.shared_experts", hidden, shared)
        inner = config.intermediate_size
        for name, shape in (
            ("w1", (inner, hidden)),
            ("w2", (hidden, inner)),
            ("w3", (inner, hidden)),
        ):
            yield Weight(f"{moe}.experts.0.{name}", shape, "ranks", copies=experts)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Weight]:
    yield Weight(f"{prefix}.gate_proj", (inner, hidden), "ranks")
    yield Weight(f"{prefix}.up_proj", (inner, hidden), "ranks")
    yield Weight(f"{prefix}.down_proj", (hidden, inner), "ranks")


def vision_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    """Tower and projector of a top-level config.json: a copy on every rank in this plugin."""
    vision = config.get("vision_config")
    if not vision:
        return
    if not isinstance(vision, Mapping):
        raise ValueError(f"config key 'vision_config' must be a mapping; got {shown(vision)}")
    text = config.get("text_config") or config
    hidden = _length(text, "hidden_size")
    width, inner = _length(vision, "hidden_size"), _length(vision, "intermediate_size")
    compression = vision.get("img_token_compression_config") or {}
    frames = _length(compression, "temporal_patch_size", 2)
    merged = _length(compression, "spatial_merge_size", 2) ** 2
    pixels = _length(vision, "num_channels", 3) * frames * _length(vision, "patch_size", 14) ** 2
    layers = _length(vision, "num_hidden_layers")
    middle = _length(config, "projector_hidden_size", hidden)
    yield Weight("", (width, pixels), "none", plain_bytes=4)
    yield Weight("", (width,), "none", copies=2)
    # weights with their biases: four projections, two of the MLP, two norms
    yield Weight("", (width, width + 1), "none", copies=4 * layers)
    yield Weight("", (inner, width + 1), "none", copies=layers)
    yield Weight("", (width, inner + 1), "none", copies=layers)
    yield Weight("", (width,), "none", copies=4 * layers)
    yield Weight("", (middle, width + 1), "none")
    yield Weight("", (middle, merged * hidden + 1), "none")
    yield Weight("", (hidden, middle + 1), "none", copies=2)


def _length(config: object, key: str, default: int | None = None) -> int:
    """A positive integer of the vision part, whatever stands there."""
    value = config.get(key, default) if isinstance(config, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(
            f"config key {key!r} of the vision part must be a positive integer below 2**31; got "
            f"{shown(value if isinstance(config, Mapping) else config)}"
        )
    return value


def weight_bytes(config: M3Config, hf_config: Mapping[str, Any], *, tp_size: int) -> Weights:
    """Bytes of all weights, quantised as the config says, and of one rank's.

    Parameters
    ----------
    config : the text model
    hf_config : top-level config.json, for the vision part

    Raises
    ------
    ValueError : `tp_size` and the KV heads do not divide each other, or a quantisation cannot
        hold one of the shapes.
    """
    kv_heads = config.num_key_value_heads
    of_rank = {
        "ranks": 1 / tp_size,
        "kv heads": local_heads(kv_heads, tp_size) / kv_heads,
        "none": 1,
    }
    total = per_rank = 0.0
    for weight in (*text_weights(config), *vision_weights(hf_config)):
        size = weight.copies * stored_weight_bytes(weight, config.quantization)
        total += size
        per_rank += size * of_rank[weight.split]
    return Weights(total=round(total), per_rank=math.ceil(per_rank))


def stored_weight_bytes(weight: Weight, quantization: Quantization | None) -> int:
    """Bytes of one of equal weights in the files."""
    if quantization is not None and weight.module:
        stored = quantization.format_of(weight.module)
        if stored != PLAIN:
            rows, columns = weight.shape
            return stored_bytes(stored, rows=rows, columns=columns)
    return math.prod(weight.shape) * weight.plain_bytes


def fit(
    config: M3Config,
    weights: Weights,
    *,
    memory: int,
    utilization: float,
    reserve: int,
    tp_size: int,
    kv_dtype: CacheDType,
    index_dtype: CacheDType,
    context: int | None = None,
) -> Fit:
    """What fits into one rank's memory beside its weights.

    Parameters
    ----------
    memory : bytes of one device
    utilization : share of it the server may use
    reserve : bytes of that share for everything but weights and cache
    context : tokens per request to count requests for; the longest one by default
    """
    cache = cache_bytes_per_token(
        config, tp_size=tp_size, kv_dtype=kv_dtype, index_dtype=index_dtype
    )
    budget = int(memory * utilization) - reserve - weights.per_rank
    pages = max(budget, 0) // (cache.total * PAGED_BLOCK_SIZE)
    tokens = pages * PAGED_BLOCK_SIZE
    longest = min(tokens, config.max_position_embeddings)
    wanted = longest if context is None else context
    # every request owns whole pages
    request_pages = -(-wanted // PAGED_BLOCK_SIZE)
    return Fit(
        budget=budget,
        cache=cache,
        tokens=tokens,
        longest_context=longest,
        context=wanted,
        requests=pages // request_pages if request_pages else 0,
    )
