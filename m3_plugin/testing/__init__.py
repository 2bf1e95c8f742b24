"""Test checkpoints in the layout of MiniMaxAI/MiniMax-M3, written in seconds and a few MB large.

`random_checkpoint` compares implementations number by number; `constructed` has weights set by
hand, so that its answers are known at any context length. Importing this package is light:
transformers, tokenizers and safetensors are imported by the functions that need them.
"""
