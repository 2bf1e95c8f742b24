"""What MiniMax-M3's experts must compute, and how to tell a host's kernel that does not.

Expert kernels have lost the SwiGLU clamp, alpha or the "+ 1", or read gate and up rows in another
order, without a word; some only for large batches, where a host takes another kernel. Both adapters
prove the first MoE layer once its weights are final, at several numbers of rows: by value where the
answer is known (`KnownExperts`), elsewhere by how the output grows with the input
(`grows_unclamped`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_plugin.model.config import M3Config

# Inputs of the growth probe: far below the clamp to far above it, whatever the weights' scale.
PROBE_MAGNITUDES = tuple(4.0**power for power in range(3, 10))
# Rows asked at once: of one request that decodes, of a batch of them, of a prompt's chunk.
PROBE_ROWS = (1, 64, 4096)
# Largest relative error by bits of the stored weights, for kernels may round activations alike.
# bf16 kernels stay below 1 %, 8 bits below 6 %; a lost "+ 1", clamp or row order is off by half and
# more.
PROOF_TOLERANCE = {16: 0.03, 8: 0.12, 4: 0.35}
_TOKENS = 4


@dataclass(frozen=True)
class KnownExperts:
    """Weights of the first experts that a rank holds of one layer, this rank's part.

    As many as a token is given to, or all of them where a rank holds fewer.

    Attributes
    ----------
    w13 : floating [experts, 2 * intermediate, hidden], all gate rows, then all up rows
    w2 : floating [experts, hidden, intermediate]
    bits : of a stored weight: 16, 8 or 4
    """

    w13: Tensor
    w2: Tensor
    bits: int

    def tokens(self, config: M3Config, *, dtype: torch.dtype) -> Tensor:
        """Different inputs, fp32 [tokens, hidden] as a kernel of that dtype receives them.

        Half of them give gates around 1, where alpha and the "+ 1" count, half beyond the clamp.
        """
        seeds = range(_TOKENS)
        tokens = torch.cat([probe_token(config, magnitude=1.0, seed=seed) for seed in seeds])
        gates = (tokens @ self.w13[0].float().T).square().mean().sqrt()
        unit = 1 / float(gates) if gates > 0 else 1.0
        # hosts load models under a default dtype of their own
        sizes = torch.tensor([1.0, 3 * config.swiglu_limit] * (_TOKENS // 2), dtype=torch.float32)
        return (tokens * unit * sizes[:, None]).to(dtype).float()

    def answer(self, tokens: Tensor, config: M3Config) -> Tensor:
        """The mean of the experts by the book: fp32 [tokens, hidden]."""
        return routed_output(tokens, self.w13, self.w2, config)


@dataclass(frozen=True)
class ExpertProbe:
    """Refuses expert kernels that do not compute SwiGLU-OAI.

    Attributes
    ----------
    config : the model
    host : whose kernels they are
    remedy : the option that chooses others
    answer : the kernel: fp32 [rows, hidden] -> [rows, hidden]. By value it must give the mean of
        the `KnownExperts`; by growth any experts
    dtype : of activations
    rows : numbers of rows to ask
    in_step : whether ranks answer together, so that each must ask as often as all others
    """

    config: M3Config
    host: str
    remedy: str
    answer: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    rows: tuple[int, ...] = PROBE_ROWS
    in_step: bool = False

    def prove(self, known: KnownExperts | None, *, layout: str = "") -> None:
        """Ask the kernel, with each number of rows.

        Parameters
        ----------
        known : the experts' weights; None to prove the clamp alone
        layout : what the host was told to use, for the error

        Raises
        ------
        ValueError : it answers wrongly.
        """
        for rows in self.rows:
            if known is None:
                norms = self._norms_until_settled(rows)
                require_clamped(norms, config=self.config, host=self.host, remedy=self.remedy)
            else:
                self._require_value(known, rows=rows, layout=layout)

    def _require_value(self, known: KnownExperts, *, rows: int, layout: str) -> None:
        tokens = known.tokens(self.config, dtype=self.dtype)
        # each of the tokens is asked for, one by one if need be
        repeats = -(-rows // len(tokens))
        wanted = known.answer(tokens, self.config).repeat(repeats, 1)
        answers = [self.answer(part) for part in tokens.repeat(repeats, 1).split(rows)]
        found = torch.cat([answer.float().cpu() for answer in answers])
        size = wanted.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        error = float(((found - wanted).norm(dim=1) / size).max())
        tolerance = PROOF_TOLERANCE[known.bits]
        if not error <= tolerance:
            where = f" in the {layout} layout" if layout else ""
            raise ValueError(
                f"{self.host}'s expert kernel does not compute MiniMax-M3's SwiGLU-OAI "
                f"(relative error {error:.3g} on {rows} rows{where}, at most {tolerance} is "
                f"rounding); choose another one with {self.remedy}"
            )

    def _norms_until_settled(self, rows: int) -> list[float]:
        """Norms of the largest magnitudes, as many as it takes to see that they settle, or all.

        A clamped kernel has settled at the largest: many rows of few magnitudes are asked.
        """
        norms: list[float] = []
        for magnitude in reversed(PROBE_MAGNITUDES):
            norms.insert(0, self._norm(magnitude, rows=rows))
            settled = sum(map(math.isfinite, norms)) > 1 and not grows_unclamped(norms)
            if settled and not self.in_step:
                break
        return norms

    def _norm(self, magnitude: float, *, rows: int) -> float:
        token = probe_token(self.config, magnitude=magnitude)
        # the last row: a kernel for many rows has them in tiles
        return float(self.answer(token.expand(rows, -1))[-1].float().norm())


def probe_token(config: M3Config, *, magnitude: float, seed: int = 0) -> Tensor:
    """The same random token each time, fp32 on CPU [1, hidden_size], scaled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, config.hidden_size)
    return magnitude * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def expert_output(token: Tensor, w13: Tensor, w2: Tensor, config: M3Config) -> Tensor:
    """One expert by the book (m3-spec, SwiGLU-OAI), fp32 [tokens, hidden_size].

    Parameters
    ----------
    token : fp32 [tokens, hidden_size]
    w13 : fp32 [2 * intermediate, hidden_size], all gate rows, then all up rows
    w2 : fp32 [hidden_size, intermediate]
    """
    gate, up = (token @ w13.T).chunk(2, dim=-1)
    gate = gate.clamp(max=config.swiglu_limit)
    up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    glu = gate * torch.sigmoid(config.swiglu_alpha * gate)
    return ((up + config.swiglu_beta) * glu) @ w2.T


def routed_output(token: Tensor, w13: Tensor, w2: Tensor, config: M3Config) -> Tensor:
    """The mean of experts, fp32 [tokens, hidden_size].

    Parameters
    ----------
    token : [tokens, hidden_size], any float dtype
    w13, w2 : stacked weights [experts, ...] as in `expert_output`, any float dtype
    """
    outputs = [
        expert_output(token.float(), gate_up.float(), down.float(), config)
        for gate_up, down in zip(w13, w2, strict=True)
    ]
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
