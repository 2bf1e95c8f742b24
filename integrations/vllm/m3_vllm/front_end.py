"""What the API server itself says in `/metrics`, which vLLM alone serves from that process.

vLLM collects from its workers only where prometheus_client shares values between processes: with
several API servers, or with `PROMETHEUS_MULTIPROC_DIR`. In every other server the worker's gauges
reach nobody.
"""

from __future__ import annotations

import os
from functools import cache

from m3_plugin.attention.backends import choose_kernels
from m3_plugin.host.metrics import export_presence
from m3_plugin.settings import Settings
from m3_vllm.compat import device_type


@cache
def export_from_front_end() -> None:
    """Export `m3_plugin:info` and what was refused, once, where no worker can be heard.

    Called where vLLM asks our model class what it takes, so a server of another model or of vLLM's
    own MiniMax-M3 never gets here. The label names the kernels this process would choose; a worker
    that cannot have them ends the server. Where values are shared the workers speak for themselves.
    """
    # prometheus_client's own switch, read when it is imported
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return
    kernels = choose_kernels(device_type(), Settings.from_environment().kernels)
    export_presence(kernels.family, refused=kernels.refused, device_type=device_type())
