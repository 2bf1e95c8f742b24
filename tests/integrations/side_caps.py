"""MiniMax-M3.1's pictures and frames from the words of its rule alone: Pillow and numpy.

No code of ours, of a host or of transformers. Both hosts' processors are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

CAPS = (672, 672)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# height and width of pictures, and the grid of patches that each becomes
SIZES = {
    (28, 28): (2, 2),
    (75, 100): (6, 8),
    (100, 1000): (6, 48),
    (1080, 1920): (28, 48),
    (1000, 700): (48, 34),
    (3, 2000): (2, 48),
}
# A normalised level of 255 is 0.0146; roundings of fp32 are far below.
ATOL = 1e-5


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """[height, width, 3], uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rounded_up(side: int) -> int:
    return (side + 27) // 28 * 28


def size_of(height: int, width: int) -> tuple[int, int]:
    """Round up; if a side is beyond its cap, scale both down to it, and round up again."""
    tall, wide = rounded_up(height), rounded_up(width)
    if tall > CAPS[0] or wide > CAPS[1]:
        smaller = (
            min(CAPS[0], tall * CAPS[1] // wide),
            min(wide * CAPS[0] // tall, CAPS[1]),
        )
        tall, wide = (rounded_up(max(side, 28)) for side in smaller)
    return tall, wide


def patches(frames: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches [t * h * w, 3 * 2 * 14 * 14] of a picture or video, and its grid (t, h, w).

    A picture is one frame; an odd last frame is seen twice.
    """
    height, width = frames[0].shape[:2]
    size = size_of(height, width)
    resized = [
        np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        for frame in frames
    ]
    if len(resized) % 2:
        resized.append(resized[-1])
    pixels = (np.stack(resized) / 255.0 - np.array(MEAN)) / np.array(STD)
    t, h, w = len(resized) // 2, size[0] // 14, size[1] // 14
    rows: list[Any] = []
    # squares of four patches, row by row; the four within a square, row by row
    for pair in range(t):
        for square in np.ndindex(h // 2, w // 2):
            for inner in np.ndindex(2, 2):
                top, left = (14 * (2 * s + i) for s, i in zip(square, inner, strict=True))
                patch = pixels[2 * pair : 2 * pair + 2, top : top + 14, left : left + 14]
                # channels, then frames, then rows and columns
                rows.append(patch.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(rows).astype(np.float32), (t, h, w)
