"""Which of two rules sizes a checkpoint's pictures and frames: M3's by area, or M3.1's by sides.

    M3     sides to the nearest multiple of 28, the area between two bounds    (transformers' own)
    M3.1   sides up to a multiple of 28, each at most a cap; resized by Pillow, 8 bits per channel

Both models' preprocessor_config.json may hold the same `size`, two numbers: transformers reads
M3's [672, 672] as its bounds of the area, SGLang reads M3.1's as caps of height and width. So the
model decides, as config.json tells it, and the numbers are the file's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from m3_plugin.model.config import M3Config
from m3_plugin.untrusted import shown

__all__ = ["FILE", "SideCaps", "by_pillow", "caps_sides", "require_no_area", "resize_rule"]

FILE = "preprocessor_config.json"
# Of a patch and of the square of patches that becomes one token.
_FACTOR = 28
_SIDES = (672, 672)
_LARGEST = 3584
# How an area would be bounded.
_AREA = ("size", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class SideCaps:
    """M3.1's rule: the most pixels of either side, multiples of 28."""

    height: int
    width: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what a picture or frame becomes; what fits already stays.

        Raises
        ------
        ValueError : no pixels.
        """
        if min(height, width) < 1:
            raise ValueError(f"a picture or frame needs pixels; got {width}x{height}")
        tall, wide = _aligned(height), _aligned(width)
        if tall <= self.height and wide <= self.width:
            return tall, wide
        shrunk = (
            min(self.height, tall * self.width // wide),
            min(wide * self.height // tall, self.width),
        )
        return _aligned(max(shrunk[0], _FACTOR)), _aligned(max(shrunk[1], _FACTOR))


def by_pillow(pixels: Any, size: tuple[int, int]) -> Any:
    """One picture, uint8 [height, width, 3], brought to another height and width as in M3.1."""
    import numpy as np
    from PIL import Image

    height, width = size
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def _aligned(side: int) -> int:
    return -(-side // _FACTOR) * _FACTOR


def caps_sides(config: M3Config) -> bool:
    """Whether a model is M3.1, whose processor caps sides: by its experts, or by its layer list."""
    quantization = config.quantization
    return all(config.sparse_layers) or (quantization is not None and quantization.has_own_experts)


def resize_rule(preprocessor: Mapping[str, Any], config: M3Config) -> SideCaps | None:
    """The rule of a checkpoint; None for M3's, which transformers' processors compute.

    Parameters
    ----------
    preprocessor : parsed preprocessor_config.json; empty where a checkpoint has none
    config : the model

    Raises
    ------
    ValueError : `size` is of neither rule, or of the other model's.
    """
    size = preprocessor.get("size")
    if not caps_sides(config):
        listed = isinstance(size, list | tuple) and _two_numbers(size) == _SIDES
        if size is None or listed or (isinstance(size, Mapping) and _by_area(size)):
            return None
        raise ValueError(
            f"size in {FILE} is {shown(size)}, which is no rule of MiniMax-M3: it bounds the area, "
            "as shortest_edge and longest_edge, and two numbers cap the sides in MiniMax-M3.1 "
            "alone. Take the file from the published repository"
        )
    sides = _SIDES if size is None else _two_numbers(size)
    if sides is None or not all(side % _FACTOR == 0 and side <= _LARGEST for side in sides):
        raise ValueError(
            f"size in {FILE} must be the most pixels of height and width for MiniMax-M3.1, two "
            f"multiples of {_FACTOR} up to {_LARGEST:,}; got {shown(size)}. Take the file from the "
            "published repository: one saved by transformers holds another model's rule"
        )
    return SideCaps(*sides)


def _two_numbers(size: object) -> tuple[int, int] | None:
    """Height and width where `size` gives both and nothing else."""
    if isinstance(size, Mapping):
        if size.keys() != {"height", "width"}:
            return None
        size = [size["height"], size["width"]]
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    first, second = size
    if type(first) is not int or type(second) is not int or min(first, second) < 1:
        return None
    return first, second


def _by_area(size: Mapping[str, Any]) -> bool:
    return size.keys() <= {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}


def require_no_area(wishes: Iterable[str], *, option: str) -> None:
    """Refuse bounds of an area where sides are capped, which would be heard by nobody.

    Parameters
    ----------
    wishes : names that an operator or a request gave
    option : where they were given

    Raises
    ------
    ValueError : names the first.
    """
    for name in wishes:
        if name in _AREA:
            raise ValueError(
                f"{name} in {option} bounds a picture's area, and MiniMax-M3.1 caps its sides "
                f"instead, as size in {FILE} says; leave it out"
            )
