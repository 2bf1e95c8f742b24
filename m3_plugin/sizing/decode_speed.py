"""How fast one request can decode on a CPU at most: a model from memory bandwidth, no measurement.

Each step reads every weight that one token uses once, and what its attention reads of the cache.
What else a step costs (arithmetic, threads, the host's Python) only adds to that.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3_plugin.model.config import PAGED_BLOCK_SIZE, M3Config
from m3_plugin.sizing.cache_bytes import CacheBytes
from m3_plugin.sizing.fit import stored_weight_bytes, text_weights


@dataclass(frozen=True)
class DecodeSpeed:
    """One request that decodes.

    Attributes
    ----------
    bandwidth : bytes per second of main memory, as given
    weights : bytes of the weights that one token uses
    context : tokens in the cache
    cache : bytes that are read of them
    """

    bandwidth: float
    weights: int
    context: int
    cache: int

    @property
    def tokens_per_second(self) -> float:
        """The bound: no step takes less time than its bytes."""
        return self.bandwidth / (self.weights + self.cache)


def decode_speed(
    config: M3Config, cache: CacheBytes, *, context: int, bandwidth: float
) -> DecodeSpeed:
    """The bound for one request.

    Parameters
    ----------
    config : the model, with what its checkpoint says of quantisation
    cache : bytes per token of all layers on one rank
    context : tokens in the cache
    bandwidth : bytes per second of main memory
    """
    weights = 0
    for weight in text_weights(config):
        if weight.module == "model.embed_tokens":
            continue
        used = config.num_experts_per_token if ".experts." in weight.module else weight.copies
        weights += used * stored_weight_bytes(weight, config.quantization)
    sparse = 0 if config.msa is None else config.num_sparse_layers
    of_layer = cache.kv // config.num_hidden_layers
    chosen = context if config.msa is None else config.msa.topk_blocks * PAGED_BLOCK_SIZE
    read = (config.num_hidden_layers - sparse) * context + sparse * min(context, chosen)
    return DecodeSpeed(bandwidth, weights, context, of_layer * read + cache.index * context)
