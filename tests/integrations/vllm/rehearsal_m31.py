"""Build M3.1 by vLLM's command lines as on each family of GPUs, and load its published tensors.

    python -m tests.integrations.vllm.rehearsal_m31 OPTIONS FOLDER_OF_A_CONFIG_JSON OF_FEWER_LAYERS

As `building`: a process of its own, on the meta device, in which vLLM's own classes choose methods
and kernels. FlashInfer and Humming are taken for installed, as vLLM's packages for GPUs ask for
them; no kernel is called. OPTIONS is what is typed behind the model's name. Prints a report as
JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from m3_plugin.checkpoint.names import TEXT_PREFIX, tensor_shape, text_modules
from m3_plugin.model.config import M3Config
from tests.integrations.vllm import building
from tests.integrations.vllm.rehearsal import CHIPS
from tests.integrations.vllm.test_fit_commands import arguments_module

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
}
# vLLM's kernels for FP4 and MXFP8 -> how each asks whether its library is there.
LIBRARIES = {
    "kernels.linear.mxfp8.flashinfer": ("has_flashinfer", "has_flashinfer_cutedsl"),
    "kernels.linear.mxfp8.humming": ("has_humming",),
    "layers.fused_moe.experts.fused_humming_moe": ("has_humming",),
    "layers.fused_moe.experts.trtllm_nvfp4_moe": ("has_flashinfer_trtllm_fused_moe",),
    "layers.fused_moe.experts.flashinfer_cutedsl_moe": ("has_flashinfer_cutedsl_moe_nvfp4",),
    "layers.fused_moe.experts.flashinfer_cutlass_moe": ("has_flashinfer_cutlass_fused_moe",),
}
FP8_CACHE = " --kv-cache-dtype fp8"
ONE_RANK = " --tensor-parallel-size 1"
WISHES = " --moe-backend humming --linear-backend humming"


def resolved(folder: str, options: str) -> Any:
    """vLLM's configuration of a server, by the parser of its command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = arguments_module().make_arg_parser(FlexibleArgumentParser())
    unread = ["--load-format", "dummy", "--skip-tokenizer-init"]
    arguments = parser.parse_args(["--model", folder, *options.split(), *unread])
    # which is built around a tokenizer
    arguments.reasoning_parser = parser.get_default("reasoning_parser")
    engine = EngineArgs.from_cli_args(arguments)
    return engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def install_libraries() -> None:
    """Let vLLM's kernels find the optional libraries that its packages for GPUs ask for."""
    for module, names in LIBRARIES.items():
        host = importlib.import_module(f"vllm.model_executor.{module}")
        for name in names:
            assert hasattr(host, name), f"{module} does not ask {name}"
            setattr(host, name, lambda: True)
    humming: Any = importlib.import_module("vllm.utils.humming")
    kinds = ("indexed", "grouped_contiguous", "grouped_masked")
    humming.GemmType = Enum("GemmType", {kind.upper(): kind for kind in kinds})


def published_tensors(config: M3Config) -> Iterator[tuple[str, Tensor]]:
    """What the files hold of the text model: every tensor in its shape and dtype.

    Only scales of whole weights have values, of which the loader asks that they be positive.
    """
    quantization = config.quantization
    assert quantization is not None
    for module in sorted(text_modules(config)):
        weight = quantization.format_of(module)
        shape = tensor_shape(config, module)
        if weight.name == "plain":
            # the router and its bias are stored in 32 bits
            wide = ".block_sparse_moe.gate" in module or module.endswith("_bias")
            name = module if module.endswith("_bias") else f"{module}.weight"
            dtype = torch.float32 if wide else torch.bfloat16
            yield TEXT_PREFIX + name, torch.empty(shape, dtype=dtype, device="meta")
            continue
        for suffix, part in weight.parts(*shape).items():
            name, dtype = f"{TEXT_PREFIX}{module}.{suffix}", DTYPES[part.dtypes[0]]
            if suffix.endswith("global_scale"):
                yield name, torch.ones(1, dtype=dtype)
            else:
                yield name, torch.empty(part.shapes[0], dtype=dtype, device="meta")


def methods(config: Any, model: Any) -> dict[str, list[str | None]]:
    """Layer -> vLLM's method for it, and the kernel that the method chose."""
    found = {}
    for name, module in model.language_model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or name == "clamp_probe":
            continue
        kernel = getattr(method, "experts_cls", None) or type(getattr(method, "kernel", None))
        chosen = None if kernel is type(None) else kernel.__name__
        found[name] = [type(method).__name__, chosen]
    return found


def parameters(config: Any, model: Any) -> dict[str, list[Any]]:
    """Name -> shape and dtype."""
    return {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in model.language_model.named_parameters()
    }


def arithmetic(config: Any, model: Any) -> dict[str, Any]:
    """What vLLM tells the kernel of the experts of the first layer that has any."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer: Any = next(m for m in model.modules() if isinstance(m, RoutedExperts))
    names = ("w13_weight_scale", "w2_weight_scale", "w13_weight_scale_2", "w2_weight_scale_2")
    holder: Any = SimpleNamespace(
        **{name: torch.ones(1) for name in (*names, "w13_input_scale", "w2_input_scale")},
        swiglu_limit=layer.swiglu_limit,
        swiglu_alpha=layer.swiglu_alpha,
        swiglu_beta=layer.swiglu_beta,
    )
    told = layer.quant_method.get_fused_moe_quant_config(holder)
    return {
        "activation": layer.activation.value,
        "weight_only": told.use_nvfp4_w4a16,
        "alpha": told.gemm1_alpha,
        "beta": told.gemm1_beta,
        "limit": told.gemm1_clamp_limit,
        "quantises_activations": told.quant_dtype is not None,
    }


def loaded(config: Any, model: Any) -> dict[str, Any]:
    """Give the model's loader every published tensor; what it put where."""
    text = model.language_model
    count, loader = 0, text.weight_loader()
    for name, tensor in published_tensors(text.model.m3_config):
        loader.load(name.removeprefix(TEXT_PREFIX), tensor)
        count += 1
    loader.ledger.require_complete()
    return {"tensors": count, "untouched": sorted(loader.parameters.keys() - loader.loaded)}


def on_first_rank(folder: str, options: str, *reports: Any) -> dict[str, Any]:
    """What each report says of the model on the first of the ranks that the options ask for."""
    config = resolved(folder, options)
    ranks = config.parallel_config.tensor_parallel_size
    # as vLLM settles it for our backends once the model is loaded
    config.cache_config.block_size = 128
    found: dict[str, Any] = {"ranks": ranks, "quantization": config.model_config.quantization}
    with building.rank(config, place=0, tensor=ranks, stages=1):
        model = building.build(config)
        found["class"] = type(model).__module__
        for report in reports:
            found[report.__name__] = report(config, model)
    return found


def caches(config: Any, model: Any) -> dict[str, list[Any]]:
    """Layer -> the cache it asks for: its spec, tokens of a block, bytes of a block."""
    return {
        name: [type(spec).__name__, spec.block_size, spec.page_size_bytes]
        for name, spec in building.specs_of(config).items()
    }


def main(options: str, whole: str, few: str) -> None:
    gpu = building.prepare()
    install_libraries()
    each = (methods, parameters, arithmetic, loaded)
    asked: dict[str, tuple[str, str, str, Any]] = {
        name: (name, few, options, each) for name in CHIPS
    }
    asked |= {
        "one rank": ("H100", few, options + ONE_RANK, each),
        "as wished": ("H100", few, options + WISHES, (methods,)),
        "all layers": ("H100", whole, options, (caches,)),
        "all layers, fp8 cache": ("H100", whole, options + FP8_CACHE, (caches,)),
        "all layers of B200": ("B200", whole, options, (caches,)),
    }
    found: dict[str, Any] = {}
    for name, (chip, folder, typed, reports) in asked.items():
        gpu.chip = CHIPS[chip]
        try:
            found[name] = on_first_rank(folder, typed, *reports)
        except Exception:
            found[name] = {"error": traceback.format_exc()[-3000:]}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
