"""Multimodal processors; SGLang imports every module of this package in the tokenizer process.

An import error of a module it would log and pass over, so the module is imported here first. A
scheduler reports the `ImportError` of a package to its parent, which `SystemExit` would not.
"""

from m3_sglang.exits import ending_the_process

with ending_the_process(ImportError):
    from m3_sglang.processors import minimax_m3  # noqa: F401
