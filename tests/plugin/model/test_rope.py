"""Angles of rows: as transformers forms them, whatever the host is building around them."""

from __future__ import annotations

import json

import pytest
import torch

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.model.rope import RowAngles

POSITIONS = (0, 1, 5, 127, 128, 4095, 131_071, 1_048_575)


def test_cosines_and_sines_of_position_times_frequency() -> None:
    """In float64, from frequencies that are rounded once; of a million radians two digits go."""
    found = RowAngles(rotary_dim=8, theta=100.0)(torch.tensor(POSITIONS))
    assert (found.shape, found.dtype) == ((len(POSITIONS), 8), torch.float32)
    frequencies = torch.tensor([1.0, 10**-0.5, 0.1, 10**-1.5], dtype=torch.float64)
    angles = torch.tensor(POSITIONS, dtype=torch.float64)[:, None] * frequencies
    exact = torch.cat([angles.cos(), angles.sin()], dim=1)
    allowed = 1e-6 + 3 * torch.finfo(torch.float32).eps * angles.repeat(1, 2)
    assert ((found.double() - exact).abs() <= allowed).all()


def test_they_are_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    configuration = pytest.importorskip(
        "transformers.models.minimax_m3_vl.configuration_minimax_m3_vl"
    )
    fields = released_config()
    config = configuration.MiniMaxM3VLConfig.from_dict(json.loads(json.dumps(fields)))
    rotary = modeling.MiniMaxM3VLRotaryEmbedding(config.text_config)
    positions = torch.tensor(POSITIONS)
    cos, sin = rotary(torch.zeros(1), positions[None])
    ours = RowAngles.of(M3Config.from_hf(fields))(positions)
    half = ours.shape[1] // 2
    assert torch.equal(ours[:, :half], cos[0, :, :half])
    assert torch.equal(ours[:, half:], sin[0, :, :half])


def test_a_host_that_builds_in_bf16_gets_fp32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        angles = RowAngles(rotary_dim=8, theta=100.0)
        found = angles(torch.tensor(POSITIONS, dtype=torch.int32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, RowAngles(rotary_dim=8, theta=100.0)(torch.tensor(POSITIONS)))
    assert not angles.state_dict()


def test_they_live_where_the_model_is_built() -> None:
    with torch.device("meta"):
        angles = RowAngles(rotary_dim=8, theta=100.0)
    assert angles.frequencies.device.type == "meta"
