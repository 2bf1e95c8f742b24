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

from m3_plugin.checkpoint import TensorLedger, is_mtp_tensor
from m3_plugin.config import M3Config
from m3_plugin.quantization.formats import CACHE_SCALES
from m3_plugin.quantization.plan import WeightPlan, plan_checkpoint, require_in_proportion
from m3_plugin.quantization.stream import Dequantiser
from m3_plugin.released import ModelNotFound, find_model
from m3_plugin.settings import Settings
from m3_plugin.shards import indexed_tensors, shard_files

logger = logging.getLogger(__name__)

_EXPERT_NAME = re.compile(r"(experts\.\d+\.w[123]\.)")

Shard = str | int


@runtime_checkable
class FinishesLoading(Protocol):
    """A module that has something to do once all its tensors are there."""

    def finish_loading(self) -> None: ...


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
    scale_alias : the host's other name for a scale of a quantised cache, None if it has none
    is_elsewhere : whether a tensor belongs to another pipeline stage
    is_foreign : whether a tensor belongs to another model altogether
    rename : the host's spelling of a suffix
    dequantiser : turns quantised weights into plain ones on the way; None leaves them to the host
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        expected: frozenset[str],
        fused: Mapping[str, tuple[str, Shard]],
        experts: Iterable[tuple[str, str, int, str]],
        default_loader: Callable[..., None],
        scale_alias: Callable[[str, dict[str, nn.Parameter]], str | None],
        is_elsewhere: Callable[[str], bool] = lambda name: False,
        is_foreign: Callable[[str], bool] = is_mtp_tensor,
        rename: Callable[[str], str] = lambda name: name,
        dequantiser: Dequantiser | None = None,
    ) -> None:
        self.model = model
        self.ledger = TensorLedger(expected)
        self.parameters = dict(model.named_parameters())
        self.loaded: set[str] = set()
        self.unused_scales: list[str] = []
        self.fused = fused
        self.fused_name = re.compile(rf"\.({'|'.join(fused)})\.")
        self.experts = {
            weight: (parameter, expert, shard) for parameter, weight, expert, shard in experts
        }
        self.default_loader = default_loader
        self.scale_alias = scale_alias
        self.is_elsewhere = is_elsewhere
        self.is_foreign = is_foreign
        self.rename = rename
        self.dequantiser = dequantiser

    def load(self, name: str, tensor: Tensor) -> None:
        """Load one tensor; `name` is relative to the text model (`model...` or `lm_head...`).

        Raises
        ------
        ValueError : the model has no parameter for a tensor the config promises.
        """
        if self.is_foreign(name) or not self.ledger.add(name) or self.is_elsewhere(name):
            return
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

    def finish(self) -> set[str]:
        """Check completeness and let the modules bring their weights into kernel order.

        Returns
        -------
        names of the parameters that were loaded

        Raises
        ------
        ValueError : tensors missing or left over (`TensorLedger.require_complete`).
        """
        if self.dequantiser is not None:
            self.dequantiser.require_complete()
        self.ledger.require_complete()
        if self.unused_scales:
            logger.warning(
                "m3-plugin: %d scales of an fp8 KV cache, such as %s, have no place in this model; "
                "its cache has unit scale there",
                len(self.unused_scales),
                self.unused_scales[0],
            )
        for module in self.model.modules():
            if isinstance(module, FinishesLoading):
                module.finish_loading()
        return self.loaded

    def _load_parameter(
        self, name: str, target: str, tensor: Tensor, *args: object, **kwargs: object
    ) -> None:
        if target not in self.parameters:
            alias = self.scale_alias(target, self.parameters)
            if alias is None or alias not in self.parameters:
                if target.rpartition(".")[2] in CACHE_SCALES:
                    self.unused_scales.append(name)
                    return
                raise ValueError(
                    f"checkpoint tensor {name} has no counterpart in the model "
                    f"(looked for parameter {target}); is its quantisation in config.json?"
                )
            target = alias
        parameter = self.parameters[target]
        loader = getattr(parameter, "weight_loader", self.default_loader)
        loader(parameter, tensor, *args, **kwargs)
        self.loaded.add(target)


def plan_before_loading(
    name: str, config: M3Config, *, fused: Mapping[str, tuple[str, Shard]], item_bytes: int
) -> WeightPlan | None:
    """The plan of a checkpoint whose files are on this machine, None of any other.

    Parameters
    ----------
    name : folder, or id of a repository which may have been downloaded
    config : what its config.json says
    fused : as given to `WeightLoader`
    item_bytes : of the model's dtype

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
    )


def require_expert_bytes(
    plan: WeightPlan | None, experts: nn.Module, *, layer: int, share: float
) -> None:
    """Refuse routed experts for which the host allocated more than the files explain.

    Parameters
    ----------
    plan : None asks nothing
    experts : the host's module of a layer just built
    layer : its number
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
    require_in_proportion(
        plan, {f"model.layers.{layer}.block_sparse_moe.experts": allocated}, share=share
    )


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
