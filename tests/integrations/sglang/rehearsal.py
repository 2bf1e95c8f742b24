"""Start SGLang's command lines as far as a machine without a GPU can, on each family of GPUs.

    python -m tests.integrations.sglang.rehearsal CHECKPOINTS REPORT

SGLang's own classes resolve the arguments; the platform says what the chip would. A process of its
own, because it loads plugins and sets up SGLang's process-wide state.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

# chip -> compute capability, MiB
CHIPS = {
    "A100": ((8, 0), 81920),
    "H100": ((9, 0), 81920),
    "H200": ((9, 0), 143771),
    "B200": ((10, 0), 183359),
    "RTX PRO 6000": ((12, 0), 97887),
}


@contextmanager
def chip(name: str) -> Iterator[None]:
    """SGLang's platform as on that chip."""
    from sglang.srt import runtime_context
    from sglang.srt.utils import common

    capability, memory = CHIPS[name]
    facts = {
        "is_cuda": True,
        "is_sm90": capability[0] == 9,
        "is_sm100": capability[0] == 10,
        "is_sm120": capability[0] == 12,
        "is_hopper_with_cuda_12_3": capability[0] == 9,
        "has_flashinfer": True,
    }
    answers = {
        "is_available": True,
        "get_device_capability": capability,
        "device_count": 8,
        "get_device_name": name,
    }
    with ExitStack() as stack:
        for function, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, return_value=answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(
            mock.patch.object(common, "get_nvgpu_memory_capacity", return_value=memory)
        )
        clear(common)
        stack.callback(clear, common)
        stack.enter_context(runtime_context.override_platform(**facts))
        yield


def clear(module: Any) -> None:
    """Forget what SGLang remembers of the machine."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def resolved(argv: list[str]) -> Any:
    """SGLang's record of a command line, resolved."""
    from sglang.srt.server_args import prepare_server_args

    record = prepare_server_args(argv)
    record.resolve_once()
    return record


def facts_of(record: Any) -> dict[str, Any]:
    """What a start on these arguments would do."""
    from sglang.srt.arg_groups.overrides import resolving_view

    from m3_sglang.options import require_served

    # as the backend asks once more, of what was resolved
    require_served(record)
    view = resolving_view(record)
    names = (
        "attention_backend",
        "page_size",
        "moe_runner_backend",
        "quantization",
        "chunked_prefill_size",
        "max_prefill_tokens",
        "mem_fraction_static",
        "speculative_num_draft_tokens",
    )
    return {name: getattr(view, name) for name in names} | {
        "prefill_graph": view.cuda_graph_config.prefill.backend,
        "decode_graph": view.cuda_graph_config.decode.backend,
        "dense": {f"{kind} {cache}": dense(record, kind, cache) for kind, cache in DENSE},
        "max_rows": {requests: capacity(record, requests).max_rows for requests in (2048, 4096)},
    }


DENSE = [(kind, cache) for kind in ("target", "head") for cache in ("bfloat16", "float8_e5m2")]


def dense(record: Any, kind: str, cache: str) -> str:
    """The backend of dense layers: of the target, with 4 KV heads for 64 query heads, or of an
    EAGLE3 head, with as many of either."""
    from m3_sglang.backend import dense_backend_name

    kv_heads = 4 if kind == "target" else 64
    model = SimpleNamespace(
        num_attention_heads=64,
        get_num_kv_heads=lambda size: max(1, kv_heads // size),
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLMEagle3"]),
        has_asymmetric_kv=False,
        has_attention_sinks=False,
    )
    runner = SimpleNamespace(
        device="cuda",
        server_args=record,
        model_config=model,
        kv_cache_dtype=getattr(torch, cache),
    )
    with mock.patch("m3_sglang.backend.attention_parallel_size", return_value=8):
        return dense_backend_name(runner)


def capacity(record: Any, requests: int) -> Any:
    """What the workspace is made for, with SGLang's pool of requests at 1M tokens."""
    from m3_sglang.session import step_capacity

    table = torch.empty(requests, 2**20, dtype=torch.int32, device="meta")
    pool = SimpleNamespace(size=requests, req_to_token=table)
    return step_capacity(SimpleNamespace(server_args=record, req_to_token_pool=pool))


# name -> command line behind --model-path; the README's, and those of published recipes
COMMANDS: dict[str, list[str]] = {
    "readme": ["--tp", "8", "--attention-backend", "msa"],
    "cookbook": ["--tp", "4", "--trust-remote-code", "--mem-fraction-static", "0.65"],
    "small chunks": ["--tp", "8", "--chunked-prefill-size", "4096"],
    "eagle3": [
        *("--tp", "8", "--speculative-algorithm", "EAGLE3"),
        *("--speculative-draft-model-path", "HEAD", "--speculative-eagle-topk", "1"),
        *("--speculative-num-steps", "3", "--speculative-num-draft-tokens", "4"),
    ],
    "several tokenizers": ["--tp", "8", "--tokenizer-worker-num", "2"],
    "old data parallel attention": ["--tp", "8", "--dp-size", "2", "--enable-dp-attention"],
    "data parallel attention": ["--tp", "8", "--attn-dp-size", "2"],
    "deterministic": ["--tp", "8", "--enable-deterministic-inference"],
    "ray": ["--tp", "8", "--use-ray"],
    "full prefill graphs": ["--tp", "8", "--cuda-graph-config", '{"prefill": {"backend": "full"}}'],
    "deep_gemm by name": ["--tp", "8", "--moe-runner-backend", "deep_gemm"],
}


def rehearse(folder: Path) -> dict[str, Any]:
    """Every command on every chip, for a plain and an MXFP8 checkpoint: facts, or the error."""
    found: dict[str, Any] = {}
    for name in CHIPS:
        with chip(name):
            for stored in ("plain", "mxfp8"):
                for command, given in COMMANDS.items():
                    argv = ["--model-path", str(folder / stored), *given]
                    argv = [str(folder / "plain") if word == "HEAD" else word for word in argv]
                    try:
                        outcome: Any = facts_of(resolved(argv))
                    except (ValueError, NotImplementedError, AssertionError) as error:
                        outcome = f"{type(error).__name__}: {error}"
                    found[f"{name}, {stored}, {command}"] = outcome
    return found


def main(checkpoints: str, report: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    Path(report).write_text(json.dumps(rehearse(Path(checkpoints)), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
