"""What `register()` does: check the host, register model classes, backend and defaults, say so."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import Any

from m3_plugin.backends import choose_kernels
from m3_plugin.presence import absence, attestation, require_tested
from m3_plugin.settings import Settings
from m3_sglang.compat import (
    SGLANG_WINDOW,
    device_type,
    needs_vision_config_attributes,
    sglang_version,
)
from m3_sglang.options import BACKEND_NAME, m3_defaults

logger = logging.getLogger(__name__)

ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
MODEL_PACKAGE = "m3_sglang.models"
PROCESSOR_PACKAGE = "m3_sglang.processors"
WRAPPER = "sglang.srt.layers.attention.attention_registry.attn_backend_wrapper"
QUANTIZATION = "sglang.srt.configs.model_config.ModelConfig._parse_quant_hf_config"
CPU_CONFIG = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"


@cache
def register_with_sglang() -> None:
    """Register everything of ours, once per process.

    Raises
    ------
    SystemExit : a misspelt `M3_PLUGIN_` variable; what the user wanted is not known.
    Exception : whatever else stopped the registration; `register` decides what becomes of it.
    """
    settings = _settings()
    if settings.disable:
        _say(absence("M3_PLUGIN_DISABLE=1"))
        return
    require_tested(SGLANG_WINDOW, sglang_version(), settings=settings)
    kernels = choose_kernels(device_type(), settings.kernels)
    _register_backend()
    _register_defaults()
    _register_models()
    if settings.dequantize:
        _register_plain_weights()
    _say(
        attestation(
            host="SGLang",
            host_version=sglang_version(),
            kernels=kernels,
            detail=f"registered {', '.join(ARCHITECTURES)}",
        )
    )


def _settings() -> Settings:
    try:
        return Settings.from_environment()
    except ValueError as error:
        raise SystemExit(f"m3-plugin: {error}") from error


def _register_backend() -> None:
    """The backend's name for the registry and the command line, and our place in front of M3.

    For the M3 architectures SGLang wraps whatever backend was chosen in its own sparse backend;
    the hook wraps it in ours.
    """
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_attention_backend_choices([BACKEND_NAME])

    @register_attention_backend(BACKEND_NAME)
    def create(runner: Any) -> Any:
        from m3_sglang.backend import create_backend

        return create_backend(runner)

    HookRegistry.register(WRAPPER, wrap_attention_backend, HookType.AROUND)
    if needs_vision_config_attributes():
        HookRegistry.register(CPU_CONFIG, give_vision_config_attributes, HookType.BEFORE)


def wrap_attention_backend(original: Any, runner: Any, full_attn_backend: Any) -> Any:
    """AROUND hook: M3 gets our backend around the chosen one, all other models what they had."""
    architectures = runner.model_config.hf_config.architectures or [None]
    if architectures[0] not in ARCHITECTURES:
        return original(runner, full_attn_backend)
    from m3_sglang.backend import M3AttentionBackend

    if isinstance(full_attn_backend, M3AttentionBackend):
        return full_attn_backend
    return M3AttentionBackend(runner, dense=full_attn_backend)


def give_vision_config_attributes(model_config: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook: `vision_config` as an object, for a release that reads attributes of it."""
    from transformers import PretrainedConfig

    config = model_config.hf_config
    if isinstance(getattr(config, "vision_config", None), dict):
        config.vision_config = PretrainedConfig(**config.vision_config)


def _register_plain_weights() -> None:
    """SGLang builds plain layers for M3; our loader dequantises what it puts into them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(QUANTIZATION, without_quantization, HookType.AROUND)


def without_quantization(original: Any, model_config: Any) -> Any:
    """AROUND hook: an M3 checkpoint counts as unquantised, any other as what it is."""
    architectures = model_config.hf_config.architectures or [None]
    return None if architectures[0] in ARCHITECTURES else original(model_config)


def wrapper_hook_is_applied() -> bool:
    """Whether SGLang's function is really wrapped: a vanished hook target is only logged there."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return WRAPPER in HookRegistry._patched


def _register_defaults() -> None:
    # The module that imports SGLang's own providers: ours must come after, the last one wins.
    from sglang.srt.arg_groups.overrides import register_model_override

    for architecture in ARCHITECTURES:
        register_model_override(architecture)(m3_defaults)


def _register_models() -> None:
    """Our classes under the upstream names.

    SGLang knows one external package; naming it before the registry exists also saves the import
    of every other model. A user's own package keeps its place, ours is then added to the registry.
    """
    os.environ.setdefault("SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE", PROCESSOR_PACKAGE)
    package = os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", MODEL_PACKAGE)
    if package == MODEL_PACKAGE and "sglang.srt.models.registry" not in sys.modules:
        return
    from sglang.srt.models.registry import ModelRegistry, import_model_classes

    ModelRegistry.models.update(import_model_classes(MODEL_PACKAGE, strict=True))


def _say(line: str) -> None:
    """Log a line that must be seen: the launcher loads plugins before it sets up its logging."""
    level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
    logger.log(level, "%s", line)
