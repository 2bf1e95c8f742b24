"""SGLang's hooks after its start, and whether the one we cannot do without is in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from m3_plugin.host.presence import PluginRefusal

WRAPPER = "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper"


def apply_around(hooks: Mapping[str, Callable[..., Any]], *, needed_for: str) -> None:
    """Wrap functions of SGLang after its start, once each; `from` imports of them are wrapped too.

    Parameters
    ----------
    needed_for : what cannot be served without them, for the error

    Raises
    ------
    PluginRefusal : SGLang has no function of that name; it would only log that.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks.items():
        if target not in HookRegistry._patched:
            HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()
    missing = [target for target in hooks if target not in HookRegistry._patched]
    if missing:
        raise PluginRefusal(
            f"this SGLang lacks {', '.join(missing)}, needed for {needed_for}; install a tested "
            "release"
        )


def wrapper_hook_is_applied() -> bool:
    """Whether SGLang's function is really wrapped: a vanished hook target is only logged there."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return WRAPPER in HookRegistry._patched
