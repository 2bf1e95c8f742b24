"""SGLang's names for what the checkpoint holds; `m3_plugin.checkpoint.loading` loads it."""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from m3_plugin.checkpoint.loading import Shard, WeightLoader, chosen_rewriter
from m3_plugin.checkpoint.names import (
    MTP_PREFIX,
    is_draft_tensor,
    is_of_stage,
    mtp_modules,
    text_modules,
)
from m3_plugin.checkpoint.witness import ExpertWitness
from m3_plugin.model.config import M3Config
from m3_sglang.compat import PipelineStage

FUSED: dict[str, tuple[str, Shard]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "index_q_proj": ("index_qkv_proj", "q"),
    "index_k_proj": ("index_qkv_proj", "k"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def text_weight_loader(
    model: nn.Module, *, config: M3Config, stage: PipelineStage, witness: ExpertWitness | None
) -> WeightLoader:
    """A loader for our causal LM.

    Parameters
    ----------
    model : our causal LM
    config : what the checkpoint promises
    stage : what of it is in this process
    witness : keeps what the proof of its experts needs
    """

    def is_elsewhere(name: str) -> bool:
        return not is_of_stage(
            name, layers=stage.layers, embedding=stage.is_first_rank, last=stage.is_last_rank
        )

    return _weight_loader(
        model,
        config=config,
        expected=text_modules(config),
        is_elsewhere=is_elsewhere,
        witness=witness,
    )


def mtp_weight_loader(model: nn.Module, *, config: M3Config) -> WeightLoader:
    """A loader for the MTP module alone; it passes over the target and over further modules.

    Parameters
    ----------
    model : our draft model
    config : the module as a model of its own (`m3_plugin.model.mtp.mtp_config`)
    """
    return _weight_loader(
        model,
        config=config,
        expected=mtp_modules(config, num_modules=1),
        is_foreign=lambda name: not name.startswith(f"{MTP_PREFIX}0."),
    )


def _weight_loader(
    model: nn.Module,
    *,
    config: M3Config,
    expected: frozenset[str],
    is_elsewhere: Callable[[str], bool] = lambda name: False,
    is_foreign: Callable[[str], bool] = is_draft_tensor,
    witness: ExpertWitness | None = None,
) -> WeightLoader:
    return WeightLoader(
        model,
        config=config,
        expected=expected,
        fused=FUSED,
        experts=FusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=config.num_experts,
        ),
        default_loader=default_weight_loader,
        rewriter=chosen_rewriter(model, config),
        is_elsewhere=is_elsewhere,
        is_foreign=is_foreign,
        witness=witness,
    )
