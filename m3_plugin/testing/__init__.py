"""Test checkpoints in the layout of MiniMaxAI/MiniMax-M3, written in seconds.

`write_random_checkpoint` is for comparing implementations number by number;
`ConstructedCheckpoint` has weights set by hand, so that its answers to `needle_prompt` and
`picture_prompt` are known at any context length. Importing this package is light: torch,
transformers, tokenizers and safetensors are imported by the functions that need them.
"""

from m3_plugin.testing.constructed import ConstructedCheckpoint
from m3_plugin.testing.margins import HopMargins, needle_margins
from m3_plugin.testing.prompts import (
    COLOURS,
    NeedlePrompt,
    PicturePrompt,
    colour_rgb,
    min_needle_tokens,
    needle_prompt,
    picture_prompt,
)
from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint

__all__ = [
    "COLOURS",
    "PRESETS",
    "ConstructedCheckpoint",
    "HopMargins",
    "NeedlePrompt",
    "PicturePrompt",
    "colour_rgb",
    "min_needle_tokens",
    "needle_margins",
    "needle_prompt",
    "picture_prompt",
    "write_random_checkpoint",
]
