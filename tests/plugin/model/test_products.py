"""Who multiplies with plain weights of 16 bits on a CPU, and what our product gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import m3_kernels
from m3_kernels.capability import KernelFamily
from m3_plugin.model import products
from m3_plugin.model.products import choose_products, multiply, takes
from m3_plugin.settings import Settings

needs_native = pytest.mark.skipif(
    m3_kernels.kernel_families("cpu")[0].refusal is not None, reason="no C++ compiler"
)


@needs_native
@pytest.mark.parametrize(
    ("device", "dtype", "settings", "library", "own", "reason"),
    [
        ("cpu", torch.bfloat16, {}, False, True, "no products of bfloat16 for this processor"),
        ("cpu", torch.float16, {}, False, True, "no products of float16"),
        ("cpu", torch.bfloat16, {}, True, False, "library multiplies bfloat16"),
        ("cpu", torch.bfloat16, {"products": "own"}, True, True, "M3_PLUGIN_PRODUCTS"),
        ("cpu", torch.bfloat16, {"products": "host"}, False, False, "M3_PLUGIN_PRODUCTS"),
        ("cpu", torch.bfloat16, {"kernels": "torch"}, False, False, "M3_PLUGIN_KERNELS=torch"),
        ("cpu", torch.float32, {"products": "own"}, False, False, "multiplies float32"),
        ("cuda", torch.bfloat16, {"products": "own"}, False, False, "for CPUs"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    settings: dict[str, Any],
    library: bool,
    own: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(products, "library_multiplies", lambda dtype: library)
    choice = choose_products(device, dtype, settings=Settings(**settings))
    assert choice.own is own
    assert reason in choice.describe()


def test_without_a_compiler_the_host_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = (KernelFamily("native", "no compiler"), KernelFamily("torch"))
    monkeypatch.setattr(m3_kernels, "kernel_families", lambda device: refused)
    choice = choose_products("cpu", torch.bfloat16, settings=Settings(products="own"))
    assert not choice.own
    assert "no compiler" in choice.reason


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 1040).to(dtype), torch.randn(72, 1040).to(dtype)
    exact = x.double() @ weight.double().T
    # fp32 sums of 1,040 products are this close to the exact ones; then one rounding
    near = (x.double().abs() @ weight.double().abs().T) * 2.0**-20
    error = (multiply(x, weight).double() - exact).abs()
    assert (error <= near + exact.abs() * torch.finfo(dtype).eps / 2).all()


@needs_native
def test_bits_of_a_row_do_not_depend_on_rows_beside() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(211, 512).bfloat16(), torch.randn(136, 512).bfloat16()
    whole = multiply(x, weight)
    for first, last in ((0, 1), (3, 7), (95, 98), (0, 97), (200, 211)):
        assert torch.equal(multiply(x[first:last], weight), whole[first:last])


@needs_native
def test_shapes_and_bias() -> None:
    x, weight, bias = torch.ones(2, 3, 32).half(), torch.ones(5, 32).half(), torch.ones(5).half()
    assert torch.equal(multiply(x, weight, bias), torch.full((2, 3, 5), 33.0).half())


@pytest.mark.parametrize(
    ("weight", "taken"),
    [
        (torch.zeros(4, 32, dtype=torch.bfloat16), True),
        (torch.zeros(2, 4, 32, dtype=torch.float16), True),
        (torch.zeros(4, 32), False),
        (torch.zeros(4, 24, dtype=torch.bfloat16), False),
        (torch.zeros(32, 4, dtype=torch.bfloat16).T, False),
        (torch.zeros(4, 32, dtype=torch.bfloat16, device="meta"), False),
        (torch.zeros(0, dtype=torch.bfloat16), False),
    ],
)
def test_weights_that_are_taken(weight: torch.Tensor, taken: bool) -> None:
    assert takes(weight) is taken


@needs_native
def test_linear_takes_our_product_where_the_library_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(2)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((9, 64), (5, 64), (5,)))
    for library, wanted in (
        (False, multiply(x, weight, bias)),
        (True, torch.nn.functional.linear(x, weight, bias)),
    ):
        monkeypatch.setattr(products, "library_multiplies", lambda dtype, has=library: has)
        products._is_own.cache_clear()
        assert torch.equal(products.linear(x, weight, bias), wanted)
    products._is_own.cache_clear()
    wide = (x.float(), weight.float(), bias.float())
    assert torch.equal(products.linear(*wide), torch.nn.functional.linear(*wide))


@needs_native
def test_columns_that_ours_does_not_take_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of patches of 14x14: rows of 1,176 values."""
    torch.manual_seed(3)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((99, 1176), (8, 1176), (8,)))
    assert not takes(weight)
    monkeypatch.setattr(products, "library_multiplies", lambda dtype: False)
    products._is_own.cache_clear()
    for weights in (weight, torch.randn(1176, 8).bfloat16().T, torch.randn(64, 8).bfloat16().T):
        rows = x[:, : weights.shape[1]]
        found = products.linear(rows, weights, bias)
        exact = torch.nn.functional.linear(rows.double(), weights.double(), bias.double())
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-6)
        filled = (0, -rows.shape[1] % 16)
        ours = [torch.nn.functional.pad(part, filled).contiguous() for part in (rows, weights)]
        assert torch.equal(found, multiply(ours[0], ours[1], bias))
    products._is_own.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_fp32_where_the_library_has_no_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    given = [torch.randn(2, 4, 37, 80).to(dtype) for _ in range(3)]
    seen: list[torch.dtype] = []
    plain: Any = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append(query.dtype)
        return plain(query, *others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    wanted = plain(*(tensor.float() for tensor in given))
    for library in (False, True):
        monkeypatch.setattr(products, "library_multiplies", lambda dtype, has=library: has)
        products.lacks_products.cache_clear()
        found = products.attention(*given)
        assert found.dtype == dtype
        if not library:
            assert torch.equal(found, wanted.to(dtype))
        assert torch.equal(products.attention(*(x.float() for x in given)), wanted)
    products.lacks_products.cache_clear()
    assert seen == [torch.float32, torch.float32, dtype, torch.float32]
