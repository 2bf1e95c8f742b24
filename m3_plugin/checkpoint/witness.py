"""Plain weights of a few experts, kept while a checkpoint is loaded, whatever it stores them as.

What a host makes of quantised experts can only be judged beside what the files say. They are read
with our own codecs, tensor by tensor, on their way into the host's modules.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from m3_plugin.checkpoint.stream import Dequantiser
from m3_plugin.model.config import M3Config
from m3_plugin.model.experts import KnownExperts
from m3_plugin.quantization.dialects import PLAIN

# exact for the values of 8 bits, and near enough for those of 4
_KEPT_AS = torch.bfloat16


class ExpertWitness:
    """Keeps the first experts of one layer that a rank holds, at most as many as a token has.

    Parameters
    ----------
    config : the model
    experts : the layer's name in the checkpoint, "model.layers.3.block_sparse_moe.experts"
    rank, size : of the ranks that share each expert; the part of this one is kept
    own : experts of which the rank has a part; all by default
    """

    def __init__(
        self,
        config: M3Config,
        *,
        experts: str,
        rank: int,
        size: int,
        own: range | None = None,
    ) -> None:
        self.config = config
        own = range(config.num_experts) if own is None else own
        self.watched = own[: config.num_experts_per_token]
        self.experts = experts
        self.rank, self.size = rank, size
        self.dequantiser = Dequantiser(config)
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.name = re.compile(rf"{re.escape(experts)}\.(\d+)\.(w[123])\.")

    def see(self, name: str, tensor: Tensor) -> None:
        """Look at a tensor on its way; `name` is relative to the text model."""
        match = self.name.match(name)
        if match is None or int(match[1]) not in self.watched:
            return
        plain = self.dequantiser.take(name, tensor.detach().cpu())
        if plain is not None and plain[0].endswith(".weight"):
            self.kept[int(match[1]), match[2]] = self._part(match[2], plain[1]).to(_KEPT_AS)

    def testimony(self) -> KnownExperts | None:
        """The experts, None if not all of their tensors came by."""
        names = [(expert, matrix) for expert in self.watched for matrix in ("w1", "w2", "w3")]
        if not all(name in self.kept for name in names):
            return None
        gate_up = [torch.cat((self.kept[e, "w1"], self.kept[e, "w3"])) for e in self.watched]
        return KnownExperts(
            w13=torch.stack(gate_up),
            w2=torch.stack([self.kept[e, "w2"] for e in self.watched]),
            bits=self._bits(),
        )

    def _part(self, matrix: str, weight: Tensor) -> Tensor:
        """This rank's channels of an expert: rows of w1 and w3, columns of w2."""
        dim = 1 if matrix == "w2" else 0
        own = -(-weight.shape[dim] // self.size)
        first = self.rank * own
        return weight.narrow(dim, first, min(own, weight.shape[dim] - first)).clone()

    def _bits(self) -> int:
        quantization = self.config.quantization
        if quantization is None:
            return 16
        stored = quantization.format_of(f"{self.experts}.0.w1")
        if stored == PLAIN:
            return 16
        parts = stored.parts(64, 128)
        widest = max(part.num_bytes for part in parts.values())
        return 8 * widest // (64 * 128)
