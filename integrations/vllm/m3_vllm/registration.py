"""What `register()` does: check the host, register our model classes, say so."""

from __future__ import annotations

import logging
import sys
from functools import cache

from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry

from m3_plugin.attention.backends import choose_kernels
from m3_plugin.host.presence import absence, attestation, require_tested
from m3_plugin.model.released import misnamed_model
from m3_plugin.settings import Settings, remarks
from m3_vllm.compat import VLLM_WINDOW, device_type, vllm_version
from m3_vllm.registry import choose_by_config
from m3_vllm.renderer import register_renderer

# Under vllm.* so that vLLM's own logging configuration shows it in every process.
logger = init_logger("vllm.m3_plugin")

ARCHITECTURES = {
    "MiniMaxM3SparseForCausalLM": "m3_vllm.model:M3ForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration": "m3_vllm.model:M3ForConditionalGeneration",
    # what vLLM calls the draft model of both
    "MiniMaxM3MTP": "m3_vllm.mtp:M3MTP",
}


@cache
def register_with_vllm() -> None:
    """Register our classes for both M3 architectures, once per process.

    A refusal (untested vLLM, no kernels for this device) leaves vLLM's own classes in place and
    logs why; under `M3_PLUGIN_REQUIRED=1` it ends the process. vLLM loads plugins for every model,
    so a misspelt `M3_PLUGIN_` variable is only warned of here; `worker_session` ends the start of
    an M3, because what the user wanted is not known.

    Raises
    ------
    Exception : whatever stopped the registration, when the plugin is required.
    """
    settings, mistakes = Settings.read()
    for remark in remarks(mistakes):
        logger.warning("m3-plugin: %s", remark)
    try:
        require_tested(VLLM_WINDOW, vllm_version(), settings=settings)
        kernels = choose_kernels(device_type(), settings.kernels)
        choose_by_config(ModelRegistry, architectures=ARCHITECTURES, settings=settings)
        register_renderer()
        for architecture, path in ARCHITECTURES.items():
            ModelRegistry.register_model(architecture, path)
        if settings.dequantize:
            # opt-in because it imports vLLM's quantisation early
            from m3_vllm.quantization import PlainWeights

            PlainWeights.register(tuple(ARCHITECTURES))
        else:
            from m3_vllm.own_experts import OwnExperts
            from m3_vllm.quantization import StoredWeights

            # first: on a CPU it takes all formats
            StoredWeights.register(tuple(ARCHITECTURES))
            OwnExperts.register(tuple(ARCHITECTURES))
    except Exception as error:
        if settings.required:
            raise
        logger.warning("%s", absence(f"{type(error).__name__}: {error}"))
        return
    _say(
        attestation(
            host="vLLM",
            host_version=vllm_version(),
            kernels=kernels.describe(),
            detail=f"registered {', '.join(ARCHITECTURES)}",
        )
    )
    if (misnamed := misnamed_model(sys.argv)) is not None:
        logger.warning("m3-plugin: %s", misnamed)


def _say(line: str) -> None:
    """Log a line that must be seen.

    The API server loads plugins before it sets its logging up, when only warnings get through.
    """
    level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
    logger.log(level, "%s", line)
