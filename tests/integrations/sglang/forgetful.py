"""A plugin of SGLang for tests: index keys are forgotten before they are moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integrations.sglang import extra_plugin

SEND = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.send_kv_chunk"
LOAD = "sglang.srt.mem_cache.pool_host.mha.MHATokenToKOnlyPoolHost.load_to_device_per_layer"


@dataclass(frozen=True)
class Forgetful:
    """The test's hand on an engine with this plugin."""

    folder: Path

    def install(self) -> dict[str, str]:
        """Make this module a plugin; returns the variables of engines that are to load it."""
        return extra_plugin.install(self.folder, module=__name__)

    def start(self) -> None:
        """Zero every index key before anything more is sent or brought back."""
        (self.folder / "zeroed").write_text("0")

    def stop(self) -> int:
        """Forget no more; how many caches were zeroed."""
        file = self.folder / "zeroed"
        zeroed = int(file.read_text())
        file.unlink()
        return zeroed


def register() -> None:
    """Entry point: hook what hands pages to a transfer, and what brings them back from HiCache."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SEND, send, HookType.AROUND)
    HookRegistry.register(LOAD, bring_back, HookType.AROUND)


def send(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: pages of a chunk, and with the last of them the index keys of all."""
    if kwargs.get("last_chunk"):
        # earlier ones are still to be read here
        _forget(scheduler.token_to_kv_pool_allocator.get_kvcache().index_k_pool.k_buffer)
    return original(scheduler, *args, **kwargs)


def bring_back(original: Any, pool: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: the index keys of a layer."""
    _forget([pool.k_buffer])
    return original(pool, *args, **kwargs)


def _forget(caches: Any) -> None:
    file = extra_plugin.folder() / "zeroed"
    if file.exists():
        for cache in caches:
            cache.zero_()
        file.write_text(str(int(file.read_text()) + len(caches)))
