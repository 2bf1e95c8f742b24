"""Prompts and decoding on different servers, on a CPU: what SGLang's code for it asks of a GPU.

SGLang moves K, V and index keys of MSA layers and the caches of dense ones out of its own pool for
MiniMax-M3, as states of their own; nothing of ours takes part. Yet it tells NIXL that every cache
lies on a GPU, and orders an early transfer by an event of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from m3_sglang.hooks import apply_around

_GPU, _MAIN = "VRAM", "DRAM"


class MainMemoryAgent:
    """NIXL's agent under SGLang's hands, where what SGLang calls memory of a GPU is main memory.

    Parameters
    ----------
    agent : NIXL's own
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def register_memory(self, regions: Any, mem_type: str, *args: Any, **kwargs: Any) -> Any:
        return self._agent.register_memory(regions, _lies_in(mem_type), *args, **kwargs)

    def get_xfer_descs(self, parts: Any, mem_type: str, *args: Any, **kwargs: Any) -> Any:
        return self._agent.get_xfer_descs(parts, _lies_in(mem_type), *args, **kwargs)

    def prep_xfer_dlist(
        self, agent_name: str, parts: Any, mem_type: str, *args: Any, **kwargs: Any
    ) -> Any:
        return self._agent.prep_xfer_dlist(agent_name, parts, _lies_in(mem_type), *args, **kwargs)


def _lies_in(mem_type: str) -> str:
    return _MAIN if mem_type == _GPU else mem_type


def register_main_memory(original: Callable[..., None], manager: Any) -> None:
    """AROUND hook: SGLang's manager of transfers registers its caches for the first time."""
    manager.agent = MainMemoryAgent(manager.agent)
    original(manager)


def send_with_the_rest(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """AROUND hook of what sends a cached prefix ahead, once an event of CUDA says so.

    Not sent here, it is sent with the first chunk of its prompt.
    """


_PREFILL = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
HOOKS = {
    "sglang.srt.disaggregation.nixl.conn.NixlKVManager.register_buffer_to_engine": (
        register_main_memory
    ),
    f"{_PREFILL}.maybe_send_cached_prefix_chunk": send_with_the_rest,
}


def prepare_transfers(*, device_type: str) -> None:
    """On a CPU, put the functions above in place; once per process.

    Raises
    ------
    PluginRefusal : SGLang has no function of that name any more.
    """
    if device_type == "cpu":
        apply_around(HOOKS, needed_for="disaggregation on a CPU (--disaggregation-mode)")
