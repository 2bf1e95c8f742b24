"""The only place that reads a vLLM version or asks which platform vLLM runs on."""

from __future__ import annotations

import sys

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


def requests_of_step() -> tuple[str, ...]:
    """Ids of the requests in the step that runs now, in the order of its rows; () if nobody knows.

    vLLM tells attention nothing about them. Its model runner, either one, keeps them in the
    `input_batch` that some caller of ours holds; for messages only, as it walks the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        for holder in (frame.f_locals, getattr(frame.f_locals.get("self"), "__dict__", {})):
            names = getattr(holder.get("input_batch"), "req_ids", None)
            if names:
                return tuple(map(str, names))
        frame = frame.f_back
    return ()
