"""A plugin of SGLang for tests: what happens to HiCache's files at the worst moment."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integrations.sglang import extra_plugin

_STORE = "sglang.srt.mem_cache.hicache_storage.HiCacheFile"


@dataclass(frozen=True)
class BrokenFiles:
    """The test's hand on an engine with this plugin."""

    folder: Path

    def install(self) -> dict[str, str]:
        """Make this module a plugin; returns the variables of engines that are to load it."""
        return extra_plugin.install(self.folder, module=__name__)

    def lose_one(self, *, after: int) -> None:
        """Delete a file just before it is read, once so many have been; it was looked up before."""
        (self.folder / "lose").write_text(str(after))

    def die(self, *, after: int) -> None:
        """Kill the process that writes files in the middle of one, once so many are written."""
        (self.folder / "die").write_text(str(after))

    def happened(self, what: str) -> bool:
        """Whether "lose" or "die" came about."""
        return (self.folder / f"{what}-done").exists()


def register() -> None:
    """Entry point: hook reads and writes of one file."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_STORE}.get", read, HookType.AROUND)
    HookRegistry.register(f"{_STORE}.set", write, HookType.AROUND)


def read(original: Any, store: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: one file."""
    if _is_due("lose"):
        Path(store.file_path, f"{store._get_suffixed_key(key)}.bin").unlink()
    return original(store, key, *args, **kwargs)


def write(original: Any, store: Any, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: one file, whose first half goes where SGLang would write the whole."""
    if _is_due("die"):
        content = value.contiguous().view(-1).numpy().tobytes()
        Path(store.file_path, ".half.tmp").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(store, key, value, *args, **kwargs)


def _is_due(what: str) -> bool:
    """Count down; true once, when so many have gone before."""
    file = extra_plugin.folder() / what
    if not file.exists():
        return False
    left = int(file.read_text())
    if left > 0:
        file.write_text(str(left - 1))
        return False
    file.rename(f"{file}-done")
    return True
