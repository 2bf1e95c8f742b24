"""Official checkpoint tensors into a host's modules: nothing missing, nothing left over.

Both hosts fuse the same projections and give every parameter a `weight_loader`; they differ in the
names of the fused parameters and of the routed experts, which they hand in.

The first load of a model must be whole. What changes weights while they serve is in
`m3_plugin.checkpoint.updates`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from m3_plugin.checkpoint.cache_scales import CacheScales, cache_scale_name
from m3_plugin.checkpoint.global_scales import GlobalScales
from m3_plugin.checkpoint.headers import indexed_tensors, shard_files
from m3_plugin.checkpoint.names import TensorLedger, is_draft_tensor, tensor_shape
from m3_plugin.checkpoint.plan import (
    WeightPlan,
    plan_checkpoint,
    require_in_proportion,
)
from m3_plugin.checkpoint.stored_layers import holds_stored_bytes
from m3_plugin.checkpoint.stream import SAFETENSORS_NAMES, Dequantiser, Packer, Rewriter
from m3_plugin.checkpoint.witness import ExpertWitness
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import ModelNotFound, find_model
from m3_plugin.quantization.dialects import PLAIN
from m3_plugin.quantization.formats import require_part
from m3_plugin.settings import Settings

logger = logging.getLogger(__name__)

# Channels of an expert that a host's kernels take at once: a rank's part is rounded up to them.
EXPERT_TILE = 128

_EXPERT_NAME = re.compile(r"(experts\.\d+\.w[123]\.)")

Shard = str | int


@runtime_checkable
class FinishesLoading(Protocol):
    """A module that has something to do once the tensors of a load are there."""

    def finish_loading(self) -> None: ...


@runtime_checkable
class ReopensLoading(FinishesLoading, Protocol):
    """A module whose `finish_loading` must be undone before a later load writes into it."""

    def start_loading(self) -> None: ...


@runtime_checkable
class TakesCacheScales(Protocol):
    """An attention module that stores K and V by itself, at the checkpoint's name for it."""

    def take_cache_scales(self, scales: CacheScales) -> None:
        """Scales of the whole layer, for all ranks; without any it has unit scale.

        Called after the first load, and after later ones with which scales of the layer came.
        """
        ...


@dataclass(frozen=True)
class Destination:
    """Where a tensor goes: the host's parameter, and the arguments of its `weight_loader`.

    Attributes
    ----------
    parameter : its name
    arguments, keywords : after parameter and tensor
    """

    parameter: str
    arguments: tuple[object, ...] = ()
    keywords: Mapping[str, object] = field(default_factory=dict)

    @property
    def layer(self) -> str:
        """The host's module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


class WeightLoader:
    """Loads a text model or its MTP modules tensor by tensor and accounts for every one of them.

    Parameters
    ----------
    model : the host's causal LM (holding `model` and `lm_head`)
    config : what the checkpoint says of itself
    expected : modules that must be found (`text_modules`, `mtp_modules`)
    fused : checkpoint projection -> (the host's fused parameter, shard within it)
    experts : (parameter prefix, checkpoint prefix "experts.7.w1.", expert, shard) of each expert's
        matrix, as both hosts list them
    default_loader : for a parameter without a loader of its own
    is_elsewhere : whether a tensor belongs to another pipeline stage
    is_foreign : whether a tensor belongs to another model altogether
    rename : the host's spelling of a suffix
    rewriter : changes quantised weights on the way; None leaves them to the host
    optional : of `expected`, modules that the host need not read for this rank
    witness : sees every tensor as it is stored
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: M3Config,
        expected: frozenset[str],
        fused: Mapping[str, tuple[str, Shard]],
        experts: Iterable[tuple[str, str, int, str]],
        default_loader: Callable[..., None],
        is_elsewhere: Callable[[str], bool] = lambda name: False,
        is_foreign: Callable[[str], bool] = is_draft_tensor,
        rename: Callable[[str], str] = lambda name: name,
        rewriter: Rewriter | None = None,
        optional: frozenset[str] = frozenset(),
        witness: ExpertWitness | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.ledger = TensorLedger(expected, optional)
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
        self.rewriter = rewriter
        self.witness = witness
        self.global_scales = GlobalScales(config.quantization, fused=rewriter is None)

    def load(self, name: str, tensor: Tensor) -> None:
        """Load one tensor; `name` is relative to the text model (`model...` or `lm_head...`).

        Raises
        ------
        ValueError : the model has no parameter for a tensor the config promises; a cache scale
            that is none.
        """
        for part, value in self.take(name, tensor):
            self.write(part, value)

    def take(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Account for one tensor; what is to be written now that it is here, perhaps nothing.

        Tensors of other stages or models are passed over, cache scales kept until `finish`, parts
        of a quantised weight until it is whole, if it is rewritten.
        """
        if self.is_foreign(name) or self._is_cache_scale(name, tensor):
            return []
        if not self.ledger.add(name) or self.is_elsewhere(name):
            return []
        self.global_scales.see(name, tensor)
        if self.witness is not None:
            self.witness.see(name, tensor)
        if self.rewriter is None:
            return [(name, tensor)]
        # a host that leaves experts of other ranks in the files brings their scales all the same
        if self.ledger.module_of(name) in self.ledger.optional:
            return []
        return self.rewriter.rewrite(name, tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Hand a tensor of those that `take` returned to the loader of the host's parameter."""
        self._load_parameter(name, self.destination(name), tensor)

    def destination(self, name: str) -> Destination:
        """Where a tensor of the checkpoint goes."""
        name = self.rename(name)
        if expert := _EXPERT_NAME.search(name):
            prefix, expert_id, shard = self.experts[expert.group(1)]
            target = name.replace(expert.group(1), prefix)
            return Destination(target, (target,), {"shard_id": shard, "expert_id": expert_id})
        if fused := self.fused_name.search(name):
            module, part = self.fused[fused.group(1)]
            return Destination(self.fused_name.sub(f".{module}.", name), (part,))
        return Destination(name)

    def require_known(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Refuse a tensor that is none of this model's, or of another shape; nothing is written.

        Parameters
        ----------
        name : relative to the text model
        shape, dtype : as stored, dtype by safetensors' name of it

        Raises
        ------
        ValueError : names the tensor, and what its shape must be.
        """
        if self.is_foreign(name):
            return
        scale = cache_scale_name(name)
        if scale is not None and self.ledger.knows_attention(scale.attention):
            heads = self.config.num_key_value_heads
            if scale.what != "unused" and math.prod(shape) not in (1, heads):
                raise ValueError(
                    f"tensor {name} must hold one scale or one for each of the {heads} KV heads; "
                    f"got shape {list(shape)}"
                )
            return
        module = self.ledger.module_of(name)
        if module is None:
            if self.ledger.is_unread(name):
                return
            raise ValueError(
                f"tensor {name} belongs to no module of this model; send tensors by the names the "
                "checkpoint has for them"
            )
        quantization = self.config.quantization
        weight = PLAIN if quantization is None else quantization.format_of(module)
        if weight != PLAIN:
            parts = weight.parts(*tensor_shape(self.config, module))
            require_part(weight, parts, tensor=name, dtype=dtype, shape=shape)
            return
        if name not in (module, f"{module}.weight"):
            raise ValueError(
                f"tensor {name} is no part of {module}, which this model holds unquantised; send "
                "its plain weight"
            )
        wanted = tensor_shape(self.config, module)
        if shape != wanted:
            raise ValueError(
                f"tensor {name} must have shape {list(wanted)} in this model; got {list(shape)}"
            )

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
        if not partial:
            self._require_whole_weights()
            self.ledger.require_complete()
        self._hand_out_cache_scales(partial=partial)
        for name, module in self.model.named_modules():
            if isinstance(module, FinishesLoading) and (not partial or self._wrote_into(name)):
                module.finish_loading()
        if partial:
            # last: what was written before must serve
            self.ledger.require_complete(partial=True)
            self._require_whole_weights()
        return self.loaded

    def _require_whole_weights(self) -> None:
        if self.rewriter is not None:
            self.rewriter.require_complete()

    def _wrote_into(self, module: str) -> bool:
        prefix = f"{module}." if module else ""
        return any(parameter.startswith(prefix) for parameter in self.loaded)

    def _load_parameter(self, name: str, destination: Destination, tensor: Tensor) -> None:
        target = destination.parameter
        if target not in self.parameters:
            raise ValueError(
                f"checkpoint tensor {name} has no counterpart in the model "
                f"(looked for parameter {target}); is its quantisation in config.json?"
            )
        parameter = self.parameters[target]
        loader = getattr(parameter, "weight_loader", self.default_loader)
        loader(parameter, tensor, *destination.arguments, **destination.keywords)
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
                value = scale.max().reshape(1) if one else scale
                self._load_parameter(target, Destination(target), value)
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


def chosen_rewriter(model: nn.Module, config: M3Config) -> Rewriter | None:
    """What to load a quantised checkpoint with; None leaves its tensors to the host.

    Plain weights with `M3_PLUGIN_DEQUANTIZE=1`, our own layout into a model that was built for it.
    """
    if config.quantization is None:
        return None
    if Settings.from_environment().dequantize:
        return Dequantiser(config)
    names = (name for name, _ in model.named_parameters())
    return Packer(config) if holds_stored_bytes(names) else None


def stored_as(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """Shape of a tensor, and what safetensors calls its dtype."""
    return tuple(tensor.shape), SAFETENSORS_NAMES.get(tensor.dtype, str(tensor.dtype))


def interleave_gate_up(w13: Tensor) -> Tensor:
    """[experts, gates | ups, hidden] -> [experts, gate 0, up 0, gate 1, ..., hidden].

    The row order in which both hosts' CPU expert kernels read SwiGLU-OAI.
    """
    experts, rows, hidden = w13.shape
    halves = w13.view(experts, 2, rows // 2, hidden)
    return halves.transpose(1, 2).reshape(experts, rows, hidden).contiguous()


def separate_gate_up(w13: Tensor) -> Tensor:
    """Undo `interleave_gate_up`: [experts, gate 0, up 0, ..., hidden] -> gates, then ups."""
    experts, rows, hidden = w13.shape
    pairs = w13.view(experts, rows // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(experts, rows, hidden).contiguous()
