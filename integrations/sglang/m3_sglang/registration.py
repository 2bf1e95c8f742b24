"""What `register()` does: check the host, register model classes, backend and defaults, say so."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from functools import cache
from typing import Any

from m3_kernels.index_pages import channels
from m3_plugin.attention.backends import INDEX_KEYS, choose_kernels
from m3_plugin.host.presence import attestation, require_tested
from m3_plugin.model.released import misnamed_model
from m3_plugin.model.taking import refusal, stands_aside
from m3_plugin.quantization.dialects import Quantization
from m3_plugin.settings import Settings, remarks
from m3_sglang.chats import register_chats
from m3_sglang.compat import (
    SGLANG_WINDOW,
    deep_gemm_is_the_default,
    device_type,
    has_cache_budget,
    needs_vision_config_attributes,
    needs_weight_only_mxfp8,
    read_config,
    read_draft_config,
    serves_own_experts,
    sglang_version,
    why_left_alone,
)
from m3_sglang.hooks import WRAPPER
from m3_sglang.options import BACKEND_NAME, m3_defaults
from m3_sglang.ours import (
    ARCHITECTURES,
    DRAFT_ARCHITECTURE,
    MODEL_PACKAGE,
    MXFP8_METHOD,
    STORED_METHOD,
    is_ours,
)

logger = logging.getLogger(__name__)

# Where SGLang's own classes are; it has none for the draft.
SGLANGS_OWN = {
    "MiniMaxM3SparseForCausalLM": "sglang.srt.models.minimax_m3",
    "MiniMaxM3SparseForConditionalGeneration": "sglang.srt.models.minimax_m3_vl",
}
DRAFT_MODEL_TYPE = "minimax_m3_mtp"
PROCESSOR_PACKAGE = "m3_sglang.processors"
MODEL_CLASS = "sglang.srt.model_loader.utils.get_model_architecture"
MEDIA_PROCESSOR = "sglang.srt.managers.multimodal_processor.get_mm_processor"
QUANTIZATION = "sglang.srt.configs.model_config.ModelConfig._verify_quantization"
DRAFT_CONFIG = "sglang.srt.configs.model_config.ModelConfig._config_draft_model"
REQUEST_CHECK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
INDEX_POOL = "sglang.srt.configs.model_config.is_minimax_sparse"
INDEX_DTYPE = "sglang.srt.mem_cache.memory_pool.get_minimax_sparse_index_dtype"
INDEX_WIDTH = "sglang.srt.configs.model_config.get_minimax_sparse_attention_config"
OWN_EXPERTS = "sglang.srt.arg_groups.model_overrides.minimax_m3._resolve_quant_method"
CACHE_BUDGET = (
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes"
)
# On a CPU, every other format.
CPU_CONFIG = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"


@cache
def register_with_sglang() -> None:
    """Register everything of ours, once per process.

    SGLang loads plugins for every model, so a misspelt `M3_PLUGIN_` variable is only warned of
    here; `m3_defaults` ends the start of an M3, because what the user wanted is not known.

    Raises
    ------
    Exception : whatever stopped the registration; `register` decides what becomes of it.
    """
    settings, mistakes = Settings.read()
    for remark in remarks(mistakes):
        logger.warning("m3-plugin: %s", remark)
    require_tested(SGLANG_WINDOW, sglang_version(), settings=settings)
    kernels = choose_kernels(device_type(), settings.kernels)
    _register_backend()
    _register_defaults()
    _register_models()
    _register_draft_config()
    _register_quantization()
    register_chats()
    if settings.index_keys != "auto":
        _register_index_keys()
    _say(
        attestation(
            host="SGLang",
            host_version=sglang_version(),
            kernels=kernels.describe(),
            detail=f"registered {', '.join(ARCHITECTURES)}",
        )
    )
    if (misnamed := misnamed_model(sys.argv)) is not None:
        logger.warning("m3-plugin: %s", misnamed)


def _register_backend() -> None:
    """The backend's name for the registry and the command line, and our place in front of M3.

    For the M3 architectures SGLang wraps whatever backend was chosen in its own sparse backend;
    the hook wraps it in ours.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([BACKEND_NAME])

    @register_attention_backend(BACKEND_NAME)
    def create(runner: Any) -> Any:
        from m3_sglang.backend import create_backend

        return create_backend(runner)

    HookRegistry.register(MODEL_CLASS, choose_model_class, HookType.AROUND)
    HookRegistry.register(MEDIA_PROCESSOR, choose_media_processor, HookType.AROUND)
    HookRegistry.register(WRAPPER, wrap_attention_backend, HookType.AROUND)
    HookRegistry.register(DRAFT_CONFIG, configure_draft, HookType.AFTER)
    HookRegistry.register(INDEX_POOL, has_index_keys, HookType.AFTER)
    HookRegistry.register(REQUEST_CHECK, check_embeddings, HookType.BEFORE)
    if has_cache_budget():
        HookRegistry.register(CACHE_BUDGET, keep_room, HookType.AROUND)
    if needs_vision_config_attributes():
        HookRegistry.register(CPU_CONFIG, give_vision_config_attributes, HookType.BEFORE)


def choose_model_class(original: Any, model_config: Any) -> tuple[Any, str]:
    """AROUND hook: our class where we read every key of the config, SGLang's own elsewhere.

    SGLang chooses by the architecture's name, and successors of M3 keep the name.

    Raises
    ------
    ValueError : not ours to serve, and SGLang has no class of its own or the plugin is required.
    """
    model, architecture = original(model_config)
    if not model.__module__.startswith(f"{MODEL_PACKAGE}."):
        return model, architecture
    draft = model.__name__ == DRAFT_ARCHITECTURE
    reason = why_left_alone(model_config.hf_config, draft=draft)
    if reason is None:
        return model, architecture
    required = Settings.from_environment().required
    own = None if required else _sglangs_own(model.__name__)
    if own is None:
        raise refusal("SGLang", reason, required=required)
    _say_once(stands_aside("SGLang", reason))
    return own, architecture


@cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)


def _sglangs_own(architecture: str) -> Any:
    """SGLang's class for an architecture, None if it has none."""
    module = SGLANGS_OWN.get(architecture)
    if module is None:
        return None
    return getattr(importlib.import_module(module), architecture)


def choose_media_processor(original: Any, hf_config: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: SGLang's own processor of images for models that are SGLang's."""
    architecture = (hf_config.architectures or [None])[0]
    if architecture in ARCHITECTURES and not is_ours(hf_config):
        from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING, import_processors

        if any(
            found.__module__.startswith(PROCESSOR_PACKAGE) for found in PROCESSOR_MAPPING.values()
        ):
            import_processors("sglang.srt.multimodal.processors", overwrite=True)
    return original(hf_config, *args, **kwargs)


def wrap_attention_backend(original: Any, runner: Any, full_attn_backend: Any) -> Any:
    """AROUND hook: M3 gets our backend around the chosen one, all other models what they had."""
    if not is_ours(runner.model_config.hf_config):
        return original(runner, full_attn_backend)
    from m3_sglang.backend import M3AttentionBackend, around, speculating

    if isinstance(full_attn_backend, M3AttentionBackend):
        return full_attn_backend
    return around(speculating(runner, full_attn_backend), runner)


def configure_draft(result: None, model_config: Any) -> None:
    """AFTER hook: an M3 checkpoint that is to draft is its MTP module alone, one MSA layer.

    SGLang then makes a cache pool and a model of that shape. One module is applied again for every
    further token, so the first one is taken of a checkpoint with several.
    """
    hf_config = model_config.hf_config
    if not model_config.is_draft_model or not is_ours(hf_config, draft=True):
        return
    text = getattr(hf_config, "text_config", hf_config)
    hf_config.architectures = [DRAFT_ARCHITECTURE]
    text.num_hidden_layers = 1
    text.num_nextn_predict_layers = 1
    text.moe_layer_freq = [1]
    text.sparse_attention_config = dict(text.sparse_attention_config) | {
        "use_sparse_attention": True,
        "sparse_attention_freq": [1],
        "sparse_disable_index_value": [1],
    }


def has_index_keys(result: bool, hf_config: Any) -> bool:
    """AFTER hook: the MTP module needs the pool that keeps index keys, as M3 does."""
    return result or (hf_config.architectures or [None])[0] == DRAFT_ARCHITECTURE


def check_embeddings(manager: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook: a request's own embeddings are as wide as the model; others end a scheduler.

    Raises
    ------
    ValueError : they are not; SGLang answers with it.
    """
    rows = getattr(request, "input_embeds", None)
    config = manager.model_config.hf_config
    if not rows or not is_ours(config):
        return
    width = getattr(config, "text_config", config).hidden_size
    wrong = next((len(row) for row in rows if len(row) != width), None)
    if wrong is not None:
        raise ValueError(f"input_embeds must be rows of hidden_size={width} numbers; got {wrong}")


def keep_room(original: Any, sizing: Any, *args: Any, **kwargs: Any) -> int:
    """AROUND hook: SGLang's caches leave room for what our sessions allocate after them."""
    available: int = original(sizing, *args, **kwargs)
    if not is_ours(sizing.model_config.hf_config):
        return available
    from m3_sglang.session import workspace_of_pool

    wanted = workspace_of_pool(sizing)
    if wanted:
        logger.info(
            "m3-plugin: %.2f GiB of the caches' memory are left to the workspace of MSA layers",
            wanted / 2**30,
        )
    return max(0, available - wanted)


def _register_index_keys() -> None:
    """Room for the index keys that were asked for, and their scales, in SGLang's pool for M3 and in
    its sizing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(INDEX_DTYPE, index_keys_as_asked, HookType.AFTER)
    HookRegistry.register(INDEX_WIDTH, with_room_for_scales, HookType.AFTER)


def index_keys_as_asked(result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER hook: the dtype of index keys in SGLang's pool for M3."""
    return INDEX_KEYS[Settings.from_environment().index_keys]


def with_room_for_scales(result: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    """AFTER hook: what SGLang makes the pool from; the scales count as channels of the keys."""
    if not is_ours(hf_config):
        return result
    asked = INDEX_KEYS[Settings.from_environment().index_keys]
    return dict(result) | {"sparse_index_dim": channels(result["sparse_index_dim"], asked)}


def give_vision_config_attributes(model_config: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook: `vision_config` as an object, for a release that reads attributes of it."""
    from transformers import PretrainedConfig

    config = model_config.hf_config
    if isinstance(getattr(config, "vision_config", None), dict):
        config.vision_config = PretrainedConfig(**config.vision_config)


def _register_quantization() -> None:
    """Our word on what SGLang settles for M3 checkpoints."""
    from sglang.srt.arg_groups.overrides import register_model_override
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for architecture in ARCHITECTURES:
        register_model_override(architecture)(weight_defaults)
    HookRegistry.register(QUANTIZATION, settle_quantization, HookType.AROUND)
    if serves_own_experts():
        HookRegistry.register(OWN_EXPERTS, count_as_mxfp8, HookType.AROUND)


def weight_defaults(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Override provider of SGLang: how the weights of an M3 checkpoint are served.

    SGLang's own provider takes a checkpoint at its word, and MXFP8 to expert kernels of SM100.
    """
    if not is_ours(hf_config):
        return {}
    quantization = read_config(hf_config).quantization
    if quantization is None:
        return {}
    runner = server_args.moe_runner_backend
    if Settings.from_environment().dequantize:
        return {
            "quantization": None,
            "moe_runner_backend": "triton" if runner == "auto" else runner,
        }
    if is_stored(quantization, server_args.device):
        require_one_tokenizer(server_args)
        return {"quantization": STORED_METHOD, "moe_runner_backend": "triton"}
    if quantization.method == "mxfp8" and needs_weight_only_mxfp8(server_args.device):
        require_one_tokenizer(server_args)
        return {
            "quantization": MXFP8_METHOD,
            "moe_runner_backend": "marlin" if quantization.has_own_experts else "triton",
        }
    if quantization.method == "mxfp8" and runner == "auto":
        return right_experts(server_args.device)
    return {}


def is_stored(quantization: Quantization | None, device: str) -> bool:
    """Whether a checkpoint is served by `m3_sglang.stored_weights`."""
    if quantization is None or device != "cpu":
        return False
    return quantization.method != "mxfp8" or quantization.has_own_experts


def require_one_tokenizer(server_args: Any) -> None:
    """Refuse tokenizer workers where the quantisation method is ours.

    Raises
    ------
    ValueError : there are several.
    """
    workers = getattr(server_args, "tokenizer_worker_num", 1)
    if workers > 1:
        raise ValueError(
            "m3-plugin: --tokenizer-worker-num must be 1 for quantised weights on this chip; got "
            f"{workers}: SGLang loads no plugins in these workers, and the method is ours"
        )


def count_as_mxfp8(original: Any, hf_config: Any) -> Any:
    """AROUND hook: for SGLang's defaults an M3.1 that is ours has M3's format.

    Those for M3.1 are of SGLang's own model: attention backends, caches and expert kernels that
    ours does not run on.
    """
    found = original(hf_config)
    return "mxfp8" if found == "minimax_m3_nvfp4" and is_ours(hf_config) else found


def right_experts(device: str) -> dict[str, Any]:
    """The expert kernels of MXFP8 on SM100, where SGLang's default is wrong for long prompts."""
    if not deep_gemm_is_the_default(device):
        return {}
    logger.info(
        "m3-plugin: experts on flashinfer_trtllm_routed instead of SGLang's default deep_gemm, "
        "whose layout for large batches leaves alpha and limit of MiniMax-M3's SwiGLU out"
    )
    return {"moe_runner_backend": "flashinfer_trtllm_routed"}


def settle_quantization(original: Any, model_config: Any) -> None:
    """AROUND hook: an M3 checkpoint counts as what `weight_defaults` said, any other as what it is.

    Here SGLang settles the method, from its own defaults for M3 and from the checkpoint.
    """
    if not is_ours(model_config.hf_config):
        original(model_config)
    elif Settings.from_environment().dequantize:
        model_config.quantization = None
    elif model_config.quantization == MXFP8_METHOD or is_weight_only_draft(model_config):
        from sglang.srt.layers import quantization

        from m3_sglang.quantization import M3Mxfp8Config

        model_config.quantization = MXFP8_METHOD
        quantization.QUANTIZATION_METHODS[MXFP8_METHOD] = M3Mxfp8Config
        quantization.CPU_QUANTIZATION_METHODS[MXFP8_METHOD] = M3Mxfp8Config
    elif model_config.quantization == STORED_METHOD or is_stored_draft(model_config):
        from sglang.srt.layers import quantization

        from m3_sglang.stored_weights import M3StoredConfig

        model_config.quantization = STORED_METHOD
        quantization.QUANTIZATION_METHODS[STORED_METHOD] = M3StoredConfig
        quantization.CPU_QUANTIZATION_METHODS[STORED_METHOD] = M3StoredConfig
    else:
        original(model_config)


def is_weight_only_draft(model_config: Any) -> bool:
    """Whether an MTP module is weight-only MXFP8 here: SGLang asks `weight_defaults` of targets."""
    quantization, device = draft_quantization(model_config)
    if quantization is None or quantization.method != "mxfp8" or is_stored(quantization, device):
        return False
    return needs_weight_only_mxfp8(device)


def is_stored_draft(model_config: Any) -> bool:
    """Whether an MTP module is served by `m3_sglang.stored_weights`."""
    return is_stored(*draft_quantization(model_config))


def draft_quantization(model_config: Any) -> tuple[Quantization | None, str]:
    """How an MTP module's checkpoint is quantised if SGLang leaves that open, and the device."""
    if not model_config.is_draft_model or model_config.quantization is not None:
        return None, ""
    from sglang.srt.runtime_context import get_server_args

    server_args: Any = get_server_args()
    return read_draft_config(model_config.hf_config).quantization, server_args.device


def _register_defaults() -> None:
    # The module that imports SGLang's own providers: ours must come after, the last one wins.
    from sglang.srt.arg_groups.overrides import register_model_override

    for architecture in ARCHITECTURES:
        register_model_override(architecture)(defaults_if_ours)


def defaults_if_ours(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Override provider of SGLang: our defaults and refusals, for models that are ours.

    Raises
    ------
    ValueError : an argument asks for what is not served; or caches are to hold what SGLang's own
        model does not write, and its pool would make room for.
    """
    if is_ours(hf_config):
        return m3_defaults(server_args, hf_config)
    settings = Settings.from_environment()
    for name in ("index_keys", "cache_values"):
        if (value := getattr(settings, name)) != "auto":
            reason = why_left_alone(hf_config, draft=False)
            raise ValueError(
                f"m3-plugin: M3_PLUGIN_{name.upper()}={value} needs this plugin's model; leave it "
                f"out: {stands_aside('SGLang', str(reason))}"
            )
    return {}


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


def _register_draft_config() -> None:
    """The `model_type` of MTP checkpoints of their own, which transformers does not know."""
    from transformers import AutoConfig, PretrainedConfig

    config = type("MiniMaxM3MTPConfig", (PretrainedConfig,), {"model_type": DRAFT_MODEL_TYPE})
    AutoConfig.register(DRAFT_MODEL_TYPE, config, exist_ok=True)


def _say(line: str) -> None:
    """Log a line that must be seen: the launcher loads plugins before it sets up its logging."""
    level = logging.INFO if logger.isEnabledFor(logging.INFO) else logging.WARNING
    logger.log(level, "%s", line)
