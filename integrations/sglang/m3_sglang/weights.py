"""Official checkpoint names -> parameters of our modules, with nothing missing and nothing left."""

from __future__ import annotations

import re

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader, maybe_remap_kv_scale_name
from torch import Tensor, nn

from m3_plugin.checkpoint import TensorLedger, is_mtp_tensor, text_modules
from m3_plugin.config import M3Config
from m3_sglang.moe import M3MoE

# checkpoint module -> (our fused parameter, shard)
_FUSED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "index_q_proj": ("index_qkv_proj", "q"),
    "index_k_proj": ("index_qkv_proj", "k"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_FUSED_NAME = re.compile(rf"\.({'|'.join(_FUSED)})\.")
_EXPERT_NAME = re.compile(r"(experts\.\d+\.w[123]\.)")


class TextWeightLoader:
    """Loads the text model tensor by tensor and accounts for every one of them.

    Parameters
    ----------
    model : our causal LM (holding `model` and `lm_head`)
    config : what the checkpoint promises
    """

    def __init__(self, model: nn.Module, *, config: M3Config) -> None:
        self.model = model
        self.ledger = TensorLedger(text_modules(config))
        self.parameters = dict(model.named_parameters())
        self.loaded: set[str] = set()
        # "experts.7.w1." -> (our parameter prefix, expert, shard)
        self.experts = {
            weight: (parameter, expert, shard)
            for parameter, weight, expert, shard in FusedMoE.make_expert_params_mapping(
                ckpt_gate_proj_name="w1",
                ckpt_down_proj_name="w2",
                ckpt_up_proj_name="w3",
                num_experts=config.num_experts,
            )
        }

    def load(self, name: str, tensor: Tensor) -> None:
        """Load one tensor; `name` is relative to the text model (`model.…` or `lm_head.…`)."""
        if is_mtp_tensor(name) or not self.ledger.add(name):
            return
        if expert := _EXPERT_NAME.search(name):
            prefix, expert_id, shard = self.experts[expert.group(1)]
            target = name.replace(expert.group(1), prefix)
            self._load_parameter(name, target, tensor, target, shard_id=shard, expert_id=expert_id)
        elif fused := _FUSED_NAME.search(name):
            module, shard = _FUSED[fused.group(1)]
            self._load_parameter(name, _FUSED_NAME.sub(f".{module}.", name), tensor, shard)
        else:
            self._load_parameter(name, name, tensor)

    def finish(self) -> set[str]:
        """Check completeness and put expert weights into kernel order.

        Returns
        -------
        names of the parameters that were loaded

        Raises
        ------
        ValueError : tensors missing or left over (`TensorLedger.require_complete`).
        """
        self.ledger.require_complete()
        for module in self.model.modules():
            if isinstance(module, M3MoE):
                module.finish_loading()
        return self.loaded

    def _load_parameter(
        self, name: str, target: str, tensor: Tensor, *args: object, **kwargs: object
    ) -> None:
        if target not in self.parameters:
            # k_scale / v_scale of a quantised cache live under another name in SGLang
            remapped = maybe_remap_kv_scale_name(target, self.parameters)
            if remapped is None or remapped not in self.parameters:
                raise ValueError(
                    f"checkpoint tensor {name} has no counterpart in the model "
                    f"(looked for parameter {target}); is its quantisation in config.json?"
                )
            target = remapped
        parameter = self.parameters[target]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, tensor, *args, **kwargs)
        self.loaded.add(target)
