"""Every option of vLLM's has been judged: served, none of the model's business, or refused by name.

A release that brings another fails here until somebody has looked at what MSA layers make of it.
"""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import (
    AttentionConfig,
    CacheConfig,
    LoRAConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs

from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config
from m3_plugin.quantization.dialects import read_quantization
from m3_vllm import cpu_repairs
from m3_vllm.adapters import choose_adapted_layers
from m3_vllm.options import require_served
from m3_vllm.quantization import StoredWeights

# What the model has a part in, and where a test of ours shows it.
SERVED = {
    "tests of whole engines": """
        model served_model_name tokenizer dtype kv_cache_dtype max_model_len max_num_seqs
        max_num_batched_tokens enable_prefix_caching enable_chunked_prefill enforce_eager
        tensor_parallel_size block_size num_gpu_blocks_override load_format trust_remote_code
        speculative_config spec_method spec_model spec_tokens quantization worker_extension_cls
        compilation_config reasoning_parser limit_mm_per_prompt mm_processor_kwargs
        mm_processor_cache_gb media_io_kwargs hf_overrides attention_config attention_backend
        language_model_only seed structured_outputs_config async_scheduling revision
        allowed_local_media_path allowed_media_domains optimization_level""",
    "test_vision_ranks.py": "mm_encoder_tp_mode",
    "test_ranks.py": """
        data_parallel_size data_parallel_size_local enable_expert_parallel
        enable_ep_weight_filter""",
    "test_gpu_servers.py, test_norms.py, test_rehearsal.py, test_building.py": """
        pipeline_parallel_size
        cudagraph_capture_sizes max_cudagraph_capture_size enable_sleep_mode
        sleep_preserve_parameter_names enable_cumem_allocator sleep_mode_offload_cudagraph""",
    "the expert kernel that vLLM picks is probed in every server": "moe_backend linear_backend",
}
# vLLM's own affair: nothing of a model class, its caches or its kernels depends on it.
HOST = """
    model_weights hf_config_path runner convert skip_tokenizer_init tokenizer_mode download_dir
    safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size
    config_format ir_op_priority distributed_executor_backend master_addr master_port nnodes
    node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind numa_bind_nodes
    numa_bind_cpus device_ids data_parallel_rank data_parallel_start_rank data_parallel_address
    data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb
    data_parallel_multi_port_external_lb data_parallel_backend
    all2all_backend dp_sync_interval disable_nccl_for_dp_synchronization eplb_config
    expert_placement_strategy _api_process_count _api_process_rank max_parallel_loading_workers
    prefix_caching_hash_algo prefix_cache_retention_interval disable_cascade_attn offload_backend
    cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group offload_prefetch_step
    offload_params gpu_memory_utilization kv_cache_memory_bytes max_num_scheduled_tokens
    long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_active_seqs
    max_num_queued_reqs max_num_queued_tokens max_logprobs logprobs_mode use_fp64_gumbel
    enable_trace_replay disable_log_stats aggregate_engine_logging code_revision hf_token
    model_class_overrides tokenizer_revision quantization_config allow_deprecated_quantization
    disable_custom_all_reduce enable_shm_tensor_arena interleave_mm_strings
    mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb
    io_processor_plugin renderer_num_workers skip_mm_profiling mm_tensor_ipc mm_processor_device
    mm_ipc_gpu_memory_gb mm_device_do_normalize ray_workers_use_nsight model_loader_extra_config
    ignore_patterns disable_chunked_mm_input scheduler_reserve_full_isl prefill_schedule_interval
    watermark disable_hybrid_kv_cache_manager aux_output_config reasoning_parser_plugin
    watermark_config show_hidden_metrics_for_version otlp_traces_endpoint
    collect_detailed_traces per_request_spec_decode_metrics kv_cache_metrics
    kv_cache_metrics_sample custom_histogram_buckets cudagraph_metrics
    enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details
    jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats scheduling_policy scheduler_cls
    kernel_config enable_flashinfer_autotune worker_cls profiler_config logging_config log_level
    log_config_file kv_events_config reasoning_config generation_config enable_nccl_comm_suspend
    override_generation_config additional_config use_tqdm_on_load pt_load_map_location
    logits_processors stream_interval performance_mode fault_tolerance_config
    enable_fault_tolerance tokens_only shutdown_timeout fail_on_environ_validation
    enable_return_routed_experts return_sampling_mask enable_prompt_embeds model_impl
    sleep_mode_backend watchdog_config"""
# For models of another kind: of state space, latent or windowed attention, pooling, diffusion.
OTHER_MODELS = """
    dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size
    enable_hc_sp sparse_indexer_topk_backend disable_sliding_window engram_config mamba_config
    mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode prefix_match_unit
    enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm mamba_backend
    mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
    gdn_prefill_backend kda_prefill_backend kda_decode_backend kv_sharing_fast_prefill
    swa_bounded_replay pooler_config diffusion_config monokernel"""
# Heard by vLLM's own vision tower and not by ours, which is plain torch; docs/vllm.md.
OWN_TOWER = """
    mm_encoder_attn_backend mm_encoder_attn_dtype
    mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin
    video_pruning_rate video_pruning_method"""
# Caches that move and weights that change: docs/fleets.md says which connectors are served.
FLEETS = """
    kv_transfer_config ec_transfer_config ec_manager_config kv_offloading_size
    kv_offloading_backend weight_transfer_config"""
# vLLM says no by itself: the class has no such interface.
REFUSED_BY_VLLM = """
    enable_batch_sharded_sampling enable_elastic_ep elastic_ep_max_dp_size"""
# LoRA: vLLM's layers around the projections that take adapters; test_adapters.py.
ADAPTERS = """
    enable_lora max_loras max_lora_rank default_mm_loras fully_sharded_loras max_cpu_loras
    lora_dtype lora_target_modules specialize_active_lora enable_mixed_moe_lora_format
    enable_moe_shared_loras max_lora_cls_labels"""
REFUSED = """
    enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold
    decode_context_parallel_size prefill_context_parallel_size enable_eplb
    enable_tower_connector_lora kv_cache_dtype_skip_layers mm_encoder_only enable_mm_embeds"""

JUDGED = (
    *SERVED.values(),
    HOST,
    OTHER_MODELS,
    OWN_TOWER,
    FLEETS,
    ADAPTERS,
    REFUSED_BY_VLLM,
    REFUSED,
)

# Of `--attention-config` and `--speculative-config`.
ATTENTION = """
    backend backend_per_kind indexer_kv_dtype flash_attn_version use_trtllm_attention
    flash_attn_max_num_splits_for_cuda_graph disable_flashinfer_q_quantization
    minimax_m3_msa_decode_backend indexer_sparse_logits hisparse_config use_non_causal
    tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph mla_prefill_backend
    use_prefill_query_quantization sparse_mla_force_mqa sparse_mla_prefill_workspace_factor
    flex_attn_block_m flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size
    trtllm_ragged_backend indexer_tp_shard_min_rows minimax_m3_indexer_cp"""
SPECULATIVE = """
    enforce_eager num_speculative_tokens model method draft_tensor_parallel_size
    tensor_parallel_size quantization moe_backend attention_backend kv_cache_dtype max_model_len
    revision code_revision index_share_for_mtp_iteration disable_padded_drafter_batch
    disable_eagle_block_drop use_local_argmax_reduction use_heterogeneous_vocab prompt_lookup_max
    prompt_lookup_min parallel_drafting target_model_config target_parallel_config
    num_speculative_tokens_per_batch_size draft_model_config draft_parallel_config
    suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests
    suffix_decoding_max_spec_factor suffix_decoding_min_token_prob draft_load_config
    rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length
    enable_adaptive_verification draft_sample_method dspark_draft_topk
    disable_lookahead_block_hashes draft_lm_head_quantization xpress_topc fly_window_size
    fly_entropy_threshold fly_entropy_top_k"""
PARTS = """
    model_config cache_config parallel_config scheduler_config device_config load_config
    offload_config attention_config aux_output_config engram_config mamba_config kernel_config
    lora_config speculative_config watermark_config diffusion_config structured_outputs_config
    observability_config logging_config quant_config compilation_config profiler_config
    kv_transfer_config kv_events_config ec_transfer_config ec_manager_config reasoning_config
    additional_config instance_id optimization_level performance_mode weight_transfer_config
    shutdown_timeout watchdog_config"""


def fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("cls", "judged"),
    [
        (EngineArgs, JUDGED),
        (AttentionConfig, (ATTENTION,)),
        (SpeculativeConfig, (SPECULATIVE,)),
        (VllmConfig, (PARTS,)),
    ],
)
def test_every_option_is_judged(cls: Any, judged: tuple[str, ...]) -> None:
    """Options that another release of the window has and this one lacks may stand here too."""
    names = [name for group in judged for name in group.split()]
    assert len(names) == len(set(names))
    unjudged = sorted(fields(cls) - set(names))
    assert unjudged == [], f"new in {cls.__name__}: what do MSA layers make of them?"


RELEASED = M3Config.from_hf(released_config())
TOWER_LORA = LoRAConfig(enable_tower_connector_lora=True)


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        ("parallel_config", "enable_dbo", True, "without --enable-dbo"),
        ("parallel_config", "ubatch_size", 2, "two micro-batches"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config", "enable_eplb", True, "--enable-eplb cannot"),
        ("attention_config", "hisparse_config", object(), "hisparse_config in"),
        ("", "lora_config", TOWER_LORA, "enable_tower_connector_lora cannot"),
        ("cache_config", "kv_cache_dtype_skip_layers", ["0", "5"], "one dtype; got 5,"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    part: str, option: str, value: object, message: str
) -> None:
    config = VllmConfig()
    config.cache_config.cache_dtype = "fp8"
    require_served(config, RELEASED)
    object.__setattr__(getattr(config, part) if part else config, option, value)
    with pytest.raises(ValueError, match=message):
        require_served(config, RELEASED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mm_encoder_only", "--mm-encoder-only cannot .* --mm-encoder-tp-mode data"),
        ("enable_mm_embeds", "--enable-mm-embeds cannot .* send image_url or video_url"),
    ],
)
def test_options_of_media_are_refused_by_name(name: str, message: str) -> None:
    config = VllmConfig()
    media = MultiModalConfig()
    object.__setattr__(config, "model_config", SimpleNamespace(multimodal_config=media))
    require_served(config, RELEASED)
    object.__setattr__(media, name, True)
    with pytest.raises(ValueError, match=message):
        require_served(config, RELEASED)


def test_what_vllm_sets_itself_for_a_decoding_engine_is_no_wish() -> None:
    config = VllmConfig()
    media = MultiModalConfig(enable_mm_embeds=True)
    media.allow_missing_mm_embeddings = True
    object.__setattr__(config, "model_config", SimpleNamespace(multimodal_config=media))
    require_served(config, RELEASED)


def test_a_filter_of_weights_must_know_where_experts_are() -> None:
    config = VllmConfig()
    parallel = config.parallel_config
    parallel.enable_expert_parallel = parallel.enable_ep_weight_filter = True
    require_served(config, RELEASED)
    parallel.expert_placement_strategy = "round_robin"
    with pytest.raises(ValueError, match="places experts of one group linearly all the same"):
        require_served(config, RELEASED)
    parallel.enable_ep_weight_filter = False
    require_served(config, RELEASED)


def test_adapters_and_drafts_are_not_served_together() -> None:
    config = VllmConfig()
    object.__setattr__(config, "lora_config", LoRAConfig())
    require_served(config, RELEASED)
    object.__setattr__(config, "speculative_config", object())
    with pytest.raises(ValueError, match="--enable-lora with --speculative-config"):
        require_served(config, RELEASED)


@pytest.mark.parametrize(
    ("targets", "layer", "names"),
    [
        (
            None,
            "3.",
            "self_attn.{q_proj,k_proj,v_proj,qkv_proj,o_proj,index_q_proj,index_k_proj,index_proj} "
            "block_sparse_moe.shared_experts.{gate_proj,up_proj,gate_up_proj,down_proj}",
        ),
        (["q_proj"], "0.", "self_attn.{q_proj,qkv_proj}"),
        (["gate_up_proj"], "0.", "mlp.{gate_proj,up_proj,gate_up_proj}"),
    ],
)
def test_adapters_go_to_projections_of_the_text_model_alone(
    targets: list[str] | None, layer: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_repairs, "leave_out_rows_without_adapter", lambda: None)
    config = VllmConfig()
    object.__setattr__(config, "lora_config", LoRAConfig(target_modules=targets))
    mapper = choose_adapted_layers(config, RELEASED, prefix="language_model.")
    assert mapper is not None
    if targets is not None:
        with pytest.raises(ValueError, match="o_proj' is left out by --lora-target-modules"):
            mapper.map_name("model.layers.3.self_attn.o_proj.lora_A.weight")
    assert config.lora_config is not None
    assert config.lora_config.target_modules is not None
    expected = {
        f"{parent}{name}"
        for group in names.split()
        for parent, inside in [group.rstrip("}").split("{")]
        for name in inside.split(",")
    }
    start = f"language_model.model.layers.{layer}"
    chosen = config.lora_config.target_modules
    assert {name.removeprefix(start) for name in chosen if name.startswith(start)} == expected
    assert all(name.startswith("language_model.model.layers.") for name in chosen)


def test_adapters_need_plain_weights_on_a_cpu() -> None:
    stored = read_quantization({"quant_method": "mxfp8", "ignored_layers": []})
    assert stored is not None
    config = VllmConfig()
    object.__setattr__(config, "lora_config", LoRAConfig())
    object.__setattr__(config, "quant_config", StoredWeights(stored))
    with pytest.raises(ValueError, match=r"--enable-lora cannot .* M3_PLUGIN_DEQUANTIZE=1"):
        choose_adapted_layers(config, RELEASED, prefix="")


def test_other_targets_of_adapters_are_refused() -> None:
    config = VllmConfig()
    object.__setattr__(config, "lora_config", LoRAConfig(target_modules=["q_proj", "experts"]))
    with pytest.raises(ValueError, match="--lora-target-modules experts"):
        choose_adapted_layers(config, RELEASED, prefix="")


def test_dense_layers_may_be_left_out_of_a_quantised_cache() -> None:
    config = VllmConfig(cache_config=CacheConfig(kv_cache_dtype_skip_layers=["0", "1", "2"]))
    config.cache_config.cache_dtype = "fp8"
    require_served(config, RELEASED)
    assert isinstance(config.parallel_config, ParallelConfig)


def test_a_recipes_choice_of_kernels_is_said_to_be_unheard(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = VllmConfig()
    object.__setattr__(config.attention_config, "minimax_m3_msa_decode_backend", "cutlass")
    with caplog.at_level(logging.WARNING):
        require_served(config, RELEASED)
    assert "M3_PLUGIN_KERNELS chooses ours" in caplog.text
