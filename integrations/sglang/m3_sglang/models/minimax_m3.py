"""MiniMax-M3 for SGLang: the classes its model registry finds, named like the architectures."""

from __future__ import annotations

from m3_sglang.text import M3CausalLM


class MiniMaxM3SparseForCausalLM(M3CausalLM):
    """Text model."""


class MiniMaxM3SparseForConditionalGeneration(M3CausalLM):
    """The released model, text only so far: its vision part is not loaded."""


EntryClass = [MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration]
