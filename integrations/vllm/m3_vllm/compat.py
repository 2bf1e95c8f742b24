"""The only place that reads a vLLM version or asks which platform vLLM runs on."""

from __future__ import annotations

from m3_plugin.host.presence import TestedWindow

VLLM_WINDOW = TestedWindow(package="vllm", minimum="0.31", below="0.34", tested=("0.31", "0.32"))


def vllm_version() -> str:
    """Version string of the vLLM that is running, whatever its distribution is called."""
    import vllm

    return vllm.__version__


def device_type() -> str:
    """`torch.device.type` of vLLM's platform; reads no device and starts no CUDA."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def device_major() -> int | None:
    """Major compute capability of vLLM's platform, 10 for B200; None on a CPU."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return None if capability is None else capability.major
