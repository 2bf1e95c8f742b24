"""Official checkpoint tensors into a host's modules: nothing missing, nothing left over.

Both hosts fuse the same projections and give every parameter a `weight_loader`; they differ in the
names of the fused parameters and of the routed experts, which they hand in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from m3_plugin.checkpoint.cache_scales import CacheScales, cache_scale_name
from m3_plugin.checkpoint.headers import indexed_tensors, shard_files
from m3_plugin.checkpoint.names import TensorLedger, is_mtp_tensor
from m3_plugin.checkpoint.plan import (
    WeightPlan,
    plan_checkpoint,
    require_in_proportion,
)
from m3_plugin.checkpoint.stream import Dequantiser
from m3_plugin.checkpoint.witness import ExpertWitness
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import ModelNotFound, find_model
from m3_plugin.settings import Settings

logger = logging.getLogger(__name__)

# Channels of an expert that a host's kernels take at once: a rank's part is rounded up to them.
EXPERT_TILE = 128

_EXPERT_NAME = re.compile(r"(experts\.\d+\.w[123]\.)")

Shard = str | int


@runtime_checkable
class FinishesLoading(Protocol):
    """A module that has something to do once all its tensors are there."""

    def finish_loading(self) -> None: ...


@runtime_checkable
class TakesCacheScales(Protocol):
    """An attention module that stores K and V by itself, at the checkpoint's name for it."""

    def take_cache_scales(self, scales: CacheScales) -> None:
        """Scales of the whole layer, for all ranks; called once, without any for unit scale."""
        ...


class WeightLoader:
    """Loads a text model or its MTP modules tensor by tensor and accounts for every one of them.

    Parameters
    ----------
    model : the host's causal LM (holding `model` and `lm_head`)
    expected : modules that must be found (`text_modules`, `mtp_modules`)
    fused : checkpoint projection -> (the host's fused parameter, shard within it)
    experts : (parameter prefix, checkpoint prefix "experts.7.w1.", expert, shard) of each expert's
        matrix, as both hosts list them
    default_loader : for a parameter without a loader of its own
    is_elsewhere : whether a tensor belongs to another pipeline stage
    is_foreign : whether a tensor belongs to another model altogether
    rename : the host's spelling of a suffix
    dequantiser : turns quantised weights into plain ones on the way; None leaves them to the host
    witness : sees every tensor as it is stored
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        expected: frozenset[str],
        fused: Mapping[str, tuple[str, Shard]],
        experts: Iterable[tuple[str, str, int, str]],
        default_loader: Callable[..., None],
        is_elsewhere: Callable[[str], bool] = lambda name: False,
        is_foreign: Callable[[str], bool] = is_mtp_tensor,
        rename: Callable[[str], str] = lambda name: name,
        dequantiser: Dequantiser | None = None,
        witness: ExpertWitness | None = None,
    ) -> None:
        self.model = model
        self.ledger = TensorLedger(expected)
        self.parameters = dict(model.named_parameters())
        self.loaded: set[str] = set()
        self.cache_scales: dict[str, CacheScales] = {}
        self.fused = fused
        self.fused_name = re.compile(rf"\.({'|'.join(fused)})\.")
        self.experts = {
            weight: (parameter, expert, shard) for parameter, weight, expert, shard in experts
        }
        self.default_loader = default_loader
        self.is_elsewhere = is_elsewhere
        self.is_foreign = is_foreign
        self.rename = rename
        self.dequantiser = dequantiser
        self.witness = witness

    def load(self, name: str, tensor: Tensor) -> None:
        """Load one tensor; `name` is relative to the text model (`model...` or `lm_head...`).

        Raises
        ------
        ValueError : the model has no parameter for a tensor the config promises; a cache scale
            that is none.
        """
        if self.is_foreign(name) or self._is_cache_scale(name, tensor):
            return
        if not self.ledger.add(name) or self.is_elsewhere(name):
            return
        if self.witness is not None:
            self.witness.see(name, tensor)
        if self.dequantiser is not None:
            plain = self.dequantiser.take(name, tensor)
            if plain is None:
                return
            name, tensor = plain
        name = self.rename(name)
        if expert := _EXPERT_NAME.search(name):
            prefix, expert_id, shard = self.experts[expert.group(1)]
            target = name.replace(expert.group(1), prefix)
            self._load_parameter(name, target, tensor, target, shard_id=shard, expert_id=expert_id)
        elif fused := self.fused_name.search(name):
            module, part = self.fused[fused.group(1)]
            self._load_parameter(name, self.fused_name.sub(f".{module}.", name), tensor, part)
        else:
            self._load_parameter(name, name, tensor)

    def finish(self, *, partial: bool = False) -> set[str]:
        """Check completeness and let the modules bring their weights into kernel order.

        Parameters
        ----------
        partial : an update of a model that has all its weights, as trainers send them: some of the
            tensors, of which each must be known

        Returns
        -------
        names of the parameters that were loaded

        Raises
        ------
        ValueError : tensors missing or left over (`TensorLedger.require_complete`).
        """
        if self.dequantiser is not None:
            self.dequantiser.require_complete()
        self.ledger.require_complete(partial=partial)
        self._hand_out_cache_scales(partial=partial)
        for module in self.model.modules():
            if isinstance(module, FinishesLoading):
                module.finish_loading()
        return self.loaded

    def _load_parameter(
        self, name: str, target: str, tensor: Tensor, *args: object, **kwargs: object
    ) -> None:
        if target not in self.parameters:
            raise ValueError(
                f"checkpoint tensor {name} has no counterpart in the model "
                f"(looked for parameter {target}); is its quantisation in config.json?"
            )
        parameter = self.parameters[target]
        loader = getattr(parameter, "weight_loader", self.default_loader)
        loader(parameter, tensor, *args, **kwargs)
        self.loaded.add(target)

    def _is_cache_scale(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor scales an fp8 cache, and then keep it until all are there."""
        scale = cache_scale_name(name)
        if scale is None or not self.ledger.knows_attention(scale.attention):
            return False
        if scale.what != "unused" and not self.is_elsewhere(name):
            scales = self.cache_scales.get(scale.attention, CacheScales())
            self.cache_scales[scale.attention] = scales.with_scale(scale, tensor, tensor=name)
        return True

    def _hand_out_cache_scales(self, *, partial: bool) -> None:
        """Each layer its scales: those that store by themselves, and those of the host's own."""
        if partial and not self.cache_scales:
            return
        waiting = dict(self.cache_scales)
        for name, module in self.model.named_modules():
            if isinstance(module, TakesCacheScales) and (name in waiting or not partial):
                module.take_cache_scales(waiting.pop(name, CacheScales()))
        unplaced = [name for name, scales in waiting.items() if not self._to_host(name, scales)]
        found = len(self.cache_scales)
        logger.info(
            "m3-plugin: scales for an fp8 KV cache: %s",
            f"{found} layers have them in the checkpoint, others unit scale"
            if found
            else "none in the checkpoint, unit scale",
        )
        if unplaced:
            logger.warning(
                "m3-plugin: the scales of %d layers for an fp8 KV cache, such as those of %s, have "
                "no place in this model; its cache has unit scale there",
                len(unplaced),
                unplaced[0],
            )

    def _to_host(self, attention: str, scales: CacheScales) -> bool:
        """Give a dense layer's scales to the host's attention; whether it has a place for them."""
        places = {f"{attention}.attn.k_scale": scales.k, f"{attention}.attn.v_scale": scales.v}
        if not places.keys() <= self.parameters.keys():
            return False
        for target, scale in places.items():
            if scale is not None:
                # one scale for all heads must not saturate any
                one = self.parameters[target].numel() == 1
                self._load_parameter(target, target, scale.max().reshape(1) if one else scale)
        return True


def plan_before_loading(
    name: str,
    config: M3Config,
    *,
    fused: Mapping[str, tuple[str, Shard]],
    item_bytes: int,
    draft: bool = False,
) -> WeightPlan | None:
    """The plan of a checkpoint whose files are on this machine, None of any other.

    Parameters
    ----------
    name : folder, or id of a repository which may have been downloaded
    config : what its config.json says
    fused : as given to `WeightLoader`
    item_bytes : of the model's dtype
    draft : plan its MTP modules, of which `config` is that of `m3_plugin.model.mtp.mtp_config`

    Raises
    ------
    ValueError : what `plan_checkpoint` refuses; a repository not yet downloaded whole is no error.
    """
    try:
        folder = find_model(name).folder
        files = [] if folder is None else shard_files(folder)
    except (ModelNotFound, ValueError):
        if Path(name).is_dir() and indexed_tensors(Path(name)):
            raise
        return None
    if folder is None or not files:
        return None
    return plan_checkpoint(
        folder,
        config,
        fused={projection: layer for projection, (layer, _) in fused.items()},
        dequantise=Settings.from_environment().dequantize,
        item_bytes=item_bytes,
        draft=draft,
    )


def expert_share(intermediate_size: int, *, ranks: int) -> float:
    """Part of a layer's routed experts that one of so many ranks holds, padding included.

    Hosts that cut experts by channels round each rank's up to whole tiles, 192 to 256.

    Parameters
    ----------
    intermediate_size : channels of an expert
    ranks : that share the experts of a layer, by channels or expert by expert
    """
    if ranks == 1:
        return 1.0
    own = -(-intermediate_size // ranks)
    return -(-own // EXPERT_TILE) * EXPERT_TILE / intermediate_size


def require_expert_bytes(
    plan: WeightPlan | None, experts: nn.Module, *, layer: str, share: float
) -> None:
    """Refuse routed experts for which the host allocated more than the files explain.

    Parameters
    ----------
    plan : None asks nothing
    experts : the host's module of a layer just built
    layer : its name in the checkpoint, "model.layers.3"
    share : part of the experts' weights that is this rank's

    Raises
    ------
    ValueError : see `require_in_proportion`.
    """
    if plan is None:
        return
    allocated = sum(
        parameter.nbytes
        for name, parameter in experts.named_parameters()
        if name.rpartition(".")[2].startswith(("w13_", "w2_"))
    )
    require_in_proportion(plan, {f"{layer}.block_sparse_moe.experts": allocated}, share=share)


def chosen_dequantiser(config: M3Config) -> Dequantiser | None:
    """A dequantiser to load with, if the checkpoint is quantised and `M3_PLUGIN_DEQUANTIZE=1`."""
    if config.quantization is None or not Settings.from_environment().dequantize:
        return None
    return Dequantiser(config)


def interleave_gate_up(w13: Tensor) -> Tensor:
    """[experts, gates | ups, hidden] -> [experts, gate 0, up 0, gate 1, ..., hidden].

    The row order in which both hosts' CPU expert kernels read SwiGLU-OAI.
    """
    experts, rows, hidden = w13.shape
    halves = w13.view(experts, 2, rows // 2, hidden)
    return halves.transpose(1, 2).reshape(experts, rows, hidden).contiguous()
