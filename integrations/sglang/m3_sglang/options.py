"""Server arguments of MiniMax-M3: our defaults, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from m3_plugin.checkpoint.adapters import wanted_projections
from m3_plugin.checkpoint.headers import read_checkpoint
from m3_plugin.checkpoint.names import require_mtp_modules
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_plugin.model.released import read_config
from m3_plugin.model.taking import draft_refusal, is_dspark
from m3_plugin.settings import Settings
from m3_sglang.compat import (
    adapters_are_tested,
    copy_layer_by_layer,
    fleets_are_tested,
    keep_no_retracted_requests,
    leave_prefill_graphs_out,
    needs_triton_on_cpu,
    resolved,
    run_adapters_in_torch,
    sglang_version,
    speculation_is_tested,
)
from m3_sglang.ours import FUSED_LAYERS

BACKEND_NAME = "msa"

_OFF = (False, None)
# Ways to spread a model and its caches over ranks and servers, with the values that leave them out.
_RUN_ALONE: dict[str, tuple[object, ...]] = {
    "disaggregation_mode": ("null", None),
    "pp_size": (1, None),
    "ep_size": (1, None),
    "attn_dp_size": (1, None),
    "enable_hierarchical_cache": _OFF,
}
_ROLES_OF_SERVERS = ("prefill", "decode")
_ONE = (1, None)
_REPLICAS = "experts are not replicated within a server; --dp-size replicates all of it"
_CONTEXT_PARALLEL = "context parallelism is not supported with MSA layers"
_EXPERTS = "experts stay on the ranks of --ep-size that they are loaded on; leave it out"
_EXPERT_ADAPTERS = "adapters of routed experts are not taken; merge them into the weights"
_POOL = "MSA layers need SGLang's cache pool for MiniMax-M3, one buffer per layer"
_ROLES = "a server keeps the role it was started with; start one server for each"
_HOST_COPIES = "it copies caches by kernels for a GPU, and was never run with MSA layers"
_OFFLOAD = "MSA layers were never run with it"
_PREFILL_GRAPHS = "steps of prompts stay eager"
_ELSEWHERE = "it is another model's"

# server argument -> (values that are served, what to do about any other). Every argument of every
# tested SGLang is judged in tests/integrations/sglang/judged_arguments.py.
_SERVED: dict[str, tuple[tuple[object, ...], str]] = {
    "page_size": (
        (None, PAGED_BLOCK_SIZE),
        f"one sparse block is one cache page; leave --page-size out or give {PAGED_BLOCK_SIZE}",
    ),
    "speculative_algorithm": (
        (None, "NEXTN", "EAGLE", "EAGLE3"),
        "NEXTN drafts with the MTP module, EAGLE3 with a head of its own; DSpark and DFlash drafts "
        "are not served",
    ),
    "speculative_eagle_topk": (
        (None, 1),
        "drafts are chains; a tree's keys would have to move between slots, which SGLang's cache "
        "pool for MiniMax-M3 cannot do",
    ),
    "enable_multi_layer_eagle": (_OFF, "one MTP module is applied again for every further token"),
    "speculative_adaptive": (_OFF, "the number of drafted tokens is settled when a server starts"),
    "speculative_token_map": ((None,), "the draft has the target's whole vocabulary"),
    "speculative_draft_window_size": ((None,), "the draft attends as the target does"),
    "speculative_draft_sink_size": ((None,), "the draft attends as the target does"),
    "speculative_moe_a2a_backend": ((None, "none"), _EXPERTS),
    "decoupled_spec_role": ((None, "null"), "target and draft run in one worker"),
    "moe_a2a_backend": (
        (None, "none"),
        "ranks of --ep-size sum up what their experts answer; leave it out",
    ),
    "enable_eplb": (_OFF, _EXPERTS),
    "ep_num_redundant_experts": ((0, None), _EXPERTS),
    "elastic_ep_backend": ((None, "none"), _EXPERTS),
    "enable_elastic_expert_backup": (_OFF, _EXPERTS),
    "enable_paged_experts": (_OFF, _EXPERTS),
    "kt_weight_path": ((None,), _EXPERTS),
    "enable_dp_lm_head": (_OFF, "the head is cut over all ranks"),
    "moe_dp_size": (_ONE, _REPLICAS),
    "dwdp_size": (_ONE, _REPLICAS),
    "attn_cp_size": (_ONE, _CONTEXT_PARALLEL),
    "dcp_size": (_ONE, _CONTEXT_PARALLEL),
    "enable_prefill_cp": (_OFF, _CONTEXT_PARALLEL),
    "enable_cp_decode_attn_tp": (_OFF, _CONTEXT_PARALLEL),
    "enable_cp_tp_group_sharing": (_OFF, _CONTEXT_PARALLEL),
    "enable_kv_cache_sharding": (_OFF, "each rank keeps the index keys of its own KV heads"),
    "enable_attn_tp_input_scattered": (_OFF, "attention reads whole rows on every rank"),
    "enable_layernorm_sp": (_OFF, "norms read whole rows on every rank"),
    "shared_experts_tp_size": ((None,), "shared experts are cut like routed ones"),
    "enable_shared_experts_attn_tp": (_OFF, "shared experts are cut like routed ones"),
    "enable_dense_mlp_attn_tp": (_OFF, "dense layers are cut over all ranks"),
    "moe_dense_tp_size": ((None,), "dense layers are cut over all ranks"),
    "enable_pdmux": (_OFF, "prompts and decoding share one workspace and one stream"),
    "enable_two_batch_overlap": (_OFF, "two-batch overlap is not supported"),
    "enable_single_batch_overlap": (_OFF, "single-batch overlap is not supported"),
    "enable_hisparse": (_OFF, "HiSparse is not supported"),
    "hicache_storage_backend": (
        (None, "file"),
        "file keeps index keys beside K and V and puts whole pages in place; the others were never "
        "run with MSA layers",
    ),
    "hicache_host_memory_mode": (
        ("cache", None),
        "main memory as a mere way to the store was never run with MSA layers",
    ),
    "enable_lmcache": (_OFF, _POOL),
    "enable_flexkv": (_OFF, _POOL),
    "enable_unified_memory": (_OFF, _POOL),
    "enable_unified_cache_external_linker": (_OFF, _POOL),
    "enable_page_major_kv_layout": (_OFF, _POOL),
    "prefill_only_disable_kv_cache": (_OFF, "MSA layers read keys from the cache alone"),
    "disaggregation_mode": ((None, "null", "prefill", "decode"), "there is no other"),
    "disaggregation_transfer_backend": (
        ("mooncake", "mooncake_tcp", "nixl", "mori"),
        "the others do not move index keys of MSA layers",
    ),
    "disaggregation_decode_allocation_policy": ((None, "early"), "the other was never run"),
    "disaggregation_decode_host_receive_threshold": ((1, None), _HOST_COPIES),
    "disaggregation_decode_enable_offload_kvcache": (_OFF, _POOL),
    "enable_pd_role_switch": (_OFF, _ROLES),
    "encoder_only": (_OFF, "the vision tower runs beside the text model"),
    "language_only": (_OFF, "the vision tower runs beside the text model"),
    "uno_lora_path": ((None,), "it drafts with an adapter of another model"),
    "lora_backend": (
        ("csgmv", "triton", "torch_native"),
        "index projections hold two parts, which the others were not read for",
    ),
    "enable_lora_overlap_loading": (_OFF, "adapters were never loaded beside a running step"),
    "experts_shared_outer_loras": (_OFF, _EXPERT_ADAPTERS),
    "lora_use_virtual_experts": (_OFF, _EXPERT_ADAPTERS),
    "is_embedding": (_OFF, "the model generates; it has no pooled output"),
    "enable_deterministic_inference": (
        _OFF,
        "MSA layers give the same bits in every batch, but SGLang does not take their backend",
    ),
    "rl_on_policy_target": ((None,), "it needs deterministic inference"),
    "enable_torch_compile": (_OFF, "our layers were never compiled"),
    "debug_cuda_graph": (_OFF, "it needs breakable graphs"),
    "cpu_offload_gb": ((0, None), _OFFLOAD),
    "offload_group_size": ((-1, 0, None), _OFFLOAD),
    "enable_fused_moe_sum_all_reduce": (
        _OFF,
        "the routed and the shared experts are summed over ranks in one step",
    ),
    "enable_mis": (_OFF, "an MSA layer's rows see a prefix each"),
    "enable_return_indexer_topk": (_OFF, "M3_PLUGIN_RECORD_BLOCKS writes them to files"),
    "dllm_algorithm": ((None,), _ELSEWHERE),
    "enable_amd_monokernel": (_OFF, _ELSEWHERE),
    "enable_nvidia_megakernel": (_OFF, _ELSEWHERE),
    "use_ray": (_OFF, "Ray's scheduler processes load no plugins"),
    "cuda_graph_backend_prefill": ((None, "disabled"), _PREFILL_GRAPHS),
    "kv_cache_dtype": (
        ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
        "the kernels read K and V in the model's dtype, bf16 or fp8",
    ),
}
# What only kernels on a GPU read, said before SGLang has allocated such a cache.
_SERVED_ON_CPU: dict[str, tuple[tuple[object, ...], str]] = {
    "kv_cache_dtype": (
        ("auto", "bf16", "bfloat16"),
        "the kernels of a CPU read K and V in the model's dtype or bf16",
    ),
    "enable_memory_saver": (
        _OFF,
        "memory is given back by a library for GPUs; /release_memory_occupation answers without, "
        "and keeps what is there",
    ),
}


def m3_defaults(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Override provider of SGLang: values for what the user left open.

    Raises
    ------
    ValueError : an argument asks for what is not served, or an `M3_PLUGIN_` variable is misspelt;
        names argument, rule and value.
    """
    # only here is it known that M3 is served
    Settings.from_environment()
    require_served(server_args)
    overrides: dict[str, Any] = {"page_size": PAGED_BLOCK_SIZE}
    leave_prefill_graphs_out(server_args)
    given = (
        server_args.attention_backend,
        server_args.prefill_attention_backend,
        server_args.decode_attention_backend,
    )
    if given == (None, None, None):
        overrides["attention_backend"] = BACKEND_NAME
    if server_args.device == "cpu" and wants_adapters(server_args):
        run_adapters_in_torch(server_args)
    if server_args.device == "cpu" and getattr(server_args, "enable_hierarchical_cache", False):
        copy_layer_by_layer(server_args)
    if getattr(server_args, "disaggregation_mode", None) == "decode":
        keep_no_retracted_requests(server_args)
    return overrides


def require_served(server_args: Any) -> None:
    """Refuse what the plugin cannot do truly; an argument this SGLang does not know passes.

    What SGLang made of the operator's options is read, so that an option's old name counts as well.

    Raises
    ------
    ValueError : names the argument, what it may be and what it is.
    """
    found = resolved(server_args)
    on_cpu = _SERVED_ON_CPU if found.device == "cpu" else {}
    for name, (served, advice) in (_SERVED | on_cpu).items():
        _require(name, getattr(found, name, served[0]), served, advice)
    _require_prefill_graphs(server_args)
    _require_kept_weights(found)
    if wants_adapters(found):
        require_adapters(found)
    require_known_company(found)
    groups = getattr(found, "attn_dp_size", None) or 1
    if groups > 1:
        ranks = getattr(found, "tp_size", groups)
        _require("attn_dp_size", groups, (1, ranks), "groups of several ranks were never run")
    if getattr(found, "disaggregation_mode", None) in _ROLES_OF_SERVERS:
        require_transfers(found)
    if server_args.device == "cpu" and needs_triton_on_cpu():
        require_interpreted_steps(server_args)
    if server_args.speculative_algorithm is not None:
        require_draft(server_args)


def require_store(name: str) -> None:
    """Refuse a store of HiCache that was never run, which may also come while a server runs.

    Raises
    ------
    ValueError : names the argument, what it may be and what it is.
    """
    _require("hicache_storage_backend", name, *_SERVED["hicache_storage_backend"])


def _require(name: str, value: object, served: tuple[object, ...], advice: str) -> None:
    if value not in served:
        wanted = " or ".join(str(choice) for choice in served)
        raise ValueError(
            f"m3-plugin: --{name.replace('_', '-')} must be {wanted} for MiniMax-M3; "
            f"got {value!r}: {advice}"
        )


def _require_prefill_graphs(server_args: Any) -> None:
    """Refuse a graph of prompts that was asked for in the option which describes all graphs."""
    given = getattr(server_args, "cuda_graph_config", None)
    prefill = given.get("prefill") if isinstance(given, dict) else getattr(given, "prefill", None)
    backend = prefill.get("backend") if isinstance(prefill, dict) else None
    if backend is not None:
        _require("cuda_graph_config prefill.backend", backend, ("disabled",), _PREFILL_GRAPHS)


def _require_kept_weights(found: Any) -> None:
    """Refuse to give the weights' memory back without a copy: no update sends all it holds."""
    if getattr(found, "enable_memory_saver", False):
        kept = getattr(found, "enable_weights_cpu_backup", False)
        advice = "beside --enable-memory-saver; rotation angles and cache scales are in no update"
        _require("enable_weights_cpu_backup", kept, (True,), advice)


def wants_adapters(server_args: Any) -> bool:
    """Whether adapters are asked for: `--lora-paths` alone does so, too."""
    enabled = getattr(server_args, "enable_lora", None)
    paths = getattr(server_args, "lora_paths", None)
    return bool(enabled or (enabled is None and paths))


def require_adapters(found: Any) -> None:
    """Refuse `--enable-lora` where it was never run, and layers that take no adapters.

    Raises
    ------
    ValueError : an SGLang too old, speculation or shared scans beside it, kernels for a GPU on a
        CPU, or `--lora-target-modules` of other layers.
    """
    if not adapters_are_tested():
        raise ValueError(
            f"m3-plugin: --enable-lora needs SGLang 0.5.23; got {sglang_version()}: install that, "
            "or merge the adapter into the weights"
        )
    if found.speculative_algorithm is not None:
        raise ValueError(
            f"m3-plugin: --enable-lora beside --speculative-algorithm {found.speculative_algorithm}"
            ": adapters were never run with drafts; leave one of them out"
        )
    if (sharing := Settings.from_environment().index_sharing) != "off":
        raise ValueError(
            f"m3-plugin: --enable-lora beside M3_PLUGIN_INDEX_SHARING={sharing}: adapters of index "
            "projections were never run where ranks share scans; leave one of them out"
        )
    backend = getattr(found, "lora_backend", None)
    if found.device == "cpu" and backend == "triton":
        raise ValueError(
            "m3-plugin: --lora-backend must be torch_native on a CPU; got 'triton', whose kernels "
            "are for a GPU; leave it out"
        )
    wanted_projections(getattr(found, "lora_target_modules", None), fused=FUSED_LAYERS)


def require_known_company(found: Any) -> None:
    """Refuse what was run alone beside anything else of its kind, drafts or adapters.

    Raises
    ------
    ValueError : an SGLang too old, or two options that nobody has run together.
    """
    given = {name: getattr(found, name, usual[0]) for name, usual in _RUN_ALONE.items()}
    alone = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in given.items()
        if value not in _RUN_ALONE[name]
    ]
    if not alone:
        return
    if not fleets_are_tested():
        raise ValueError(f"m3-plugin: {alone[0]} needs SGLang 0.5.23; got {sglang_version()}")
    others = []
    if found.speculative_algorithm is not None:
        others.append(f"--speculative-algorithm {found.speculative_algorithm}")
    if wants_adapters(found):
        others.append("--enable-lora")
    if getattr(found, "mm_enable_dp_encoder", False):
        others.append("--mm-enable-dp-encoder")
    together = alone + others
    if len(together) > 1:
        raise ValueError(
            f"m3-plugin: {together[0]} beside {together[1]}: they were never run together; leave "
            "one of them out"
        )


def require_transfers(found: Any) -> None:
    """Refuse a server of prompts or of decoding whose caches would not move, or not come back.

    Raises
    ------
    ValueError : a transfer, a check or a backup of caches that needs a GPU on a CPU; a backup of
        retracted requests that SGLang's pool cannot make.
    """
    if found.disaggregation_mode == "decode":
        _require(
            "disaggregation_decode_retraction_backup",
            getattr(found, "disaggregation_decode_retraction_backup", None),
            (None, "none"),
            "SGLang's cache pool for MiniMax-M3 copies no request; a retracted one is answered "
            "503, to be asked again",
        )
    if found.device == "cpu":
        backend = found.disaggregation_transfer_backend
        advice = "the others move memory of GPUs, or were never run"
        _require("disaggregation_transfer_backend", backend, ("nixl",), advice)
        checksum = getattr(found, "disaggregation_enable_kv_checksum", False)
        advice = "SGLang computes it on a GPU; M3_PLUGIN_VERIFY_TRANSFER looks at every row"
        _require("disaggregation_enable_kv_checksum", checksum, (False,), advice)


def require_interpreted_steps(server_args: Any) -> None:
    """Refuse a start on a CPU which an older SGLang would end itself, far from the cause.

    Raises
    ------
    ValueError : Triton is not in interpreter mode, or graphs would be captured.
    """
    host = f"m3-plugin: SGLang {sglang_version()} on a CPU needs"
    mode = os.environ.get("TRITON_INTERPRET")
    if mode != "1":
        raise ValueError(
            f"{host} TRITON_INTERPRET=1; got {mode!r}: its cache allocator launches Triton "
            "kernels; set it, or install SGLang 0.5.22 or later"
        )
    if not server_args.disable_cuda_graph:
        raise ValueError(
            f"{host} --disable-cuda-graph: it would capture graphs; give it, or install SGLang "
            "0.5.22 or later"
        )


def require_draft(server_args: Any) -> None:
    """Refuse speculation without what it needs.

    Raises
    ------
    ValueError : an SGLang too old, no draft checkpoint, M3.1's DSpark draft, or a checkpoint for
        NEXTN that holds no MTP weights.
    """
    algorithm, path = server_args.speculative_algorithm, server_args.speculative_draft_model_path
    if not speculation_is_tested():
        raise ValueError(
            f"m3-plugin: --speculative-algorithm {algorithm} needs SGLang 0.5.23; "
            f"got {sglang_version()}"
        )
    if path is None:
        what = "a head trained for MiniMax-M3"
        if algorithm != "EAGLE3":
            what = f"MTP weights, perhaps of the target's own checkpoint {server_args.model_path}"
        raise ValueError(
            f"m3-plugin: --speculative-algorithm {algorithm} needs --speculative-draft-model-path: "
            f"{what}"
        )
    if server_args.device == "cpu" and not server_args.disable_cuda_graph:
        raise ValueError(
            f"m3-plugin: --speculative-algorithm {algorithm} on a CPU needs --disable-cuda-graph: "
            "SGLang's draft worker would capture graphs otherwise"
        )
    # elsewhere than on this disk, the loading itself finds out
    config = Path(path) / "config.json"
    if config.is_file() and is_dspark(read_config(config)):
        raise draft_refusal(
            f"--speculative-draft-model-path {path}",
            instead="leave the --speculative options out, or draft with an EAGLE3 head",
        )
    if algorithm != "EAGLE3" and Path(path).is_dir():
        names = [header.name for header in read_checkpoint(Path(path))]
        require_mtp_modules(names, checkpoint=str(path))
