"""How many of the blocks a plain checkpoint's index branch chooses a quantised one's chooses too.

Both see the same tokens through the same embedding, so that nothing but the stored index
projections, or how the second one's index keys are cached, can make a difference. On random weights
scores have no structure and near ties are many: a lower bound for a trained model.

    python -P -m m3_plugin.testing.recall PLAIN QUANTISED
    python -P -m m3_plugin.testing.recall PLAIN PLAIN int8
    python -P -m m3_plugin.testing.recall PLAIN PLAIN planes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3_plugin.checkpoint.names import TEXT_PREFIX
from m3_plugin.checkpoint.stream import Dequantiser
from m3_plugin.model.config import M3Config

if TYPE_CHECKING:
    from torch import Tensor

    from m3_kernels.index_pages import IndexViews

TEXT_TOKENS = 8192
CACHED_AS = ("fp32", "bf16", "fp8", "int8", "planes")


def text_like_tokens(vocab_size: int, *, num_tokens: int, seed: int = 0) -> Tensor:
    """[num_tokens] ids with the frequencies of words in text: the k-th word 1 / k of the first."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, vocab_size + 1)
    return torch.multinomial(weights, num_tokens, replacement=True, generator=generator)


def index_recall(
    plain: Path, quantised: Path, *, num_tokens: int = TEXT_TOKENS, cached_as: str = "fp32"
) -> dict[int, float]:
    """Mean share of chosen blocks in common, per sparse layer, over rows beyond the dense context.

    Parameters
    ----------
    plain, quantised : two checkpoints of the same model
    num_tokens : length of the text
    cached_as : one of `CACHED_AS`, how the index keys of the second are kept

    Raises
    ------
    ValueError : no such cache, no layer is sparse, or the text stays within the dense context.
    """
    config = M3Config.from_hf(json.loads((plain / "config.json").read_text()))
    if config.msa is None or num_tokens <= config.msa.dense_context:
        raise ValueError(f"{num_tokens} tokens of this model are attended densely; give more")
    if cached_as not in CACHED_AS:
        raise ValueError(f"index keys must be cached as {', '.join(CACHED_AS)}; got {cached_as!r}")
    tokens = text_like_tokens(config.vocab_size, num_tokens=num_tokens)
    layers = [layer for layer, sparse in enumerate(config.sparse_layers) if sparse]
    branches = [_index_tensors(folder, layers) for folder in (plain, quantised)]
    hidden = branches[0]["model.embed_tokens.weight"][tokens]
    recall = {}
    for layer in layers:
        ours = _choose(branches[0], hidden, layer, config, cached_as="fp32")
        theirs = _choose(branches[1], hidden, layer, config, cached_as=cached_as)
        ours, theirs = (ids[:, config.msa.dense_context :] for ids in (ours, theirs))
        common = (ours[..., :, None] == theirs[..., None, :]).any(-1)
        recall[layer] = float(common.float().mean())
    return recall


def _index_tensors(folder: Path, layers: list[int]) -> dict[str, Tensor]:
    """Embedding and index branches, plain."""
    from safetensors import safe_open

    config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
    dequantiser = Dequantiser(config)
    wanted = tuple(
        f"model.layers.{layer}.{part}"
        for layer in layers
        for part in ("self_attn.index_", "input_layernorm.")
    )
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for stored in shard.keys():  # noqa: SIM118
                name = stored.removeprefix(TEXT_PREFIX)
                if not name.startswith((*wanted, "model.embed_tokens.")):
                    continue
                plain = dequantiser.take(name, shard.get_tensor(stored))
                if plain is not None:
                    tensors[plain[0]] = plain[1].float()
    dequantiser.require_complete()
    return tensors


def _choose(
    tensors: dict[str, Tensor], hidden: Tensor, layer: int, config: M3Config, *, cached_as: str
) -> Tensor:
    """Chosen blocks of every token as one sequence: [index heads, tokens, topk]."""
    import torch

    from m3_kernels.index_topk import index_topk

    msa = config.msa
    assert msa is not None
    prefix = f"model.layers.{layer}"
    hidden = _gemma_norm(hidden, tensors[f"{prefix}.input_layernorm.weight"], config)
    keys, pages = hidden.shape[0], -(-hidden.shape[0] // msa.block_size)
    branch = {}
    for part in ("q", "k"):
        projected = hidden @ tensors[f"{prefix}.self_attn.index_{part}_proj.weight"].T
        heads = projected.unflatten(-1, (-1, msa.index_dim))
        norm = tensors[f"{prefix}.self_attn.index_{part}_norm.weight"]
        branch[part] = _rope(_gemma_norm(heads, norm, config), config)
    index_k = torch.zeros(pages * msa.block_size, msa.index_dim)
    index_k[:keys] = branch["k"].squeeze(1)
    stored = _stored(index_k, cached_as)

    def in_pages(part: Any) -> Any:
        return None if part is None else part.unflatten(0, (pages, msa.block_size))

    return index_topk(
        branch["q"],
        in_pages(stored.keys),
        index_k_scales=in_pages(stored.scales),
        index_k_low=in_pages(stored.low),
        page_table=torch.arange(pages, dtype=torch.int32)[None],
        cu_seqlens_q=torch.tensor([0, keys], dtype=torch.int32),
        seq_lens=torch.tensor([keys], dtype=torch.int32),
        topk=msa.topk_blocks,
        num_local_blocks=msa.num_local_blocks,
        num_init_blocks=msa.num_init_blocks,
    )


def _stored(keys: Tensor, cached_as: str) -> IndexViews:
    """Index keys [tokens, dim] as a cache holds them, of 8 bits as read from it in fp32."""
    import torch

    from m3_kernels.cache_store.torch_cpu import in_int8, in_planes
    from m3_kernels.index_pages import PLANES_SCALE_DTYPE, SCALE_DTYPE, IndexViews

    if cached_as == "planes":
        high, low, scales = in_planes(keys, PLANES_SCALE_DTYPE)
        return IndexViews(high, scales, low)
    if cached_as == "int8":
        codes, scales = in_int8(keys, SCALE_DTYPE)
        return IndexViews(codes * scales.float()[:, None])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return IndexViews(keys.to(dtypes[cached_as]).float())


def _gemma_norm(values: Tensor, weight: Tensor, config: M3Config) -> Tensor:
    scale = values.square().mean(-1, keepdim=True).add(config.rms_norm_eps).rsqrt()
    return values * scale * (1.0 + weight)


def _rope(heads: Tensor, config: M3Config) -> Tensor:
    """Rotate the first `rotary_dim` channels of [tokens, heads, dim] by position."""
    import torch

    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half) / half)
    angles = (torch.arange(heads.shape[0])[:, None] * frequencies)[:, None]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def main(plain: str, quantised: str, cached_as: str = "fp32") -> None:
    for layer, share in index_recall(Path(plain), Path(quantised), cached_as=cached_as).items():
        sys.stdout.write(f"layer {layer}: {share:.4f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
