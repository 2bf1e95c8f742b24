"""Small random MiniMax-M3 checkpoints: every weight matters, no answer means anything.

They are for comparing two implementations number by number. Norm weights, router bias and gate
magnitudes are drawn so that a forgotten "1 +", bias or clamp changes the result, and every residual
branch is small against the stream so that rounding stays rounding instead of growing into chaos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from m3_plugin.testing.hub_layout import (
    MARKER_TOKENS,
    SPECIAL_TOKENS,
    CheckpointShape,
    byte_level_tokenizer,
    hub_config,
    prepare_folder,
    tensor_shapes,
    write_checkpoint,
)

if TYPE_CHECKING:
    import torch

PresetName = Literal["small", "kernel", "engine"]

_PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
_COMMON_WORDS = """
the of and to in is that it was for on are as with they at be this have from or had by not but
what all were when we there can an your which their said if do will each about how up out them
then she many some so these would other into has more her two like him see time could no make
than first been its who now people my made over did down only way find use may water long little
very after words called just where most know get through back much before go good new write our
used me man too any day same right look think also around
"""
_WORDS = tuple(_COMMON_WORDS.split())
_NUM_TOKENS = len(SPECIAL_TOKENS) + len(MARKER_TOKENS) + 256 + len(_WORDS)
# A few rows more than the tokenizer has ids, as published.
_VOCAB_SIZE = -(-(_NUM_TOKENS + 3) // 64) * 64

# `small` compares against transformers in seconds, `kernel` has the published head and block sizes
# in all that goes through pages, `engine` passes its budget of blocks at 640 tokens already.
PRESETS: Mapping[PresetName, CheckpointShape] = MappingProxyType(
    {
        "small": CheckpointShape(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            index_dim=32,
            block_size=8,
            topk_blocks=4,
            vocab_size=_VOCAB_SIZE,
            dense_intermediate_size=128,
            intermediate_size=64,
            shared_intermediate_size=64,
            projector_hidden_size=64,
        ),
        "kernel": CheckpointShape(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            block_size=128,
            topk_blocks=16,
            vocab_size=_VOCAB_SIZE,
        ),
        "engine": CheckpointShape(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
            block_size=128,
            topk_blocks=4,
            vocab_size=_VOCAB_SIZE,
            dense_intermediate_size=512,
            projector_hidden_size=256,
            vision_num_heads=4,
            vision_intermediate_size=640,
        ),
    }
)

# The same for M3.1, whose first layers have sparse attention beside their dense MLP. `kernel` needs
# prompts of more than 2,048 tokens.
M31_PRESETS: Mapping[PresetName, CheckpointShape] = MappingProxyType(
    {
        "small": CheckpointShape(
            hidden_size=256,
            num_hidden_layers=4,
            num_dense_layers=2,
            sparse_everywhere=True,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            block_size=16,
            topk_blocks=4,
            vocab_size=512,
            max_position_embeddings=4096,
        ),
        "kernel": CheckpointShape(
            hidden_size=512,
            num_hidden_layers=4,
            num_dense_layers=1,
            sparse_everywhere=True,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            block_size=128,
            topk_blocks=16,
            vocab_size=1024,
            dense_intermediate_size=512,
            intermediate_size=256,
            shared_intermediate_size=256,
        ),
        "engine": replace(PRESETS["engine"], num_dense_layers=2, sparse_everywhere=True),
    }
)

# Standard deviation of what one branch adds to a stream of unit size.
_BRANCH = 0.15


def write_random_checkpoint(
    path: str | Path,
    *,
    preset: PresetName | CheckpointShape = "engine",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    num_shards: int = 3,
    use_sparse_attention: bool = True,
    num_mtp_modules: int | None = None,
    force: bool = False,
) -> Path:
    """Write a random checkpoint in the published layout; returns the folder.

    Parameters
    ----------
    path : folder to create; one with files in it is refused unless `force`
    preset : name of a shape in `PRESETS`, or a shape
    seed : the same seed, preset and dtype give the same bytes
    dtype : of the stored tensors, default float32; router and patch embedding are always float32
    use_sparse_attention : False declares every layer dense in config.json; the tensors stay
    num_mtp_modules : multi-token-prediction modules, by default the shape's; the target stays the
        same whatever their number
    """
    import torch

    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    shape = PRESETS[preset] if isinstance(preset, str) else preset
    if num_mtp_modules is not None:
        shape = replace(shape, num_mtp_modules=num_mtp_modules)
    dtype = torch.float32 if dtype is None else dtype
    folder = prepare_folder(path, force=force)
    tokenizer = byte_level_tokenizer(words=[" " + word for word in _WORDS], pattern=_PATTERN)
    config = hub_config(
        shape,
        dtype=dtype,
        token_ids=tokenizer.get_vocab(),
        use_sparse_attention=use_sparse_attention,
    )
    write_checkpoint(
        folder,
        config=config,
        tensors=random_tensors(shape, seed=seed),
        tokenizer=tokenizer,
        dtype=dtype,
        num_shards=num_shards,
    )
    return folder


def random_tensors(shape: CheckpointShape, *, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float32, under their published names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in tensor_shapes(shape):
        mean, std = _distribution(name, size)
        tensors[name] = torch.randn(size, generator=generator) * std + mean
    return tensors


def _distribution(name: str, size: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's entries."""
    unit = 1.0 / math.sqrt(math.prod(size[1:])) if len(size) > 1 else 0.0
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if name.endswith("lm_head.weight"):
        return 0.0, 3.0 * unit
    if name.startswith(("vision_tower", "multi_modal_projector", "patch_merge_mlp")):
        return _vision_distribution(name, unit)
    # The Gemma form 1 + w is centred on 1; query and key norms are larger so that attention and
    # selection are neither uniform nor one-hot.
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.3, 0.3
    if name.endswith("norm.weight"):
        return 0.0, 0.3
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.1
    if name.endswith("block_sparse_moe.gate.weight"):
        return 0.0, 1.5 * unit
    if name.endswith("o_proj.weight"):
        # Averaging values over a few dozen keys leaves roughly a third of their size.
        return 0.0, 3.0 * _BRANCH * unit
    # Gates reach well beyond the clamp at 7 on a few per cent of the units, ups beyond it too.
    if name.endswith(("gate_proj.weight", ".w1.weight")):
        return 0.0, 4.0 * unit
    if name.endswith(("up_proj.weight", ".w3.weight")):
        return 0.0, 4.0 * unit
    if name.endswith((".w2.weight", "shared_experts.down_proj.weight")):
        # Routed sum and shared expert add up.
        return 0.0, _BRANCH / 15.0 * unit
    if name.endswith("down_proj.weight"):
        # |(up + 1) * gate * sigmoid| is about 10 for the two lines above.
        return 0.0, _BRANCH / 10.0 * unit
    return 0.0, unit


def _vision_distribution(name: str, unit: float) -> tuple[float, float]:
    if "norm" in name:
        return (1.0, 0.2) if name.endswith(".weight") else (0.0, 0.1)
    if name.endswith(".bias"):
        return 0.0, 0.05
    if name.endswith("out_proj.weight"):
        return 0.0, 3.0 * _BRANCH * unit
    if name.endswith("fc2.weight"):
        return 0.0, 2.0 * _BRANCH * unit
    if name == "patch_merge_mlp.linear_2.weight":
        # Image tokens end at the size of word tokens.
        return 0.0, 0.35 * unit
    if name.startswith(("multi_modal_projector", "patch_merge_mlp")):
        return 0.0, 1.7 * unit
    return 0.0, 1.5 * unit
