"""Every config.json key that is understood; a key on no list stops the reading.

Model families grow by new keys, under old architecture names: a reader that skips what it does not
know serves another model than the one that was published. So a key either is read, has one value
that M3 computes with, or changes neither arithmetic nor storage. `null` and empty collections say
nothing and always pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Section:
    """Keys of one mapping of config.json.

    Attributes
    ----------
    read : keys whose value has a meaning here
    only : key -> the values M3 computes with; any other is another model
    harmless : keys that change neither what is computed nor how weights are stored
    inner : key -> the section it holds
    """

    read: frozenset[str] = frozenset()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    inner: Mapping[str, Section] = field(default_factory=dict)


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# What transformers and both hosts write into any config.
_BOOKKEEPING = _keys(
    """
    _attn_implementation _attn_implementation_internal _attn_implementation_autoset _commit_hash
    _name_or_path architectures auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id
    dtype eos_token_id experts_implementation _experts_implementation
    _experts_implementation_internal finetuning_task id2label initializer_range
    is_encoder_decoder label2id model_type name_or_path output_attentions output_hidden_states
    pad_token_id prefix problem_type return_dict sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version transformers_weights use_cache use_return_dict
    """
)
# Of training alone.
_TRAINING = _keys("attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise")

_COMPRESSION = Section(
    read=_keys("spatial_merge_size temporal_patch_size"),
    only={"image_token_compression_method": ("patch_merge",)},
)

_ROPE = Section(read=_keys("rope_type type rope_theta partial_rotary_factor"))

_SPARSE = Section(
    read=_keys(
        """
        use_sparse_attention sparse_attention_freq sparse_num_index_heads sparse_index_dim
        sparse_block_size sparse_topk_blocks sparse_init_block sparse_local_block sparse_score_type
        sparse_disable_index_value
        """
    )
)

TEXT = Section(
    read=_keys(
        """
        vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        max_position_embeddings rope_theta rotary_dim partial_rotary_factor rms_norm_eps
        dense_intermediate_size intermediate_size shared_intermediate_size n_shared_experts
        num_local_experts num_experts_per_tok routed_scaling_factor use_routing_bias swiglu_alpha
        swiglu_limit swiglu_beta num_mtp_modules layer_types mlp_layer_types moe_layer_freq
        use_gemma_norm use_qk_norm qk_norm_type attention_output_gate scoring_func
        tie_word_embeddings hidden_act quantization_config index_n_heads index_head_dim
        index_block_size index_topk_blocks index_local_blocks
        """
    ),
    only={"attention_bias": (False,)},
    # num_nextn_predict_layers repeats num_mtp_modules, and so does vLLM's n_predict
    harmless=_BOOKKEEPING
    | _TRAINING
    | _keys(
        """
        num_nextn_predict_layers n_predict
        """
    ),
    inner={
        "sparse_attention_config": _SPARSE,
        "rope_parameters": _ROPE,
        "rope_scaling": _ROPE,
    },
)

VISION = Section(
    read=_keys(
        """
        hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels
        patch_size temporal_patch_size spatial_merge_size vision_segment_max_frames layer_norm_eps
        rope_theta
        """
    ),
    only={"position_embedding_type": ("rope",), "rope_mode": ("3d",)},
    # the resolution at which the tower was trained; positions are rotations of any
    harmless=_BOOKKEEPING | _keys("attention_dropout image_size"),
    inner={
        "img_token_compression_config": _COMPRESSION,
        "rope_parameters": Section(
            read=_keys("rope_theta"), only={"rope_type": ("axial", "default")}
        ),
    },
)

TOP = Section(
    read=_keys(
        """
        text_config vision_config quantization_config projector_hidden_act projector_hidden_size
        """
    ),
    only={
        "multimodal_projector_bias": (True,),
        "num_reward_heads": (0,),
        "process_image_mode": ("dynamic_res",),
        "vision_feature_layer": (-1,),
        "vision_feature_select_strategy": ("full",),
        "tie_word_embeddings": (False,),
    },
    # Ids of placeholders come from the tokenizer. The lengths and pinpoints are remains of an older
    # processor. Widths are repeated at the top by the hosts' config classes.
    harmless=_BOOKKEEPING
    | _keys(
        """
        image_token_index image_token_id video_token_index video_token_id vision_start_token_id
        vision_end_token_id image_seq_length image_grid_pinpoints hidden_size merged_hidden_size
        encoder_only language_only language_model_only num_mtp_modules num_nextn_predict_layers
        n_predict
        """
    ),
    inner={"img_token_compression_config": _COMPRESSION},
)

_TEXT_ALONE = Section(
    read=TEXT.read,
    only=TEXT.only,
    harmless=TEXT.harmless | _keys("text_config vision_config"),
    inner=TEXT.inner,
)


def require_known_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config with a key that is on no list here, or with another model's value.

    Keys inside `quantization_config` belong to `m3_plugin.quantization.dialects`.

    Parameters
    ----------
    config : parsed config.json, whole or its text part alone

    Raises
    ------
    ValueError : names the first such key and its value.
    """
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, Mapping):
        _require_section(config, _TEXT_ALONE, prefix="")
        return
    _require_section(config, TOP, prefix="")
    _require_section(text, TEXT, prefix="text_config.")
    if isinstance(vision, Mapping):
        _require_section(vision, VISION, prefix="vision_config.")


def _require_section(values: Mapping[str, Any], section: Section, *, prefix: str) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if value is None or value in ({}, [], ()) or key in section.read | section.harmless:
            continue
        if key in section.inner:
            if not isinstance(value, Mapping):
                raise ValueError(f"config key {name!r} must be a mapping; got {value!r}")
            _require_section(value, section.inner[key], prefix=f"{name}.")
        elif key in section.only:
            if value not in section.only[key]:
                wanted = " or ".join(repr(choice) for choice in section.only[key])
                raise ValueError(f"config key {name!r} must be {wanted}; got {value!r}")
        else:
            raise unknown_key(name, value)


def unknown_key(name: str, value: object) -> ValueError:
    """The error for a key on no list."""
    shown = repr(value)
    if len(shown) > 60:
        shown = f"{shown[:57]}..."
    return ValueError(
        f"config key {name!r} is none that m3-plugin knows (value {shown}): it may change what is "
        "computed or how weights are stored, so this is a model for another reader"
    )
