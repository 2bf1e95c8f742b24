"""Which rule sizes pictures, and M3.1's against a slow reading of the same words."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.model.resizing import SideCaps, by_pillow, caps_sides, require_no_area, resize_rule


@cache
def m3() -> M3Config:
    return M3Config.from_hf(released_config())


@cache
def m31() -> M3Config:
    """M3 with the layer list of M3.1, plain: a copy that somebody dequantised."""
    config = json.loads(json.dumps(released_config()))
    sparse = config["text_config"]["sparse_attention_config"]
    layers = config["text_config"]["num_hidden_layers"]
    sparse["sparse_attention_freq"] = sparse["sparse_disable_index_value"] = [1] * layers
    return M3Config.from_hf(config)


def slow(height: int, width: int, caps: SideCaps) -> tuple[int, int]:
    """Step by step, counting up."""

    def up(side: int) -> int:
        multiple = 28
        while multiple < side:
            multiple += 28
        return multiple

    tall, wide = up(height), up(width)
    if tall > caps.height or wide > caps.width:
        by_width, by_height = tall * caps.width // wide, wide * caps.height // tall
        tall = up(max(min(caps.height, by_width), 28))
        wide = up(max(min(by_height, caps.width), 28))
    return tall, wide


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    caps=st.sampled_from([SideCaps(672, 672), SideCaps(448, 896), SideCaps(28, 3584)]),
)
def test_sides_are_rounded_up_and_capped(height: int, width: int, caps: SideCaps) -> None:
    size = caps.size(height, width)
    assert size == slow(height, width, caps)
    assert size[0] % 28 == size[1] % 28 == 0
    assert size[0] <= caps.height
    assert size[1] <= caps.width
    # so that frames which a loader shrank are not shrunk again
    assert caps.size(*size) == size


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (28, 28, (28, 28)),
        (29, 57, (56, 84)),
        (672, 672, (672, 672)),
        (673, 672, (672, 672)),
        (1080, 1920, (392, 672)),
        (1, 10_000, (28, 672)),
        (700, 1000, (476, 672)),
    ],
)
def test_sizes_worked_out_by_hand(height: int, width: int, size: tuple[int, int]) -> None:
    assert SideCaps(672, 672).size(height, width) == size


def test_pixels_are_pillow_s() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((84, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(by_pillow(pixels, (56, 84)), np.asarray(image))
    with pytest.raises(ValueError, match="needs pixels; got 0x3"):
        SideCaps(672, 672).size(3, 0)


@pytest.mark.parametrize(
    ("said", "caps"),
    [
        ({}, SideCaps(672, 672)),
        ({"size": None, "max_pixels": 451_584}, SideCaps(672, 672)),
        ({"size": [672, 672]}, SideCaps(672, 672)),
        ({"size": [448, 896], "max_pixels": 451_584}, SideCaps(448, 896)),
        ({"size": {"height": 448, "width": 896}}, SideCaps(448, 896)),
    ],
)
def test_the_file_s_numbers_are_caps_in_m3_1(said: dict[str, Any], caps: SideCaps) -> None:
    assert caps_sides(m31())
    assert resize_rule(said, m31()) == caps


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"max_pixels": 451_584},
        # what MiniMax-M3 is published with, and what transformers writes
        {"size": [672, 672]},
        {"size": {"shortest_edge": 3136, "longest_edge": 451_584}},
    ],
)
def test_m3_s_rule_stays_transformers(said: dict[str, Any]) -> None:
    assert not caps_sides(m3())
    assert resize_rule(said, m3()) is None


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 3136, "longest_edge": 451_584},
        {"height": 672, "width": 672, "depth": 3},
        [672],
        [672, 672, 3],
        [672, 672.0],
        [680, 672],
        [0, 672],
        [672, 7168],
        672,
        "dynamic",
    ],
)
def test_another_rule_is_refused_by_its_name(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^size in preprocessor_config.json must be .*; got"):
        resize_rule({"size": size}, m31())


@pytest.mark.parametrize("size", [[448, 896], {"height": 672, "width": 672}, 672, "dynamic"])
def test_m3_with_a_rule_of_sides_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=r"no rule of MiniMax-M3: it bounds the area"):
        resize_rule({"size": size}, m3())


@pytest.mark.parametrize("name", ["size", "min_pixels", "max_pixels"])
def test_bounds_of_an_area_are_not_swallowed(name: str) -> None:
    require_no_area({"do_resize": False}, option="x")
    with pytest.raises(ValueError, match=rf"^{name} in mm_processor_kwargs bounds a picture's"):
        require_no_area({name: 1}, option="mm_processor_kwargs")
