"""transformers' MiniMax-M3 with its sparse layers on an MSASession: prints greedy tokens.

python -m tests.plugin.attention.transformers_session CHECKPOINT DEVICE '[prompt ids]' NUM_TOKENS
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3_kernels.norm_rope_store import HeadNorms
from m3_kernels.paged import MSACaches
from m3_kernels.testing.interpreter import interpreted
from m3_plugin.attention.backends import KernelChoice, choose_kernels
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.model.config import M3Config
from m3_plugin.model.rope import RowAngles
from m3_plugin.settings import Settings

NAME = "m3_session"


class SessionAttention:
    """An attention function of transformers, which hands sparse layers to a session.

    One sequence at a time; pages lie in reverse order, so that a page is never its block.
    """

    def __init__(self, model: Any, config: M3Config, session: MSASession, *, capacity: int) -> None:
        assert config.msa is not None
        self.session = session
        self.block = config.msa.block_size
        self.pages = -(-capacity // self.block)
        self.caches: dict[int, MSACaches] = {}
        self.projected: dict[int, tuple[Tensor, ...]] = {}
        self.angles = RowAngles.of(config).to(model.device)
        self.eps = config.rms_norm_eps
        self.calls = 0
        weight = next(model.parameters())
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            if attention.indexer is None:
                continue
            shape = (self.pages, config.num_key_value_heads, self.block, config.head_dim)
            k_pages, v_pages = (weight.new_full(shape, torch.nan) for _ in range(2))
            index = weight.new_full((self.pages, self.block, config.msa.index_dim), torch.nan)
            self.caches[attention.layer_idx] = MSACaches(k_pages, v_pages, index)
            attention.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The projections of the step before norm and RoPE, which transformers keeps to itself."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        indexer, rows = attention.indexer, hidden[0]
        *heads, index_k = (
            projection(rows).view(len(rows), -1, dim)
            for projection, dim in (
                (attention.q_proj, attention.head_dim),
                (attention.k_proj, attention.head_dim),
                (attention.v_proj, attention.head_dim),
                (indexer.q_proj, indexer.head_dim),
                (indexer.k_proj, indexer.head_dim),
            )
        )
        self.projected[attention.layer_idx] = (*heads, index_k.squeeze(1))

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

        if getattr(module, "indexer", None) is None:
            return modeling.eager_attention_forward(
                module, query, key, value, attention_mask, **kwargs
            )
        self.calls += 1
        rows, length = query.shape[2], key.shape[2]
        positions = torch.arange(length - rows, length, device=query.device)
        pages = torch.arange(self.pages, device=query.device).flip(0).int()
        plan = self.session.plan(
            MSABatch(
                cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32, device=query.device),
                seq_lens=torch.tensor([length], dtype=torch.int32, device=query.device),
                page_table=pages[None],
                slot_mapping=pages[positions // self.block].long() * self.block
                + positions % self.block,
                max_query_len=rows,
                max_seq_len=length,
            )
        )
        projected = self.projected[module.layer_idx]
        out = torch.empty_like(projected[0])
        norms = HeadNorms(
            q=module.q_norm.weight,
            k=module.k_norm.weight,
            index_q=module.indexer.q_norm.weight,
            index_k=module.indexer.k_norm.weight,
            eps=self.eps,
        )
        self.session.run(
            plan,
            *projected,
            norms=norms,
            cos_sin=self.angles(positions),
            caches=self.caches[module.layer_idx],
            out=out,
        )
        return out[None], None


def session_for(
    config: M3Config, kernels: KernelChoice, *, capacity: int, device: torch.device
) -> MSASession:
    """A session for fp32 and one sequence."""
    assert config.msa is not None
    workspace = None
    if kernels.family == "triton":
        fp32 = torch.float32
        heads = config.num_attention_heads, config.num_key_value_heads
        shape = LayerShape(*heads, config.head_dim, config.rotary_dim, fp32, fp32, fp32)
        limits = StepCapacity(max_requests=1, max_rows=capacity, max_seq_len=capacity)
        workspace = allocate_workspace(config.msa, shape, limits, device=device)
    scale = config.head_dim**-0.5
    return MSASession(config.msa, kernels=kernels, scale=scale, workspace=workspace)


@torch.inference_mode()
def greedy(
    folder: Path, prompt: list[int], *, num_tokens: int, device: torch.device
) -> tuple[list[int], int]:
    """Greedy tokens with the session in place, and how often it attended."""
    from transformers import AttentionInterface, MiniMaxM3SparseForConditionalGeneration
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    kernels = choose_kernels(device.type, Settings.from_environment().kernels)
    config = M3Config.from_hf(json.loads((folder / "config.json").read_text()))
    model: Any = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    model = model.to(device).eval()
    capacity = len(prompt) + num_tokens
    session = session_for(config, kernels, capacity=capacity, device=device)
    attention = SessionAttention(model, config, session, capacity=capacity)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    ids = torch.tensor([prompt], device=device)
    interpreter = kernels.family == "triton" and device.type == "cpu"
    with interpreted() if interpreter else nullcontext():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    return output[0, len(prompt) :].tolist(), attention.calls


if __name__ == "__main__":
    folder, device, prompt, num_tokens = sys.argv[1:]
    tokens, calls = greedy(
        Path(folder), json.loads(prompt), num_tokens=int(num_tokens), device=torch.device(device)
    )
    sys.stdout.write(json.dumps({"tokens": tokens, "calls": calls}))
