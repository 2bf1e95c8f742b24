"""transformers' own MiniMax-M3 in fp32: the reference for tokens and logprobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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


def media_ids(path: Path) -> list[int]:
    """Ids that stand for a picture's and a video's features in a prompt."""
    config = load(path).config
    return [config.image_token_id, config.video_token_id]


@torch.inference_mode()
def media_logprobs(path: Path, token_ids: list[int], inputs: Mapping[str, Tensor]) -> Tensor:
    """`token_logprobs` of a prompt with pictures and videos, each seen alone.

    transformers lets the items of one call see each other, so each gets a call of its own.

    Parameters
    ----------
    inputs : of transformers' processor: pixel values and grids of both kinds
    """
    model = load(path)
    ids = torch.tensor([token_ids])
    embeddings = model.get_input_embeddings()(ids)
    kinds = (
        ("pixel_values", "image_grid_thw", model.model.get_image_features),
        ("pixel_values_videos", "video_grid_thw", model.model.get_video_features),
    )
    for token, (pixels, grids, features_of) in zip(media_ids(path), kinds, strict=True):
        rows = inputs[pixels].split(inputs[grids].prod(-1).tolist())
        features = [
            features_of(patches, grid[None]).pooler_output[0]
            for patches, grid in zip(rows, inputs[grids], strict=True)
        ]
        embeddings[ids == token] = torch.cat(features)
    logprobs = model(inputs_embeds=embeddings).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
