"""Speculative decoding: what a worker does about it before any weight is read."""

from __future__ import annotations

from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from m3_plugin.checkpoint.names import require_mtp_modules
from m3_plugin.model.taking import draft_refusal
from m3_vllm import cpu_repairs
from m3_vllm.backend import dense_backend_problem, dense_choice
from m3_vllm.compat import device_type
from m3_vllm.registry import INSTEAD_OF_DRAFT


def count_draft_modules(draft: ModelConfig, *, load_format: str) -> int:
    """MTP modules in the draft's checkpoint.

    Counted in the checkpoint's headers; where they cannot be read (a format without headers, a
    hub that does not answer) config.json is believed and the loading itself finds out.

    Raises
    ------
    ValueError : the checkpoint holds none; says what to use instead.
    """
    names = (
        []
        if load_format == "dummy"
        else get_safetensors_params_metadata(draft.model, revision=draft.revision)
    )
    if not names:
        return draft.hf_config.num_mtp_modules
    return require_mtp_modules(names, checkpoint=draft.model)


def prepare_speculation(vllm_config: VllmConfig) -> None:
    """Called by the target in each worker, before any weight is read, which takes minutes.

    Raises
    ------
    ValueError : as `require_speculation`.
    """
    require_speculation(vllm_config)
    if vllm_config.speculative_config is not None and device_type() == "cpu":
        cpu_repairs.put_right()
        take_draft_layers(vllm_config)


def take_draft_layers(vllm_config: VllmConfig) -> None:
    """Have the layers of a draft model that is not ours (EAGLE3) attend as our dense ones do.

    vLLM builds them after the target, with the backend that its registry names for a CPU. For a
    model that this process may build later, the same class uses vLLM's own kernel.
    """
    if dense_choice(vllm_config).backend is not None:
        register_backend(AttentionBackendEnum.CPU_ATTN, "m3_vllm.cpu_dense.M3DraftDenseBackend")


def require_speculation(vllm_config: VllmConfig) -> None:
    """Refuse a speculative configuration that cannot work with this model.

    Raises
    ------
    ValueError : names the setting, its value and the flag that would fix it.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_model_config is vllm_config.model_config:
        return
    if str(speculative.method) in ("dspark", "dflash"):
        asked = f"--speculative-config method {speculative.method}"
        raise draft_refusal(asked, instead=INSTEAD_OF_DRAFT)
    if speculative.method == "mtp":
        _require_mtp(speculative, vllm_config)
    _require_draft_cache(speculative, vllm_config)


def _require_mtp(speculative: SpeculativeConfig, vllm_config: VllmConfig) -> None:
    draft = speculative.draft_model_config
    count_draft_modules(draft, load_format=str(vllm_config.load_config.load_format))
    target_text = vllm_config.model_config.hf_text_config
    draft_text = draft.hf_text_config
    for key in ("hidden_size", "vocab_size"):
        wanted, got = getattr(target_text, key), getattr(draft_text, key)
        if wanted != got:
            raise ValueError(
                f"the MTP module shares the target's embedding and head, so its {key} must be "
                f"{wanted}; {draft.model} has {got}. Leave 'model' out of --speculative-config "
                "to draft with the target's own checkpoint."
            )
    if speculative.attention_backend is not None:
        raise ValueError(
            "the MTP module's attention is MSA and takes no attention_backend; got "
            f"{speculative.attention_backend.name}. Leave it out of --speculative-config."
        )


def _require_draft_cache(speculative: SpeculativeConfig, vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    wanted, got = cache.cache_dtype, speculative.kv_cache_dtype
    if speculative.method == "mtp" and got not in (None, wanted):
        raise ValueError(
            "the MTP module's pages lie in the target's KV cache group, so its kv_cache_dtype must "
            f"be that of --kv-cache-dtype, {wanted}; got {got}. Leave it out of "
            "--speculative-config."
        )
    backend = speculative.attention_backend
    if backend is None:
        return
    problem = dense_backend_problem(backend.get_class(), cache_dtype=got or wanted)
    if problem:
        raise ValueError(
            f"the draft model's attention_backend {backend.name} {problem}; name another in "
            '--speculative-config, such as "attention_backend": "TRITON_ATTN", or leave it out to '
            "let vLLM choose"
        )


def require_aux_layers(layers: tuple[int, ...], *, num_layers: int) -> None:
    """Refuse EAGLE3 streams the model does not have.

    Raises
    ------
    ValueError : an id outside 0..num_layers, or one given twice, which the head would miss.
    """
    if len(set(layers)) < len(layers) or not all(0 <= layer <= num_layers for layer in layers):
        raise ValueError(
            "eagle_aux_hidden_state_layer_ids in the EAGLE3 head's config.json must be different "
            f"numbers within 0..{num_layers}, the target's layers; got {list(layers)}"
        )
