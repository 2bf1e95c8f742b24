"""Positions beyond those a config names, which VLLM_ALLOW_LONG_MAX_MODEL_LEN admits."""

from __future__ import annotations

from dataclasses import replace

import torch

from m3_plugin.model.config import M3Config
from m3_plugin.testing.hub_layout import MARKER_TOKENS, SPECIAL_TOKENS, hub_config
from m3_plugin.testing.random_checkpoint import PRESETS


def config_of(positions: int) -> M3Config:
    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *MARKER_TOKENS))}
    written = hub_config(PRESETS["engine"], dtype=torch.float32, token_ids=ids)
    return replace(M3Config.from_hf(written), max_position_embeddings=positions)


def rotated(positions: int, *, device_type: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The rope of a model that names so many positions, and what it makes of four rows."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from m3_vllm.model import dense_rope

    config = config_of(positions)
    rows = torch.tensor([3, 63, 64, 200])
    heads = torch.randn(4, 2 * config.head_dim, generator=torch.Generator().manual_seed(0))
    with set_current_vllm_config(VllmConfig()):
        rope = dense_rope(config, max_model_len=256, device_type=device_type)
        return rope, torch.stack(rope(rows, heads.clone(), heads.flip(0)))


def test_dense_layers_have_an_angle_for_every_position() -> None:
    """Of vLLM's table, which GPUs use."""
    rope, found = rotated(64, device_type="cuda")
    assert torch.equal(found, rotated(1024, device_type="cuda")[1])
    assert rope.get_buffer("cos_sin_cache").shape[0] >= 256


def test_on_a_cpu_angles_are_computed() -> None:
    """The same numbers, and nothing that grows with the context."""
    rope, found = rotated(64, device_type="cpu")
    torch.testing.assert_close(found, rotated(64, device_type="cuda")[1], atol=1e-5, rtol=0)
    assert sum(buffer.numel() for buffer in rope.buffers()) < config_of(64).head_dim
