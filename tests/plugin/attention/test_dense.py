"""Dense layers on a CPU: who attends in them, and what ours does for a host."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.testing.cases import Case, build
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.dense import DenseAttention, choose_dense
from m3_plugin.settings import Settings


@pytest.mark.parametrize(
    ("device", "dtype", "settings", "named", "backend", "reason"),
    [
        ("cpu", torch.bfloat16, Settings(kernels="torch"), False, "torch", "as the MSA layers"),
        ("cuda", torch.bfloat16, Settings(), False, None, "for CPUs"),
        ("cpu", torch.bfloat16, Settings(dense="host"), False, None, "M3_PLUGIN_DENSE"),
        ("cpu", torch.bfloat16, Settings(), True, None, "by name"),
        ("cpu", torch.float8_e4m3fn, Settings(), False, None, "reads no torch.float8_e4m3fn"),
        ("cpu", torch.float32, Settings(kernels="reference"), False, None, "'reference' is too"),
    ],
)
def test_the_choice_and_its_reason(
    device: str,
    dtype: torch.dtype,
    settings: Settings,
    named: bool,
    backend: str | None,
    reason: str,
) -> None:
    found = choose_dense(device, cache_dtype=dtype, settings=settings, named=named)
    assert found.backend == backend
    assert reason in found.describe("TorchNative")
    assert ("TorchNative" in found.describe("TorchNative")) == (backend is None)


@pytest.mark.parametrize("pages", ["packed-heads", "separate"])
def test_what_is_stored_is_attended_to(pages: str) -> None:
    """A step stored into pages full of NaN gives what the op gives on pages that hold it."""
    case = Case("stored", ((0, 40), (0, 1), (0, 17)), pages=pages, padding_rows=2)  # pyright: ignore
    inputs = build(case)
    batch = MSABatch(
        **inputs.batch, slot_mapping=inputs.slot_mapping, max_query_len=40, max_seq_len=40
    )
    dense = DenseAttention("torch", settings=Settings())
    expected, out = torch.full_like(inputs.q, torch.nan), torch.full_like(inputs.q, torch.nan)
    dense.attend(batch, inputs.q, inputs.k_pages, inputs.v_pages, scale=1.0, out=expected)
    k_pages, v_pages = (
        torch.full_like(cache, torch.nan) for cache in (inputs.k_pages, inputs.v_pages)
    )
    # rows of the step in the order of its slots
    held = [
        part[:rows] for (_, rows), (part, *_) in zip(case.requests, inputs.sequences, strict=True)
    ]
    values = [
        part[:rows] for (_, rows), (_, part, _) in zip(case.requests, inputs.sequences, strict=True)
    ]
    k, v = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
    k[: batch.cu_seqlens_q[-1]] = torch.cat(held)
    v[: batch.cu_seqlens_q[-1]] = torch.cat(values)
    dense.store(k, v, k_pages, v_pages, slot_mapping=inputs.slot_mapping)
    dense.attend(batch, inputs.q, k_pages, v_pages, scale=1.0, out=out)
    assert torch.equal(out, expected)
    assert (out[int(batch.cu_seqlens_q[-1]) :] == 0).all()
    assert dense.rows == 2 * len(out)
