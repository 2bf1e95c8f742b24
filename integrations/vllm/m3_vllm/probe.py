"""`python -P -m m3_vllm.probe`: load plugins as vLLM does and tell what its registry answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import m3_plugin
from m3_plugin.diagnosis.child import answer
from m3_vllm.compat import VLLM_WINDOW, device_type, vllm_version


def facts() -> dict[str, Any]:
    """What `m3_plugin.diagnosis.hosts` reports; imports vLLM and our model."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()

    from m3_vllm.backend import M3SparseBackend
    from m3_vllm.registration import ARCHITECTURES

    return {
        "version": vllm_version(),
        "window": [VLLM_WINDOW.minimum, VLLM_WINDOW.below],
        "tested": VLLM_WINDOW.was_tested(vllm_version()),
        "refusal": VLLM_WINDOW.refusal(vllm_version()),
        "architectures": {name: resolve(ModelRegistry, name) for name in ARCHITECTURES},
        "details": {
            "device": device_type(),
            "page size": str(*M3SparseBackend.get_supported_kernel_block_sizes()),
            "KV cache dtypes": ", ".join(map(str, M3SparseBackend.supported_kv_cache_dtypes)),
        },
        "stale_caches": stale_caches(),
    }


def resolve(registry: Any, architecture: str) -> tuple[str, bool]:
    """The class that would be built, and whether it is ours; ours is imported, as vLLM would."""
    registered = registry.models.get(architecture)
    if registered is None:
        return "not registered", False
    if not registered.module_name.startswith("m3_vllm."):
        return f"{registered.module_name}.{registered.class_name}", False
    try:
        model = registered.load_model_cls()
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}", False
    return f"{model.__module__}.{model.__qualname__}", True


def stale_caches() -> list[str]:
    """Facts vLLM keeps about our classes by one file's hash, older than any of our sources."""
    import vllm.envs as envs

    folders = (Path(__file__).parent, Path(m3_plugin.__file__).parent)
    newest = max(path.stat().st_mtime for folder in folders for path in folder.rglob("*.py"))
    cache = Path(envs.VLLM_CACHE_ROOT) / "modelinfos"
    return [str(path) for path in cache.glob("m3_vllm-*.json") if path.stat().st_mtime < newest]


if __name__ == "__main__":
    answer(facts())
