"""Positions beyond those a config names, which VLLM_ALLOW_LONG_MAX_MODEL_LEN admits."""

from __future__ import annotations

from dataclasses import replace

import torch

from m3_plugin.model.config import M3Config
from m3_plugin.testing.hub_layout import MARKER_TOKENS, SPECIAL_TOKENS, hub_config
from m3_plugin.testing.random_checkpoint import PRESETS


def test_dense_layers_have_an_angle_for_every_position() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from m3_vllm.model import dense_rope

    ids = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *MARKER_TOKENS))}
    written = hub_config(PRESETS["engine"], dtype=torch.float32, token_ids=ids)
    config = replace(M3Config.from_hf(written), max_position_embeddings=64)
    positions = torch.tensor([3, 63, 64, 200])
    query = torch.randn(4, config.head_dim, generator=torch.Generator().manual_seed(0))
    with set_current_vllm_config(VllmConfig()):
        rope = dense_rope(config, max_model_len=256)
        whole = dense_rope(replace(config, max_position_embeddings=1024), max_model_len=256)
        turned, expected = (r(positions, query.clone(), None)[0] for r in (rope, whole))
    assert torch.equal(turned, expected)
    assert rope.get_buffer("cos_sin_cache").shape[0] >= 256
