"""How clearly the constructed checkpoint decides, at context lengths no model run can reach.

Evaluates index scores and main attention logits of the few tokens that look something up against
all keys of a prompt, from the checkpoint's own weights. What the first layer gathers is written
down instead of computed: query and key norms make everything else that it adds irrelevant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3_plugin.testing import constructed as c
from m3_plugin.testing.prompts import NeedlePrompt

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class HopMargins:
    """Decisions of one look-up.

    Attributes
    ----------
    rank : place of the fact's block among all blocks, the local one being first; `topk_blocks` is
        the last that is selected
    selected_margin : score of the fact's block minus that of the next block, over the best score
    above_margin : score of the block before it minus its own, over the best score
    sparse_margin : nats by which the fact beats everything else in the selected blocks together
    dense_margin : nats by which the decoys beat everything else in the whole context together;
        -inf without decoys
    """

    rank: int
    selected_margin: float
    above_margin: float
    sparse_margin: float
    dense_margin: float


def needle_margins(
    checkpoint: c.ConstructedCheckpoint,
    prompt: NeedlePrompt,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[HopMargins, ...]:
    """Margins of every hop of `prompt`; `dtype` (default bfloat16) is that of weights and keys."""
    import torch

    dtype = torch.bfloat16 if dtype is None else dtype
    tensors = {
        name: tensor.to(dtype).float()
        for name, tensor in checkpoint.tensors().items()
        if name.startswith("language_model.model.")
    }
    # Answers are context too: hop i asks from position num_prompt - 1 + i.
    ids = torch.tensor([*prompt.token_ids, *prompt.expected_ids[:-2]])
    states, kind_of = _gathered_states(tensors["language_model.model.embed_tokens.weight"], ids)
    hops = []
    for i, (kind, group) in enumerate(prompt.groups):
        layer = _Layer(tensors, index=kind + 1, dtype=dtype)
        position = len(prompt.token_ids) - 1 + i
        hops.append(_hop(checkpoint, prompt, layer, states, kind_of, position, group, i))
    return tuple(hops)


def _gathered_states(
    embeddings: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct states after layer 0 [kinds, hidden] and the kind of every position [tokens].

    A state depends on the token and, for words, on the two tokens before.
    """
    import torch

    before = torch.full((2, len(ids)), -1)
    is_word = embeddings[ids, c._WORD] > 0
    for distance in (1, 2):
        before[distance - 1, distance:] = torch.where(is_word[distance:], ids[:-distance], -1)
    triples, kind_of = torch.unique(torch.stack([ids, *before], 1), dim=0, return_inverse=True)
    states = embeddings[triples[:, 0]].clone()
    previous = embeddings[triples[:, 1].clamp(min=0)] * (triples[:, 1:2] >= 0)
    states[:, c._AFTER_MEANS] += previous[:, c._MEANS]
    gathered = embeddings[triples[:, 2].clamp(min=0)] * (triples[:, 2:] >= 0)
    states[:, c._PREV : c._PREV + c._CODES] += gathered[:, c._OWN : c._OWN + c._CODES]
    states[:, c._KEY_PLAIN] += gathered[:, c._PLAIN]
    states[:, c._KEY_DECOY] += gathered[:, c._DECOY]
    return states, kind_of


class _Layer:
    """Query and key functions of one sparse layer, before RoPE."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, index: int, dtype: torch.dtype):
        self._tensors = tensors
        self._prefix = f"language_model.model.layers.{index}."
        self.dtype = dtype

    def project(self, states: torch.Tensor, name: str) -> torch.Tensor:
        """[n, hidden] -> [n, heads, 128] through input norm, projection and head norm."""
        h = _gemma_norm(states, self._weight("input_layernorm"))
        heads = (h @ self._weight(f"self_attn.{name}_proj").T).unflatten(-1, (-1, c._HEAD))
        return _gemma_norm(heads, self._weight(f"self_attn.{name}_norm"))

    def _weight(self, name: str) -> torch.Tensor:
        return self._tensors[f"{self._prefix}{name}.weight"]


def _gemma_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1.0 + weight)


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE on the first 64 of 128 channels, angles in float32. x [n, 128], positions [n]."""
    import torch

    half = c._ROTARY // 2
    frequencies = torch.tensor([c._frequency(pair) for pair in range(half)])
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[:, :half], x[:, half : c._ROTARY], x[:, c._ROTARY :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _products(
    layer: _Layer,
    states: torch.Tensor,
    kind_of: torch.Tensor,
    position: int,
    *,
    query: tuple[str, int],
    key: tuple[str, int],
) -> torch.Tensor:
    """Products [position + 1] of the query at `position` with all keys up to it.

    `query` and `key` are (projection, head).
    """
    import torch

    q = layer.project(states[kind_of[position]][None], query[0])[:, query[1]]
    q = _rotate(q, torch.tensor([position])).to(layer.dtype).float()[0]
    keys = layer.project(states, key[0])[:, key[1]]
    chunks = []
    for start in range(0, position + 1, _CHUNK):
        positions = torch.arange(start, min(start + _CHUNK, position + 1))
        k = _rotate(keys[kind_of[positions]], positions).to(layer.dtype).float()
        chunks.append(k @ q)
    return torch.cat(chunks)


def _hop(
    checkpoint: c.ConstructedCheckpoint,
    prompt: NeedlePrompt,
    layer: _Layer,
    states: torch.Tensor,
    kind_of: torch.Tensor,
    position: int,
    group: int,
    hop: int,
) -> HopMargins:
    import torch

    size = checkpoint.shape.block_size
    needle = prompt.needle_positions[hop]
    scores = _products(
        layer, states, kind_of, position, query=("index_q", group), key=("index_k", 0)
    )
    blocks = torch.nn.functional.pad(scores, (0, -len(scores) % size), value=-math.inf)
    blocks = blocks.view(-1, size).amax(-1)
    best = float(blocks.max())
    blocks[position // size] = math.inf
    order = blocks.argsort(descending=True, stable=True)
    rank = int((order == needle // size).nonzero()) + 1
    ranked = blocks[order].tolist()

    logits = _products(
        layer, states, kind_of, position, query=("q", 2 * group), key=("k", group)
    ) / math.sqrt(c._HEAD)
    visible = torch.arange(position + 1)
    selected = torch.isin(visible // size, order[: checkpoint.topk_blocks])
    others = selected & (visible != needle)
    # Decoys of other hops count among everything else.
    mine = torch.zeros_like(selected)
    mine[list(prompt.decoy_positions)] = True
    mine &= logits > logits[needle]
    dense = -math.inf
    if mine.any():
        dense = float(logits[mine].logsumexp(0) - logits[~mine].logsumexp(0))
    return HopMargins(
        rank=rank,
        selected_margin=(ranked[rank - 1] - ranked[rank]) / best if rank < len(ranked) else 1.0,
        above_margin=(ranked[rank - 2] - ranked[rank - 1]) / best,
        sparse_margin=float(logits[needle] - logits[others].logsumexp(0)),
        dense_margin=dense,
    )
