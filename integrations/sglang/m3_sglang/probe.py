"""`python -P -m m3_sglang.probe`: load plugins as SGLang does, tell what its registries answer."""

from __future__ import annotations

from typing import Any

from m3_plugin.diagnosis.child import answer
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_sglang.compat import SGLANG_WINDOW, device_type, sglang_version


def facts() -> dict[str, Any]:
    """What `m3_plugin.diagnosis.hosts` reports; imports SGLang and our model."""
    from sglang.srt.plugins import load_plugins

    load_plugins()

    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from m3_sglang.hooks import wrapper_hook_is_applied
    from m3_sglang.options import BACKEND_NAME
    from m3_sglang.ours import ARCHITECTURES

    hooked = wrapper_hook_is_applied() and BACKEND_NAME in ATTENTION_BACKENDS
    return {
        "version": sglang_version(),
        "window": [SGLANG_WINDOW.minimum, SGLANG_WINDOW.below],
        "tested": SGLANG_WINDOW.was_tested(sglang_version()),
        "refusal": SGLANG_WINDOW.refusal(sglang_version()),
        "architectures": {name: resolve(name, hooked=hooked) for name in ARCHITECTURES},
        "details": {"device": device_type(), "page size": str(PAGED_BLOCK_SIZE)},
        "stale_caches": [],
    }


def resolve(architecture: str, *, hooked: bool) -> tuple[str, bool]:
    """The class that would be built, and whether it and the attention backend are ours."""
    from sglang.srt.models.registry import ModelRegistry

    from m3_sglang.ours import MODEL_PACKAGE

    try:
        model, _ = ModelRegistry.resolve_model_cls(architecture)
    except Exception as error:
        return f"cannot be resolved: {type(error).__name__}: {error}", False
    name = f"{model.__module__}.{model.__qualname__}"
    if not hooked:
        return f"{name}, attention backend: SGLang's own", False
    return f"{name}, attention backend: ours", name.startswith(f"{MODEL_PACKAGE}.")


if __name__ == "__main__":
    answer(facts())
