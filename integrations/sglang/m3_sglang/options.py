"""Server arguments of MiniMax-M3: our defaults, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from m3_plugin.checkpoint.headers import read_checkpoint
from m3_plugin.checkpoint.names import require_mtp_modules
from m3_plugin.model.config import PAGED_BLOCK_SIZE
from m3_plugin.settings import Settings
from m3_sglang.compat import needs_triton_on_cpu, sglang_version, speculation_is_tested

BACKEND_NAME = "msa"

# server argument -> (values that are served, what to do about any other)
_SERVED: dict[str, tuple[tuple[object, ...], str]] = {
    "page_size": (
        (None, PAGED_BLOCK_SIZE),
        f"one sparse block is one cache page; leave --page-size out or give {PAGED_BLOCK_SIZE}",
    ),
    "speculative_algorithm": (
        (None, "NEXTN", "EAGLE", "EAGLE3"),
        "NEXTN drafts with the MTP module, EAGLE3 with a head of its own",
    ),
    "speculative_eagle_topk": (
        (None, 1),
        "drafts are chains; a tree's keys would have to move between slots, which SGLang's cache "
        "pool for MiniMax-M3 cannot do",
    ),
    "enable_multi_layer_eagle": (
        (False, None),
        "one MTP module is applied again for every further token",
    ),
    "pp_size": ((1,), "pipeline parallelism is not supported yet"),
    "ep_size": ((1,), "expert parallelism is not supported yet"),
    "moe_a2a_backend": ((None, "none"), "expert parallelism is not supported yet"),
    "enable_dp_attention": ((False, None), "data parallel attention is not supported yet"),
    "enable_hisparse": ((False, None), "HiSparse is not supported"),
    "enable_hierarchical_cache": ((False, None), "HiCache was never run with MSA layers"),
    "disaggregation_mode": ((None, "null"), "disaggregation was never run with MSA layers"),
    "enable_two_batch_overlap": ((False, None), "two-batch overlap is not supported"),
    "cuda_graph_backend_prefill": (
        (None, "disabled"),
        "steps of prompts stay eager",
    ),
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
    given = (
        server_args.attention_backend,
        server_args.prefill_attention_backend,
        server_args.decode_attention_backend,
    )
    if given == (None, None, None):
        overrides["attention_backend"] = BACKEND_NAME
    return overrides


def require_served(server_args: Any) -> None:
    """Refuse what the plugin cannot do truly; an argument this SGLang does not know passes.

    Raises
    ------
    ValueError : names the argument, what it may be and what it is.
    """
    on_cpu = _SERVED_ON_CPU if server_args.device == "cpu" else {}
    for name, (served, advice) in (_SERVED | on_cpu).items():
        value = getattr(server_args, name, served[0])
        if value not in served:
            wanted = " or ".join(str(choice) for choice in served)
            raise ValueError(
                f"m3-plugin: --{name.replace('_', '-')} must be {wanted} for MiniMax-M3; "
                f"got {value!r}: {advice}"
            )
    if server_args.device == "cpu" and needs_triton_on_cpu():
        require_interpreted_steps(server_args)
    if server_args.speculative_algorithm is not None:
        require_draft(server_args)


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
    ValueError : an SGLang too old, no draft checkpoint, or one for NEXTN that holds no MTP weights.
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
    if algorithm != "EAGLE3" and Path(path).is_dir():
        names = [header.name for header in read_checkpoint(Path(path))]
        require_mtp_modules(names, checkpoint=str(path))
