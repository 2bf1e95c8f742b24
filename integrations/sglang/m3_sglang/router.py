"""The router of MiniMax-M3's experts: fp32 weights, bf16 rows, logits in fp32."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import Tensor, nn

from m3_plugin.model.config import M3Config
from m3_sglang.compat import few_rows_router

_PARTS = 3


class M3Router(ReplicatedLinear):
    """[tokens, hidden] -> fp32 logits [tokens, experts] of weights as the checkpoint has them.

    On a GPU no row is cast and no product is one of fp32: a weight is the sum of three bf16
    numbers, whose products with a bf16 row are exact in the fp32 that tensor cores add up in.
    SGLang's own M3 rounds the weights to bf16, which flips experts.

    Parameters
    ----------
    device_type : where the model will live; elsewhere than on "cuda", rows are cast to fp32
    """

    def __init__(self, config: M3Config, *, device_type: str, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=prefix,
        )
        self.parts: Tensor | None
        self.few_rows = None
        parts = None
        if device_type == "cuda":
            self.few_rows = few_rows_router()
            parts = torch.empty(
                _PARTS * config.num_experts, config.hidden_size, dtype=torch.bfloat16
            )
            self.quant_method = _SplitsRouter()
        # a buffer: SGLang keeps those while a sleeping server gives its weights up
        self.register_buffer("parts", parts, persistent=False)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits, and None for the bias, as of every linear layer of SGLang."""
        if self.parts is None or input_.dtype != torch.bfloat16:
            logits, _ = super().forward(input_.float())
            return logits, None
        if self.few_rows is not None:
            supported, product = self.few_rows
            if supported(input_, self.weight):
                return product(input_, self.weight), None
        return product_of_parts(input_, self.parts), None

    def finish_loading(self) -> None:
        """Split the weights anew, where graphs read the parts."""
        if self.parts is not None:
            self.parts.copy_(bf16_parts(self.get_parameter("weight")))


class _SplitsRouter(UnquantizedLinearMethod):
    """Splits weights that no loader of ours brought, as of a dummy load."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, M3Router)
        layer.finish_loading()


def bf16_parts(weight: Tensor) -> Tensor:
    """Three bf16 numbers whose sum is an fp32 one, largest first: [N, K] -> [3 * N, K].

    Exact for weights beyond 1e-33, whose last part is no subnormal number.
    """
    parts, rest = [], weight.float()
    for _ in range(_PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def product_of_parts(rows: Tensor, parts: Tensor) -> Tensor:
    """bf16 [T, K] times the weights that `bf16_parts` split: fp32 [T, N]; two launches."""
    products = torch.mm(rows, parts.t(), out_dtype=torch.float32)
    return products.unflatten(1, (_PARTS, -1)).sum(dim=1)
