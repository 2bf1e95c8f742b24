"""MiniMax-M3.1's text model in plain torch, from its description: no code of ours or of a host.

Whole prompts in fp32, no cache, no paging. It reads plain checkpoints; what a quantised one means,
`m3_plugin.testing.quantised.reference_checkpoint` writes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


def take_best(values: Tensor, *, count: int, tie: float | None) -> tuple[Tensor, Tensor]:
    """The `count` best of the last axis, earlier ones first among equals.

    Returns
    -------
    indices [..., count], and by how much the last of them outranks the next, [...]; infinity where
    there is none beside them, or only what may not be taken (-inf)

    Parameters
    ----------
    tie : where the gap is no larger, the next is taken instead of the last; None: never
    """
    ranked = values.sort(dim=-1, descending=True, stable=True)
    order = ranked.indices[..., :count]
    if values.shape[-1] <= count:
        return order, torch.full(values.shape[:-1], float("inf"))
    last, following = ranked.values[..., count - 1], ranked.values[..., count]
    gaps = (last - following).where(following > float("-inf"), float("inf"))
    if tie is not None:
        other = ranked.indices[..., count].where(gaps <= tie, order[..., -1])
        order = torch.cat([order[..., :-1], other[..., None]], dim=-1)
    return order, gaps


def select(
    index_q: Tensor, index_k: Tensor, *, rule: dict[str, Any], tie: float | None
) -> tuple[Tensor, Tensor]:
    """Which keys each row may read, and by how much its last block outranks the next.

    Row i is position i; the former are bool [heads, rows, keys], the latter [rows].

    Parameters
    ----------
    index_q : [rows, heads, channels], one head per KV head
    index_k : [keys, channels]
    rule : the config's `sparse_attention_config`
    tie : as `take_best` takes it
    """
    block, topk = rule["sparse_block_size"], rule["sparse_topk_blocks"]
    rows = len(index_k)
    blocks = -(-rows // block)
    scores = torch.einsum("thd,sd->hts", index_q, index_k)
    causal = torch.arange(rows) <= torch.arange(rows)[:, None]
    scores = scores.masked_fill(~causal, float("-inf"))
    scores = F.pad(scores, (0, blocks * block - rows), value=float("-inf"))
    best = scores.unflatten(-1, (blocks, block)).amax(-1)
    number, last = torch.arange(blocks), torch.arange(rows)[:, None] // block
    visible = number <= last
    first, newest = rule["sparse_init_block"], rule["sparse_local_block"]
    forced = visible & ((number < first) | (number > last - newest))
    best = best.masked_fill(forced, float("inf")).masked_fill(~visible, float("-inf"))
    # a block that is left out is there from the row on which has more blocks than places
    order, gaps = take_best(best, count=topk, tie=tie)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, order, True) & visible
    return chosen.repeat_interleave(block, dim=-1)[..., :rows] & causal, gaps.amin(0)


class Reference:
    """One checkpoint.

    Parameters
    ----------
    folder : plain weights in the published layout
    """

    gaps: Tensor
    """Of each row of the last call: the smallest gap between a block or an expert that was taken
    and one left out. Where it is no larger than rounding, another order of summing takes another.
    """

    tie: float | None = None
    """Where a gap is no larger, what was left out is taken; None: never."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        self.weights: dict[str, Tensor] = {}
        for shard in folder.glob("*.safetensors"):
            for name, tensor in load_file(shard).items():
                self.weights[name.removeprefix("language_model.")] = tensor.float()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[tokens, vocabulary]."""
        self.gaps = torch.full((len(token_ids),), float("inf"))
        stream = self.weights["model.embed_tokens.weight"][token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            stream = stream + self._attention(self._norm(stream, prefix + "input_layernorm"), layer)
            inner = self._norm(stream, prefix + "post_attention_layernorm")
            routed = self.config["moe_layer_freq"][layer]
            stream = stream + (
                self._experts(inner, prefix + "block_sparse_moe.")
                if routed
                else self._mlp(inner, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))
            )
        return self._linear(self._norm(stream, "model.norm"), "lm_head")

    def next_tokens(self, token_ids: list[int]) -> list[int]:
        """The likeliest token behind each one and those before it."""
        return self.logits(token_ids).argmax(-1).tolist()

    def token_logprobs(self, token_ids: list[int], *, tie: float | None = None) -> Tensor:
        """Log probability of token i + 1 given tokens 0..i, [len - 1].

        Parameters
        ----------
        tie : every choice by no more than this is made the other way; None: none is
        """
        self.tie = tie
        try:
            logprobs = self.logits(token_ids)[:-1].log_softmax(-1)
        finally:
            self.tie = None
        return logprobs.gather(1, torch.tensor(token_ids)[1:, None]).squeeze(1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return x * scale.rsqrt() * (1 + self.weights[name + ".weight"])

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """Projected, normalised per head and rotated: [tokens, heads, channels]."""
        prefix, _, projection = name.rpartition(".")
        heads = self._linear(x, name).unflatten(-1, (-1, self.config["head_dim"]))
        norm = projection.removesuffix("_proj") + "_norm"
        heads = self._norm(heads, f"{prefix}.{norm}")
        half = self.config["rotary_dim"] // 2
        frequencies = self.config["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        a, b, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        q, k = (self._heads(x, f"{prefix}{name}_proj") for name in "qk")
        v = self._linear(x, f"{prefix}v_proj").view(k.shape)
        rule = self.config["sparse_attention_config"]
        if rule["sparse_attention_freq"][layer]:
            index_q = self._heads(x, f"{prefix}index_q_proj")
            index_k = self._heads(x, f"{prefix}index_k_proj").squeeze(1)
            readable, gaps = select(index_q, index_k, rule=rule, tie=self.tie)
            self.gaps = self.gaps.minimum(gaps)
        else:
            readable = torch.ones(k.shape[1], len(x), len(x), dtype=torch.bool).tril()
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * self.config["head_dim"] ** -0.5
        readable = readable.repeat_interleave(group, dim=0)
        weights = scores.masked_fill(~readable, float("-inf")).softmax(-1)
        out = torch.einsum("hts,shd->thd", weights, v).flatten(1)
        return self._linear(out, f"{prefix}o_proj")

    def _mlp(self, x: Tensor, prefix: str, names: tuple[str, str, str]) -> Tensor:
        gate, up = (self._linear(x, prefix + name) for name in names[:2])
        alpha, limit = self.config["swiglu_alpha"], self.config["swiglu_limit"]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self._linear((up + 1) * gate * torch.sigmoid(alpha * gate), prefix + names[2])

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        scores = torch.sigmoid(self._linear(x, prefix + "gate"))
        biased = scores + self.weights[prefix + "e_score_correction_bias"]
        count = self.config["num_experts_per_tok"]
        chosen, gaps = take_best(biased, count=count, tie=self.tie)
        self.gaps = self.gaps.minimum(gaps)
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * self.config["routed_scaling_factor"]
        out = self._mlp(x, prefix + "shared_experts.", ("gate_proj", "up_proj", "down_proj"))
        for expert in range(self.config["num_local_experts"]):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            name = f"{prefix}experts.{expert}."
            found = self._mlp(x[rows], name, ("w1", "w3", "w2"))
            out = out.index_add(0, rows, found * weights[rows, place, None])
        return out


@cache
def reference(folder: Path) -> Reference:
    """The model in a folder, read once."""
    return Reference(folder)
