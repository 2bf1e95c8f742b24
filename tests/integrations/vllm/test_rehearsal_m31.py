"""M3.1 in full size as vLLM builds it on each family of GPUs: methods, kernels, tensors, caches.

`rehearsal_m31.py` does it on the meta device with the command line of docs/m31.md. The tables here
are the description of the published tensors, worked out by hand.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tests.integrations.m31 import documented_options, write_published_config
from tests.integrations.vllm.rehearsal import CHIPS
from tests.interpreters import Forking

# Three layers with a dense MLP, and one with experts.
LAYERS = 4
RANKS = 4
# Of the projections in MXFP8; below SM100 vLLM's own choice would be another on SM90.
PROJECTIONS = {
    "A100": "MarlinMxfp8LinearKernel",
    "H100": "MarlinMxfp8LinearKernel",
    "B200": "FlashInferCutedslMxfp8LinearKernel",
    "RTX PRO 6000": "FlashInferCutlassMxfp8LinearKernel",
}
MXFP8 = "ModelOptLinearMethod"
NVFP4 = "CompressedTensorsW4A4Nvfp4MoEMethod"

EXPERTS = "block_sparse_moe.experts.routed_experts"
# Of a layer: parameter -> shape and dtype on one rank. Query, key and value heads of 128 channels
# are 64, 4 and 4, those of the index 4 and 1.
QKV = 128 * (64 + 4 + 4 + 4 + 1)
ATTENTION = {
    "self_attn.qkv_proj.weight": ([QKV, 6144], "float8_e4m3fn"),
    "self_attn.qkv_proj.weight_scale": ([QKV, 192], "uint8"),
    "self_attn.o_proj.weight": ([6144, 8192], "float8_e4m3fn"),
    "self_attn.o_proj.weight_scale": ([6144, 256], "uint8"),
    **{f"self_attn.{name}_norm.weight": ([128], "bfloat16") for name in ("q", "k")},
    **{f"self_attn.index_{name}_norm.weight": ([128], "bfloat16") for name in ("q", "k")},
    "input_layernorm.weight": ([6144], "bfloat16"),
    "post_attention_layernorm.weight": ([6144], "bfloat16"),
}
DENSE = ATTENTION | {
    "mlp.gate_up_proj.weight": ([2 * 12288, 6144], "float8_e4m3fn"),
    "mlp.gate_up_proj.weight_scale": ([2 * 12288, 192], "uint8"),
    "mlp.down_proj.weight": ([6144, 12288], "float8_e4m3fn"),
    "mlp.down_proj.weight_scale": ([6144, 384], "uint8"),
}
ROUTED = ATTENTION | {
    "block_sparse_moe.gate.weight": ([128, 6144], "float32"),
    "block_sparse_moe.e_score_correction_bias": ([128], "float32"),
    "block_sparse_moe.shared_experts.gate_up_proj.weight": ([2 * 3072, 6144], "float8_e4m3fn"),
    "block_sparse_moe.shared_experts.gate_up_proj.weight_scale": ([2 * 3072, 192], "uint8"),
    "block_sparse_moe.shared_experts.down_proj.weight": ([6144, 3072], "float8_e4m3fn"),
    "block_sparse_moe.shared_experts.down_proj.weight_scale": ([6144, 96], "uint8"),
    f"{EXPERTS}.w13_weight_packed": ([128, 2 * 3072, 3072], "uint8"),
    f"{EXPERTS}.w13_weight_scale": ([128, 2 * 3072, 384], "float8_e4m3fn"),
    f"{EXPERTS}.w13_weight_global_scale": ([128, 2], "float32"),
    f"{EXPERTS}.w13_input_global_scale": ([128, 2], "float32"),
    f"{EXPERTS}.w2_weight_packed": ([128, 6144, 1536], "uint8"),
    f"{EXPERTS}.w2_weight_scale": ([128, 6144, 192], "float8_e4m3fn"),
    f"{EXPERTS}.w2_weight_global_scale": ([128], "float32"),
    f"{EXPERTS}.w2_input_global_scale": ([128], "float32"),
}
WHOLE = {
    "model.embed_tokens.weight": ([200064, 6144], "bfloat16"),
    "model.norm.weight": ([6144], "bfloat16"),
    "lm_head.weight": ([200064, 6144], "bfloat16"),
}


@pytest.fixture(scope="module")
def found(gpus: Forking, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `rehearsal_m31.py`."""
    folder = tmp_path_factory.mktemp("published")
    whole = write_published_config(folder / "whole")
    few = write_published_config(folder / "few", layers=LAYERS)
    options = " ".join(documented_options("vllm serve"))
    module = "tests.integrations.vllm.rehearsal_m31"
    report: dict[str, Any] = gpus.report(module, options, whole, few)
    assert {name: each["error"] for name, each in report.items() if "error" in each} == {}
    return report


@pytest.mark.parametrize("chip", CHIPS)
def test_each_chip_gets_vllm_s_methods_and_kernels_that_it_has(
    found: dict[str, Any], chip: str
) -> None:
    facts = found[chip]
    assert (facts["class"], facts["quantization"]) == ("m3_vllm.model", "m3_mxfp8_nvfp4")
    assert facts["ranks"] == RANKS
    methods = dict(facts["methods"])
    for name in ("model.embed_tokens", "lm_head"):
        assert methods.pop(name) == ["UnquantizedEmbeddingMethod", None]
    last = f"model.layers.{LAYERS - 1}."
    assert methods.pop(f"{last}block_sparse_moe.gate") == ["UnquantizedLinearMethod", None]
    assert methods.pop(f"{last}{EXPERTS}") == [NVFP4, "MarlinExperts"]
    # qkv with the index branch, o, gate and up, down
    assert len(methods) == 4 * LAYERS
    assert {tuple(chosen) for chosen in methods.values()} == {(MXFP8, PROJECTIONS[chip])}


def test_a_wish_for_another_kernel_is_obeyed(found: dict[str, Any]) -> None:
    chosen = {kernel for _, kernel in found["as wished"]["methods"].values() if kernel}
    assert chosen == {"HummingMxfp8LinearKernel", "HummingIndexedExperts"}


def test_parameters_are_the_published_tensors(found: dict[str, Any]) -> None:
    wanted = dict(WHOLE)
    for layer in range(LAYERS):
        own = ROUTED if layer == LAYERS - 1 else DENSE
        wanted |= {f"model.layers.{layer}.{name}": value for name, value in own.items()}
    parameters = found["one rank"]["parameters"]
    assert {name: tuple(value) for name, value in parameters.items()} == wanted


@pytest.mark.parametrize("server", [*CHIPS, "one rank"])
def test_every_published_tensor_has_its_place(found: dict[str, Any], server: str) -> None:
    """24 of a layer with a dense MLP, 26 and 12 per expert of others; loaders compare shapes."""
    loaded = found[server]["loaded"]
    assert loaded == {"tensors": 3 + 24 * 3 + 26 + 12 * 128, "untouched": []}
    dtypes = {
        name: dtype
        for name, (_, dtype) in found[server]["parameters"].items()
        if name.startswith("model.layers.")
    }
    assert dtypes == {
        name: dtype
        for name, (_, dtype) in found["one rank"]["parameters"].items()
        if name.startswith("model.layers.")
    }


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_of_experts_are_told_m3_s_arithmetic(found: dict[str, Any], chip: str) -> None:
    assert found[chip]["arithmetic"] == {
        "activation": "swigluoai_uninterleave",
        "weight_only": True,
        "quantises_activations": False,
        "alpha": 1.702,
        "beta": 1.0,
        "limit": 7.0,
    }


@pytest.mark.parametrize(
    ("server", "item"), [("all layers", 2), ("all layers, fp8 cache", 1), ("all layers of B200", 2)]
)
def test_all_layers_keep_index_keys(found: dict[str, Any], server: str, item: int) -> None:
    """A rank of four has one KV head; every rank the index key of every layer, in 16 bits."""
    kv, index = 128 * 2 * 128 * item, 128 * 128 * 2
    sizes = [tuple(spec[1:]) for spec in found[server]["caches"].values()]
    assert sorted(sizes) == sorted([(128, kv)] * 60 + [(128, index)] * 60)
    for layer in range(60):
        own = [name for name in found[server]["caches"] if f".layers.{layer}." in name]
        assert len(own) == 2, layer


def test_the_scale_of_a_tensor_divides_in_vllm_s_own_method() -> None:
    """Marlin's packing needs a GPU: if this fails, read what the method hands to it."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as hosts,
    )

    method = hosts.CompressedTensorsW4A4Nvfp4MoEMethod
    source = inspect.getsource(method.process_weights_after_loading)
    assert "w13_weight_global_scale = layer.w13_weight_global_scale[:, 0]" in source
    assert "w13_scale_2=(1.0 / w13_weight_global_scale)" in source
    assert "w2_scale_2=(1.0 / layer.w2_weight_global_scale)" in source


def test_marlin_s_experts_clamp_as_told() -> None:
    """The activation between both products, which needs a GPU to run."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    assert "activation_func=self.activation," in inspect.getsource(marlin_moe.MarlinExperts.apply)
