"""What MiniMax-M3's experts must compute, and how to tell a host's kernel that does not.

Expert kernels have lost the SwiGLU clamp, or read gate and up rows in another order, without a
word. Both adapters probe the first MoE layer once its weights are final, on one token: against the
weights as they were loaded where those can be read (`routed_output`, SGLang), and by how the output
grows with the input where they are packed or sharded beyond recognition (`grows_unclamped`).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from m3_plugin.model.config import M3Config

# Inputs of the growth probe: far below the clamp to far above it, whatever the weights' scale.
PROBE_MAGNITUDES = tuple(4.0**power for power in range(3, 10))
# bf16 kernels stay below 1 %; a lost "+ 1", clamp or row order is off by tens of per cent.
PROOF_TOLERANCE = 0.03


def probe_token(config: M3Config, *, magnitude: float) -> Tensor:
    """The same random token each time, fp32 on CPU [1, hidden_size], scaled."""
    generator = torch.Generator().manual_seed(0)
    return magnitude * torch.randn(1, config.hidden_size, generator=generator, device="cpu")


def expert_output(token: Tensor, w13: Tensor, w2: Tensor, config: M3Config) -> Tensor:
    """One expert by the book (m3-spec, SwiGLU-OAI), fp32 [1, hidden_size].

    Parameters
    ----------
    token : fp32 [1, hidden_size]
    w13 : fp32 [2 * intermediate, hidden_size], all gate rows, then all up rows
    w2 : fp32 [hidden_size, intermediate]
    """
    gate, up = (token @ w13.T).chunk(2, dim=-1)
    gate = gate.clamp(max=config.swiglu_limit)
    up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    glu = gate * torch.sigmoid(config.swiglu_alpha * gate)
    return ((up + config.swiglu_beta) * glu) @ w2.T


def routed_output(token: Tensor, w13: Tensor, w2: Tensor, config: M3Config) -> Tensor:
    """The mean of the first `num_experts_per_token` experts, fp32 [1, hidden_size].

    Parameters
    ----------
    token : [1, hidden_size], any float dtype
    w13, w2 : stacked weights [num_experts, ...] as in `expert_output`, any float dtype
    """
    ids = range(config.num_experts_per_token)
    outputs = [expert_output(token.float(), w13[i].float(), w2[i].float(), config) for i in ids]
    return torch.stack(outputs).mean(0)


def grows_unclamped(norms: list[float]) -> bool:
    """Whether outputs for the inputs of `PROBE_MAGNITUDES`, 4x each, never settle.

    A clamped SwiGLU saturates: some step grows less than 4x. Without the clamp every step grows
    about 16x. Overflow in a narrow dtype ends the sequence; all-zero experts settle at once.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    return len(finite) > 1 and all(large > 4 * small for small, large in itertools.pairwise(finite))


def require_clamped(norms: list[float], *, config: M3Config, host: str, remedy: str) -> None:
    """Refuse an expert kernel whose output keeps growing with its input.

    Parameters
    ----------
    norms : of the outputs for `PROBE_MAGNITUDES`, in their order
    host, remedy : whose kernel it is, and the option that chooses another one

    Raises
    ------
    ValueError : the clamp is not applied.
    """
    if grows_unclamped(norms):
        raise ValueError(
            f"{host}'s MoE backend does not apply swiglu_limit={config.swiglu_limit}: the experts' "
            f"output grows without bound (norms {', '.join(f'{n:.3g}' for n in norms)} for inputs "
            f"growing 4x each); choose another backend with {remedy}"
        )
