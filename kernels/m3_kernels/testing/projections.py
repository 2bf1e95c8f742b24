"""Rows of a step as a layer's projections give them, and what norm and RoPE make of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels.testing.cases import Case, Inputs, padded, view_of_copy

EPS = 1e-5
HEADS_OF_ROWS = ("q", "k", "index_q", "index_k")


@dataclass(frozen=True)
class Projections:
    """Arguments of `norm_rope_store` by its names; rows are parts of one tensor, as in hosts.

    Attributes
    ----------
    cos_sin : fp32 [T, rotary_dim], of each row's position
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    cos_sin: Tensor
    q_weight: Tensor
    k_weight: Tensor
    index_q_weight: Tensor
    index_k_weight: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, index_q and index_k."""
        return self.q, self.k, self.v, self.index_q, self.index_k

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the norms by argument."""
        return {f"{name}_weight": getattr(self, f"{name}_weight") for name in HEADS_OF_ROWS}

    def to(self, device: torch.device) -> Projections:
        """A copy on a device; strides, the poison around every view and shared memory stay."""
        copies: dict[int, Tensor] = {}
        return Projections(
            **{
                field.name: view_of_copy(getattr(self, field.name), device, copies)
                for field in dataclasses.fields(self)
            }
        )


def project(inputs: Inputs) -> Projections:
    """Random rows and weights for a case, with heads of unequal sizes; v is that of the inputs."""
    case = inputs.case
    random = torch.Generator().manual_seed(case.seed)
    rows = inputs.q.shape[0]
    dims = {"q": case.head_dim, "k": case.head_dim}
    dims |= {"index_q": case.index_dim, "index_k": case.index_dim}
    counts = {"q": case.num_q_heads, "k": case.num_kv_heads}
    counts |= {"index_q": case.num_kv_heads, "index_k": 1}
    sizes = [counts[name] * dims[name] for name in HEADS_OF_ROWS]
    value_size = case.num_kv_heads * case.head_dim
    one = padded(torch.zeros(rows, sum(sizes) + value_size, dtype=case.dtype))
    *parts, v = one.split([*sizes, value_size], dim=1)
    heads = {
        name: part.view(rows, counts[name], dims[name])
        for name, part in zip(HEADS_OF_ROWS, parts, strict=True)
    }
    for part in heads.values():
        values = torch.randn(part.shape, generator=random)
        part.copy_(values * torch.rand(part.shape[1], 1, generator=random) * 3)
    v = v.view(inputs.v.shape).copy_(inputs.v)
    weights = {
        f"{name}_weight": torch.randn(dims[name], generator=random).to(case.dtype)
        for name in HEADS_OF_ROWS
    }
    return Projections(
        q=heads["q"],
        k=heads["k"],
        v=v,
        index_q=heads["index_q"],
        index_k=heads["index_k"].squeeze(1),
        cos_sin=_angles(inputs),
        **weights,
    )


def normed_and_rotated(given: Projections, *, eps: float = EPS) -> dict[str, Tensor]:
    """q, k, index_q and index_k in float64, by their names; pairs rotate as complex numbers."""
    found = {}
    half = given.cos_sin.shape[1] // 2
    angles = torch.complex(*given.cos_sin.double().split(half, dim=1)) if half else None
    for name in HEADS_OF_ROWS:
        x = getattr(given, name).double()
        norm = (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps) ** -0.5
        x = x * norm * (getattr(given, f"{name}_weight").double() + 1)
        if angles is not None:
            here = angles.view(len(angles), *[1] * (x.dim() - 2), half)
            rotated = torch.complex(x[..., :half], x[..., half : 2 * half]) * here
            x = torch.cat([rotated.real, rotated.imag, x[..., 2 * half :]], dim=-1)
        found[name] = x
    return found


def largest_rounding(exact: Tensor, *dtypes: torch.dtype) -> Tensor:
    """How far [..., dim] computed in fp32 and then rounded to each of the dtypes may be off.

    One unit in the last place for each rounding, since the value before it may lie on the other
    side of a tie, and what fp32 loses to the largest channel, which rotation may have brought here.
    """
    allowed = 4e-6 * exact.abs().amax(-1, keepdim=True)
    for dtype in dtypes:
        if dtype.is_floating_point:
            kind = torch.finfo(dtype)
            allowed = allowed + kind.eps * (exact.abs() + kind.smallest_normal)
        else:
            allowed = allowed + 1
    return allowed


def _angles(inputs: Inputs) -> Tensor:
    """Cosines and sines of every row's position, of row 0's for padding."""
    case: Case = inputs.case
    q_lens = inputs.cu_seqlens_q.diff()
    request = torch.repeat_interleave(torch.arange(len(q_lens)), q_lens)
    last = inputs.seq_lens[request] - inputs.cu_seqlens_q[1:][request]
    positions = torch.zeros(inputs.q.shape[0])
    positions[: len(request)] = (last + torch.arange(len(request))).clamp_min(0).float()
    half = case.rotary_dim // 2
    frequencies = 5e6 ** -(torch.arange(half) / max(half, 1))
    angles = positions[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
