"""transformers' own MiniMax-M3 in fp32: the reference for tokens and logprobs."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def load(path: Path) -> Any:
    """The whole model, text and vision, in fp32 on CPU."""
    from transformers import MiniMaxM3SparseForConditionalGeneration

    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    # generation goes on past eos, as in an engine told to ignore it
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def greedy(path: Path, token_ids: list[int], *, num_tokens: int, **inputs: Tensor) -> list[int]:
    """Tokens transformers generates greedily, without stopping at eos."""
    prompt = torch.tensor([token_ids])
    output = load(path).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        **inputs,
    )
    return output[0, len(token_ids) :].tolist()


def with_sparse_config(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """The same weights under another `sparse_attention_config`."""
    copy = shutil.copytree(checkpoint, folder)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["sparse_attention_config"] |= changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@torch.inference_mode()
def token_logprobs(path: Path, token_ids: list[int]) -> Tensor:
    """Log probability of token i + 1 given tokens 0..i, fp32 [len - 1]."""
    ids = torch.tensor([token_ids])
    logprobs = load(path)(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
