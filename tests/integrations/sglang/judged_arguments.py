"""A verdict on every argument of every tested SGLang: a new release may not slip one in.

What `m3_sglang.options` refuses by name stands there. All others are below; a name on no list fails
`test_arguments.py`, and belongs on one of them once somebody has read what it does.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Served, each with a test of ours.
SERVED = _names(
    """
    attention_backend attn_dp_size chunked_prefill_size context_length
    cuda_graph_backend_decode
    cuda_graph_config decode_attention_backend device disable_cuda_graph
    disable_prefill_cuda_graph disable_radix_cache disaggregation_bootstrap_port
    disaggregation_decode_enable_radix_cache disaggregation_decode_retraction_backup
    disaggregation_enable_kv_checksum dp_size dtype enable_dp_attention enable_lora
    enable_hierarchical_cache enable_memory_saver ep_size hicache_ratio
    hicache_storage_backend_extra_config hicache_storage_prefetch_policy
    enable_metrics lora_paths lora_target_modules max_lora_rank max_loras_per_batch
    enable_mixed_chunk enable_weights_cpu_backup json_model_override_args load_format
    max_prefill_tokens max_running_requests max_total_tokens mem_fraction_static
    mm_enable_dp_encoder mm_process_config model_path moe_runner_backend
    pp_size prefill_attention_backend quantization random_seed reasoning_parser
    speculative_attention_mode
    speculative_draft_attention_backend
    speculative_draft_model_path speculative_num_draft_tokens speculative_num_steps
    tokenizer_worker_num tool_call_parser tp_size trust_remote_code
    """
)

# Details of what is refused by another name, or of other models: nothing of ours reads them.
WITHOUT_EFFECT = _names(
    """
    _swa_full_tokens_ratio_explicitly_set asr_max_buffer_seconds asr_max_concurrent_sessions
    boundary_reduction c128_page_size cp_strategy cuda_graph_bs_prefill
    cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context
    dcp_comm_backend dcp_replicate_q_proj decoupled_spec_bind_endpoint
    decoupled_spec_connect_endpoints decoupled_spec_rank deepep_config
    deepep_dispatcher_output_dtype deepep_mode deepep_v2_mode
    disable_aiter_allreduce_fusion_in_decode disable_aiter_allreduce_fusion_in_prefill
    disable_attn_tp_gather disable_chunked_prefix_cache
    disable_flashinfer_cutlass_moe_fp4_allgather disable_hybrid_swa_memory
    disable_shared_experts_fusion disaggregation_decode_extra_slots
    disaggregation_decode_polling_interval disaggregation_ib_device
    dllm_algorithm_config dllm_fdfo dsa_decode_backend dsa_paged_mqa_logits_backend
    dsa_prefill_backend dsa_topk_backend dsa_triton_union dsv4_attn_backend dsv4_prefill_backend
    elastic_ep_initial_size elastic_ep_scale_timeout enable_adaptive_dispatch_to_encoder
    enable_aiter_allreduce_fusion enable_decoder_swa_bounded_replay
    enable_deepseek_v4_fp4_indexer enable_dp_attention_local_control_broadcast
    enable_dsa_cache_layer_split enable_dsa_fused_indexer enable_dynamic_chunking
    enable_encoder_swa_bounded_replay enable_fused_qk_norm_rope enable_int8_mamba_checkpoint
    enable_lean_attention enable_linear_replayssm enable_linear_replayssm_spec
    enable_linker_mla_dedup enable_mamba_cache_stochastic_rounding
    enable_megamoe_for_layernorm_sp enable_precise_embedding_interpolation
    enable_scattered_sconv enable_torch_compile_debug_mode enable_tp_lm_head_all_to_all
    enable_w4a4_mxfp4_megamoe enable_waterfill encoder_bootstrap_port encoder_register_urls
    encoder_transfer_backend encoder_urls enforce_shared_experts_fusion ep_dispatch_algorithm
    ep_join_mode ep_join_rank_offset eplb_algorithm eplb_min_rebalancing_utilization_threshold
    eplb_rebalance_layers_per_chunk eplb_rebalance_num_iterations
    expert_balancedness_report_mode expert_distribution_recorder_buffer_size
    expert_distribution_recorder_mode flashinfer_a2a_dispatch_type
    flashinfer_mla_disable_ragged flashinfer_mxfp4_moe_precision flexkv_config_file fuseep_mode
    gated_launch_port hisparse_config init_expert_location int8_mamba_ckpt_size kt_cpuinfer
    kt_max_deferred_experts_per_token kt_method kt_num_gpu_experts kt_threadpool_count
    language_model_only linear_attn_backend linear_attn_decode_backend
    linear_attn_prefill_backend linear_attn_verify_backend linear_replayssm_cache_len
    lmcache_config_file lora_drain_wait_threshold lora_eviction_policy
    lora_strict_loading mamba_backend
    mamba_cache_philox_rounds mamba_full_memory_ratio mamba_max_states_per_path
    mamba_radix_cache_strategy mamba_ssm_dtype mamba_track_interval max_ep_size max_loaded_loras
    max_lora_chunk_size max_mamba_cache_size
    mlx_enable_sampling mooncake_ib_device num_reserved_decode_tokens offload_mode
    offload_num_in_group offload_prefetch_step optimistic_prefill_attempts
    paged_experts_num_resident pdmux_config_path ple_offload_backend ple_offload_dir
    ple_offload_embedding pp_async_batch_depth pp_max_micro_batch_size
    prefill_kv_cache_dequant_dtype qsa_indexer_dtype sm_group_num speculative_adaptive_config
    speculative_boundary_reduction speculative_dflash_block_size
    speculative_domino_candidate_pool_size speculative_dsa_topk_backend
    speculative_dspark_align_verify_tokens_to_graph_tier speculative_dspark_block_size
    speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path
    speculative_enable_w4a4_mxfp4_megamoe speculative_ngram_capacity
    speculative_ngram_external_corpus_max_tokens speculative_ngram_external_corpus_path
    speculative_ngram_external_sam_budget speculative_ngram_match_type
    speculative_ngram_max_bfs_breadth speculative_ngram_max_trie_depth
    speculative_ngram_min_bfs_breadth speculative_skip_dp_mlp_sync swa_full_tokens_ratio
    swa_prefix_tails tbo_token_distribution_threshold torch_compile_max_bs
    triton_attention_num_kv_splits triton_attention_reduce_in_fp32
    triton_attention_split_tile_size unified_cache_external_linker_backend
    unified_cache_external_linker_config uses_mamba_radix_cache
    """
)

# SGLang's own affair around the layers: front end, loading, scheduling, collectives, logs.
HOSTS_OWN = _names(
    """
    _radix_eviction_policy_explicitly_set _speculative_draft_quantization_explicitly_set
    abort_on_priority_when_disabled admin_api_key allow_auto_truncate allowed_media_domains
    api_key aux_hidden_state_capture base_gpu_id batch_notify_size bf16_gemm_backend
    bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token
    chat_template checkpoint_engine_wait_weights_before_ready completion_template
    constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt
    constrained_json_whitespace_pattern crash_dump_folder cuda_graph_bs_decode
    cuda_graph_max_bs_decode custom_sigquit_handler custom_weight_loader
    debug_tensor_dump_input_file debug_tensor_dump_layers debug_tensor_dump_output_folder
    decode_log_interval decrypted_config_file decrypted_draft_config_file
    default_chat_template_kwargs default_priority_value delete_ckpt_after_loading
    detokenizer_worker_num disable_cuda_graph_padding disable_custom_all_reduce
    disable_decode_cuda_graph disable_fast_image_processor disable_flashinfer_autotune
    disable_outlines_disk_cache disable_overlap_schedule disable_priority_preemption
    disable_tokenizer_batch_decode dist_init_addr dist_timeout download_dir
    dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
    enable_broadcast_mm_inputs_process enable_cache_report enable_cudagraph_gc
    enable_custom_logit_processor enable_draft_weights_cpu_backup enable_dynamic_batch_tokenizer
    enable_flashinfer_allreduce_fusion enable_forward_pass_metrics enable_fp32_lm_head
    enable_http2 enable_http_worker_reuseport enable_layerwise_nvtx_marker
    enable_metrics_for_all_schedulers enable_mfu_metrics enable_mm_global_cache enable_mscclpp
    enable_multimodal enable_nccl_nvls enable_p2p_check enable_prefill_delayer
    enable_prefix_mm_cache enable_priority_scheduling enable_profile_cuda_graph
    enable_quant_communications enable_request_time_stats_logging enable_response_store
    enable_return_aux_hidden_states enable_return_hidden_states enable_return_routed_experts
    enable_session_radix_cache enable_ssl_refresh enable_streaming_session
    enable_strict_thinking enable_symm_mem enable_tf32_matmul enable_tokenizer_batch_encode
    enable_torch_symm_mem enable_trace enable_watermark
    enforce_disable_flashinfer_allreduce_fusion engine_info_bootstrap_port
    export_metrics_to_file export_metrics_to_file_dir extra_metric_labels fastapi_root_path
    file_storage_path flashinfer_allreduce_fusion_backend flashinfer_autotune_skip_ops
    forward_hooks forward_pass_metrics_ipc_name forward_pass_metrics_worker_id
    fp4_gemm_runner_backend fp8_gemm_runner_backend gc_threshold gc_warning_threshold_secs
    generation_tokens_buckets gpu_id_step grammar_backend grpc_mode grpc_port
    grpc_response_timeout_secs grpc_worker_threads hf_chat_template_name
    hicache_host_memory_fraction hicache_io_backend hicache_mem_layout hicache_size
    hicache_storage_prefetch_retry_max_attempts hicache_storage_prefetch_retry_poll_interval
    hicache_write_policy host
    http2_initial_connection_window_size http2_max_concurrent_streams image_processor_backend
    incremental_streaming_output kv_canary kv_canary_real_data kv_canary_sweep_interval
    kv_events_config limit_mm_data_per_request load_balance_method load_publish_endpoint
    load_snapshot_publish_interval log_level log_level_http log_requests log_requests_format
    log_requests_level log_requests_target max_queued_requests media_url_max_file_size_mb
    min_free_slots_delay mm_attention_backend mm_feature_transport mm_global_cache_backend
    mm_io_worker_num mm_preprocess_cache_size_mb mm_processor_worker_num model_checksum
    model_config_parser model_impl model_loader_extra_config modelexpress_config
    modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path
    modelopt_quant msprobe_dump_config nccl_port nnodes node_rank num_continuous_decode_steps
    numa_node otlp_service_name otlp_traces_endpoint port pre_warm_nccl
    preferred_sampling_params prefill_decode_interval prefill_decode_interval_min_bs
    prefill_delayer_forward_passes_buckets prefill_delayer_max_delay_ms
    prefill_delayer_max_delay_passes prefill_delayer_queue_min_ratio
    prefill_delayer_token_usage_low_watermark prefill_delayer_wait_seconds_buckets
    prefill_max_requests priority_scheduling_preemption_threshold prompt_tokens_buckets
    quantization_param_path quantize_and_serve radix_cache_backend radix_eviction_policy
    radix_eviction_policy_config remote_instance_weight_loader_backend
    remote_instance_weight_loader_seed_instance_ip
    remote_instance_weight_loader_seed_instance_service_port
    remote_instance_weight_loader_send_weights_group_ports
    remote_instance_weight_loader_start_seed_via_transfer_engine retraction_policy
    return_aux_hidden_state_layer_ids return_hidden_states_mode return_input_ids
    return_output_ids revision rl_quant_profile sampling_backend sampling_defaults
    sampling_mask_max_tokens schedule_conservativeness schedule_low_priority_values_first
    schedule_policy scheduler_recv_interval served_model_name show_time_cost sidecar
    sidecar_args skip_server_warmup skip_tokenizer_init sleep_on_idle smg_grpc_mode
    smg_http_sidecar_port soft_watchdog_timeout spec_trace_dir speculative_accept_threshold_acc
    speculative_accept_threshold_single speculative_draft_kv_cache_dtype
    speculative_draft_load_format speculative_draft_model_quantization
    speculative_draft_model_revision speculative_moe_runner_backend
    speculative_use_block_verification speculative_use_rejection_sampling ssl_ca_certs
    ssl_certfile ssl_keyfile ssl_keyfile_password startup_weight_load_mode stat_loggers
    stream_interval stream_response_default_include_usage strip_thinking_cache tokenizer_backend
    tokenizer_metrics_allowed_custom_labels tokenizer_metrics_custom_labels_header
    tokenizer_mode tokenizer_path tool_server trace_modules trust_mm_content_hashes
    trust_request_chat_template uvicorn_access_log_exclude_prefixes warmups watchdog_timeout
    watermark_config watermark_context_window watermark_default_enabled watermark_enforce_all
    watermark_key watermark_key_b watermark_max_probability watermark_mixing_probability
    weight_cache_mode weight_cache_socket weight_cache_timeout weight_loader_disable_mmap
    weight_loader_drop_cache_after_load weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_version
    """
)
