"""vLLM's resolution of command lines on GPUs that are not here, and what our worker makes of them.

    python -m tests.integrations.vllm.rehearsal FOLDER_OF_A_CONFIG_JSON

A process that is told before vLLM looks that its platform is CUDA. Extensions in C++ are
empty modules, nothing is computed. Prints a report as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from m3_kernels import tuning
from m3_plugin.attention.workspace import LayerShape, allocate_workspace
from m3_plugin.host.torchvision_ops import declare_missing_ops
from m3_plugin.model.config import M3Config, local_heads

CHIPS = {"A100": (8, 0, 80), "H100": (9, 0, 80), "B200": (10, 0, 180), "RTX PRO 6000": (12, 0, 96)}

# What README, docs and vLLM's recipe say to type, without names and parsers.
COMMANDS = {
    "tp8": "--tensor-parallel-size 8",
    "tp8 fp8": "--tensor-parallel-size 8 --kv-cache-dtype fp8 --block-size 128",
    "tp4 pp2": "--tensor-parallel-size 4 --pipeline-parallel-size 2",
    "dp8 ep": "--data-parallel-size 8 --enable-expert-parallel",
    "mtp": "--tensor-parallel-size 8 --speculative-config "
    '{"method":"mtp","num_speculative_tokens":3}',
    "capped": "--tensor-parallel-size 8 --max-model-len 131072 --max-num-seqs 64",
}


class Anything(ModuleType):
    """A module of which every name is there and nothing runs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def _answer_no_to_questions_about_kernels() -> None:
    """vLLM asks its extensions on import what they support; without them nothing."""
    namespace: Any = torch._ops._OpNamespace
    known = namespace.__getattr__

    def ask(self: Any, name: str) -> Any:
        try:
            return known(self, name)
        except AttributeError:
            if self.name == "_C" and "support" in name:
                return lambda *arguments: False
            raise

    namespace.__getattr__ = ask


@functools.cache
def become_a_gpu() -> Any:
    """Make this process's vLLM believe in eight GPUs; returns the platform, whose `chip` is set."""
    _answer_no_to_questions_about_kernels()
    for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn"):
        sys.modules[name] = Anything(name)
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    base: Any = NonNvmlCudaPlatform

    class Gpu(base):
        chip = CHIPS["H100"]

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*cls.chip[:2])

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return cls.chip[2] * 2**30

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "rehearsal"

        @classmethod
        def device_count(cls) -> int:
            return 8

        @classmethod
        def import_kernels(cls) -> None:
            return

    host: Any = vllm.platforms
    host._current_platform = Gpu()
    return Gpu


def resolved(folder: str, command: str) -> Any:
    """vLLM's configuration of a server."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    typed = ["--model", folder, "--load-format", "dummy", "--skip-tokenizer-init"]
    arguments: Any = parser.parse_args(typed + command.split())
    engine = EngineArgs.from_cli_args(arguments)
    return engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def report(config: Any, chip: tuple[int, int, int]) -> dict[str, Any]:
    """What was resolved, and the size of a worker's memory beside weights and pages."""
    from m3_vllm.backend import M3SparseBackend
    from m3_vllm.caches import cache_dtype, index_dtype
    from m3_vllm.options import require_served
    from m3_vllm.session import step_capacity

    model = M3Config.from_hf(config.model_config.hf_config.to_dict())
    assert model.msa is not None
    require_served(config, model)
    ranks = config.parallel_config.tensor_parallel_size
    capacity = step_capacity(config)
    shape = LayerShape(
        num_q_heads=local_heads(model.num_attention_heads, ranks),
        num_kv_heads=local_heads(model.num_key_value_heads, ranks),
        head_dim=model.head_dim,
        rotary_dim=model.rotary_dim,
        dtype=config.model_config.dtype,
        cache_dtype=cache_dtype(config),
        index_dtype=index_dtype(config),
    )
    with mock.patch.object(tuning, "INTERPRETER_ARCH", 10 * chip[0] + chip[1]):
        workspace = allocate_workspace(model.msa, shape, capacity, device=torch.device("meta"))
    layouts = M3SparseBackend.supported_kv_cache_layouts()
    compilation = config.compilation_config
    return {
        "compiles": str(compilation.mode),
        "graphs": str(compilation.cudagraph_mode),
        "norms_enabled": "none" not in compilation.custom_ops,
        "capacity": vars(capacity),
        "workspace_mib": workspace.num_bytes // 2**20,
        "layouts": layouts and [layout.name for layout in layouts],
        "draft": config.speculative_config and config.speculative_config.method,
    }


def main(folder: str) -> None:
    declare_missing_ops()
    gpu = become_a_gpu()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found: dict[str, Any] = {}
    for name, chip in CHIPS.items():
        gpu.chip = chip
        for command, typed in COMMANDS.items():
            if name != "H100" and command not in ("tp8", "tp4 pp2"):
                continue
            try:
                found[f"{name}: {command}"] = report(resolved(folder, typed), chip)
            except Exception as error:
                found[f"{name}: {command}"] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
