"""Our product under vLLM's linear layers of 16 bits, and what keeps vLLM's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from m3_plugin.model import products
from m3_vllm.own_products import OwnHeadProduct, OwnProduct, use_own_products


@pytest.fixture(scope="module")
def _ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(autouse=True)
def _without_products_of_16_bits(monkeypatch: pytest.MonkeyPatch, _ranks: None) -> None:
    monkeypatch.setattr(products, "library_multiplies", lambda dtype: False)


def model(dtype: torch.dtype = torch.bfloat16, *, columns: int = 64) -> nn.ModuleDict:
    torch.manual_seed(0)
    layer = ReplicatedLinear(columns, 80, bias=False, params_dtype=dtype)
    with torch.no_grad():
        layer.get_parameter("weight").normal_()
    return nn.ModuleDict({"layer": layer})


def after_loading(made: nn.ModuleDict) -> ReplicatedLinear:
    """As vLLM's loader leaves it."""
    layer = made["layer"]
    assert isinstance(layer, ReplicatedLinear)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_layer_stays_and_the_product_is_ours(dtype: torch.dtype) -> None:
    use_own_products(made := model(dtype))
    layer = after_loading(made)
    assert isinstance(layer.quant_method, OwnProduct)
    x, weight = torch.randn(130, 64).to(dtype), layer.get_parameter("weight")
    out, _ = layer(x)
    assert torch.equal(out, products.multiply(x, weight))
    torch.testing.assert_close(out, nn.functional.linear(x, weight))
    # new weights in the same place, as updates bring them
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(layer(x)[0], 2 * out)


def test_the_heads_product_is_ours_and_its_rows_can_be_looked_up() -> None:
    head = ParallelLMHead(128, 64, params_dtype=torch.bfloat16)
    weight = head.get_parameter("weight")
    with torch.no_grad():
        weight.normal_()
    use_own_products(nn.ModuleDict({"head": head}))
    head.quant_method.process_weights_after_loading(head)
    assert isinstance(head.quant_method, OwnHeadProduct)
    x = torch.randn(7, 64).bfloat16()
    assert torch.equal(head.quant_method.apply(head, x), products.multiply(x, weight))
    ids = torch.tensor([3, 0, 127])
    assert torch.equal(head.quant_method.embedding(head, ids), weight[ids])


@pytest.mark.parametrize(
    ("dtype", "columns", "variable"),
    [
        (torch.float32, 64, "auto"),
        (torch.bfloat16, 72, "auto"),
        (torch.bfloat16, 64, "host"),
    ],
)
def test_vllms_product_is_kept(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int, variable: str
) -> None:
    monkeypatch.setenv("M3_PLUGIN_PRODUCTS", variable)
    use_own_products(made := model(dtype, columns=columns))
    layer = after_loading(made)
    assert type(layer.quant_method) is UnquantizedLinearMethod
    layer(torch.randn(3, columns).to(dtype))


def test_a_compiled_graph_holds_the_product_as_one_node() -> None:
    use_own_products(made := model())
    layer = after_loading(made)
    x = torch.randn(5, 64).bfloat16()
    compiled = torch.compile(lambda rows: layer(rows)[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x)[0])
