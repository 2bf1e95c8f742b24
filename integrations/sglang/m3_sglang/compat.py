"""The only place that reads SGLang's version or asks which platform SGLang runs on."""

from __future__ import annotations

import importlib.metadata

from m3_plugin.presence import TestedWindow

SGLANG_WINDOW = TestedWindow(package="sglang", minimum="0.5.22", below="0.5.24")


def sglang_version() -> str:
    """Version of the installed SGLang, read without importing it."""
    return importlib.metadata.version("sglang")


def device_type() -> str:
    """`torch.device.type` SGLang would choose by itself on this machine."""
    from sglang.srt.utils import is_cuda

    return "cuda" if is_cuda() else "cpu"


def tensor_parallel_size() -> int:
    """Ranks that share each layer, from SGLang's context of the running process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_size
