"""FlashInfer's own checks of a call to `msa_sparse_attention`, from its wheel, without a device.

The function runs as it is up to where it would compile and launch; what it hands to its kernels
there is computed in torch, by the rules of their source.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / ".venv" / "flashinfer"
WHEEL = next(iter(sorted(FOLDER.glob("flashinfer_python-*.whl"))), None)


def load(patch: pytest.MonkeyPatch) -> Any:
    """The module of `msa_sparse_attention`, behind `flashinfer.msa_ops` as long as the patch lasts.

    What the module imports besides torch needs a GPU's libraries; stand-ins say that this is SM120.
    """
    if WHEEL is None:
        pytest.skip(f"no wheel in {FOLDER}: run make test")
    for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
        patch.delitem(sys.modules, name)

    def stand_in(name: str, folder: str | None = None, **attributes: Any) -> ModuleType:
        module = ModuleType(name)
        module.__path__ = [] if folder is None else [f"{WHEEL}/{folder}"]
        vars(module).update(attributes)
        patch.setitem(sys.modules, name, module)
        return module

    stand_in("flashinfer", "flashinfer")
    ops = stand_in("flashinfer.msa_ops", "flashinfer/msa_ops")
    stand_in("flashinfer.api_logging", flashinfer_api=lambda **_: lambda function: function)
    stand_in("flashinfer.trace")
    stand_in("flashinfer.trace.templates")
    stand_in("flashinfer.trace.templates.msa", msa_sparse_attention_trace=None)
    stand_in("flashinfer.utils", is_sm12x_supported=lambda device: True)
    stand_in(
        "flashinfer.msa_ops._blackwell_sm100",
        MSASparseAttentionWorkspace=object,
        blackwell_msa_sparse_attention=None,
        is_blackwell_msa_device=lambda device: False,
    )
    for name in ("_common", "sparse_prefill"):
        patch.delitem(sys.modules, f"flashinfer.msa_ops.{name}", raising=False)
    import flashinfer.msa_ops.sparse_prefill as real  # pyright: ignore[reportMissingImports]

    # Both were imported beside the patch, which must take them away again.
    for name in ("_common", "sparse_prefill"):
        module = sys.modules.pop(f"flashinfer.msa_ops.{name}")
        patch.setitem(sys.modules, f"flashinfer.msa_ops.{name}", module)
    vars(ops)["msa_sparse_attention"] = real.msa_sparse_attention
    patch.setattr(real, "_msa_sparse_prefill", as_its_kernels)
    return real


def as_its_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_offset: Tensor,
    *,
    page_table: Tensor,
    causal: bool,
    softmax_scale: float,
    group_size: int,
    topk: int,
    return_softmax_lse: bool,
    packed_kv: tuple[Tensor, tuple[int, ...]] | None,
    kv_fp8: bool,
    kv_nvfp4: bool,
    **_: Any,
) -> Any:
    """The arguments of FlashInfer's kernels, and what these make of them, in fp64."""
    assert causal
    assert not kv_fp8
    assert not kv_nvfp4
    assert ids.shape[2] == topk
    plain = [q, ids, page_table]
    if packed_kv is None:
        plain += [k, v]
    else:
        k, v = packed_kv[0].unbind(3)
    assert all(t.stride() == torch.empty(t.shape, device="meta").stride() for t in plain)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf)
    starts = cu_seqlens_q.tolist()
    for request in range(len(starts) - 1):
        length = int(cu_seqlens_k[request + 1] - cu_seqlens_k[request])
        for row in range(starts[request], starts[request + 1]):
            limit = min(row - starts[request] + int(q_offset[request]) + 1, length)
            for head in range(k.shape[1]):
                # its lists end at the first negative id, and are merged as ascending ones
                chosen = list(iter(iter(ids[head, row].tolist()).__next__, -1))
                assert chosen == sorted(set(chosen))
                pages = page_table[request, chosen].long()
                seen = (torch.tensor(chosen)[:, None] * 128 + torch.arange(128)).flatten() < limit
                keys = k[pages, head].flatten(0, 1)[seen].double()
                values = v[pages, head].flatten(0, 1)[seen].double()
                group = slice(head * group_size, (head + 1) * group_size)
                logits = q[row, group].double() @ keys.T * softmax_scale
                if len(keys):
                    out[row, group] = (logits.softmax(-1) @ values).to(q.dtype)
                    lse[row, group] = logits.logsumexp(-1).float()
    return (out, lse) if return_softmax_lse else out
