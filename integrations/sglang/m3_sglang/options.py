"""Server arguments of MiniMax-M3: our defaults, and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from m3_plugin.config import PAGED_BLOCK_SIZE

BACKEND_NAME = "msa"

# server argument -> (values that are served, what to do about any other)
_SERVED: dict[str, tuple[tuple[object, ...], str]] = {
    "page_size": (
        (None, PAGED_BLOCK_SIZE),
        f"one sparse block is one cache page; leave --page-size out or give {PAGED_BLOCK_SIZE}",
    ),
    "speculative_algorithm": ((None,), "speculative decoding is not supported yet"),
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
        ("auto", "bf16", "bfloat16"),
        "the kernels read K, V and index keys in the model's dtype or bf16",
    ),
}


def m3_defaults(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Override provider of SGLang: values for what the user left open.

    Raises
    ------
    ValueError : an argument asks for what is not served; names argument, rule and value.
    """
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
    for name, (served, advice) in _SERVED.items():
        value = getattr(server_args, name, served[0])
        if value not in served:
            wanted = " or ".join(str(choice) for choice in served)
            raise ValueError(
                f"m3-plugin: --{name.replace('_', '-')} must be {wanted} for MiniMax-M3; "
                f"got {value!r}: {advice}"
            )
