"""Router logits on a GPU: those of fp32 weights, without a cast of rows or a product of fp32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.every_release

HIDDEN, EXPERTS = 512, 128


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """`torch.mm` with fp32 results of bf16, which torch has on GPUs alone; shapes it was given."""
    given: list[tuple[int, ...]] = []

    def mm(rows: Tensor, weights: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert rows.dtype == weights.dtype == torch.bfloat16
        given.append((*rows.shape, weights.shape[1]))
        return (rows.double() @ weights.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    return given


@pytest.fixture
def router() -> Any:
    """As on a GPU, with weights of which none is a bf16 number."""
    from m3_sglang.router import M3Router

    config: Any = SimpleNamespace(hidden_size=HIDDEN, num_experts=EXPERTS)
    made: Any = M3Router(config, device_type="cuda", prefix="gate")
    random = torch.Generator().manual_seed(0)
    made.weight.data.copy_(torch.randn(EXPERTS, HIDDEN, generator=random) / 20)
    made.quant_method.process_weights_after_loading(made)
    made.few_rows = None
    return made


def rows_of(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_three_parts_are_the_weight() -> None:
    from m3_sglang.router import bf16_parts

    bits = torch.randint(0, 2**31, (4096,), generator=torch.Generator().manual_seed(2))
    weight = bits.int().view(torch.float32)
    weight = weight[weight.isfinite() & (weight > 1e-33) & (weight < 3e38)].view(1, -1)
    parts = bf16_parts(weight)
    assert torch.equal(parts.double().sum(0), weight[0].double())


def test_logits_are_those_of_fp32_weights(router: Any, tensor_cores: Any) -> None:
    rows = rows_of(33)
    logits, bias = router(rows)
    assert (bias, logits.dtype) == (None, torch.float32)
    exact = rows.double() @ router.weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=2e-6)
    rounded = rows.double() @ router.weight.bfloat16().double().t()
    assert (rounded - exact).abs().max() > 1e-3
    assert tensor_cores == [(33, HIDDEN, 3 * EXPERTS)]


def test_new_weights_are_where_graphs_read_the_old_ones(router: Any, tensor_cores: Any) -> None:
    held, old = router.parts, router(rows_of(4))[0]
    router.weight.data.mul_(-1)
    router.finish_loading()
    assert router.parts is held
    assert torch.equal(router(rows_of(4))[0], -old)
    assert "parts" in dict(router.named_buffers())
    assert "parts" not in router.state_dict()


def test_sglangs_kernel_takes_few_rows(router: Any, tensor_cores: Any) -> None:
    asked: list[tuple[int, torch.dtype]] = []

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        asked.append((len(rows), weight.dtype))
        return torch.zeros(len(rows), EXPERTS)

    router.few_rows = (lambda rows, weight: len(rows) <= 8, product)
    router(rows_of(8))
    router(rows_of(9))
    assert asked == [(8, torch.float32)]
    assert tensor_cores == [(9, HIDDEN, 3 * EXPERTS)]


def test_a_cpu_multiplies_in_fp32() -> None:
    from m3_sglang.router import M3Router

    config: Any = SimpleNamespace(hidden_size=HIDDEN, num_experts=EXPERTS)
    router: Any = M3Router(config, device_type="cpu", prefix="gate")
    assert router.parts is None
    router.weight.data.normal_()
    rows = rows_of(3)
    assert torch.equal(router(rows)[0], torch.nn.functional.linear(rows.float(), router.weight))
