"""Which tensor goes where in which format, decided from config and file headers before any memory.

A quantised checkpoint that is read wrongly often runs: experts silently allocated in 16 bits, an
index branch quantised that was meant to stay exact, scales that belong to something else. The plan
puts the config's word, the files' headers and the host's fused layers side by side, and refuses
what does not agree. It reads headers only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from m3_plugin.checkpoint.cache_scales import cache_scale_name, require_cache_scales
from m3_plugin.checkpoint.headers import TensorHeader, indexed_tensors, read_checkpoint
from m3_plugin.checkpoint.names import (
    TEXT_PREFIX,
    VISION_PREFIXES,
    TensorLedger,
    is_draft_tensor,
    is_tensor_of_draft,
    layer_prefixes,
    linear_shape,
    mtp_modules,
    text_modules,
)
from m3_plugin.model.config import M3Config
from m3_plugin.quantization.dialects import (
    PLAIN,
    Quantization,
    is_index_projection,
    is_linear,
)
from m3_plugin.quantization.formats import (
    FLOAT_DTYPES,
    WeightFormat,
    require_all_parts,
    require_part,
)

# Planned over stored bytes. Padding and host layouts stay far below; a checkpoint of one byte per
# weight taken for 16 bits is at 2.
MAX_GROWTH = 1.3


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the text model.

    Attributes
    ----------
    module : name relative to the text model, as that of an MTP module is too
    file : which holds it, or the first of its tensors
    layer : the host's layer which takes it; several weights may share one
    weight : how it is stored
    stored_bytes : in the files, scales included
    planned_bytes : in memory, over all ranks and without replication
    """

    module: str
    file: str
    layer: str
    weight: WeightFormat
    stored_bytes: int
    planned_bytes: int


@dataclass(frozen=True)
class WeightPlan:
    """Everything the text model, or its draft, will hold.

    Attributes
    ----------
    weights : one entry per module of the checkpoint
    dequantised : whether quantised weights become plain ones while they are loaded
    cache_scales : names of the tensors that scale an fp8 KV cache
    """

    weights: tuple[PlannedWeight, ...]
    dequantised: bool
    cache_scales: tuple[str, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the text model in the files."""
        return sum(weight.stored_bytes for weight in self.weights)

    @property
    def planned_bytes(self) -> int:
        """Bytes of the text model in memory, over all ranks and without replication."""
        return sum(weight.planned_bytes for weight in self.weights)

    def describe(self) -> str:
        """One line for the log."""
        by_format: dict[str, int] = defaultdict(int)
        for weight in self.weights:
            by_format[weight.weight.name] += weight.stored_bytes
        stored = ", ".join(f"{size / 1e9:.3g} GB {name}" for name, size in by_format.items())
        line = f"{len(self.weights)} weights on disk: {stored}"
        if self.dequantised:
            line += f"; dequantised to {self.planned_bytes / 1e9:.3g} GB while loading"
        scales = len(self.cache_scales)
        return f"{line}; scales for an fp8 KV cache: {scales or 'none, unit scale'}"


def plan_checkpoint(
    folder: Path,
    config: M3Config,
    *,
    fused: Mapping[str, str],
    dequantise: bool,
    item_bytes: int = 2,
    draft: bool = False,
) -> WeightPlan:
    """Plan a checkpoint on disk.

    Parameters
    ----------
    folder : its files
    config : what its config.json says
    fused : the host's fused layers: projection -> layer, by their last name ("q_proj": "qkv_proj")
    dequantise : quantised weights become plain ones
    item_bytes : of the model's dtype
    draft : plan its MTP modules, of which `config` is that of `m3_plugin.model.mtp.mtp_config`

    Raises
    ------
    ValueError : a shard missing or cut short; a tensor missing, left over or not what the config
        says; differently stored weights in one fused layer; memory out of proportion to the files.
    """
    headers = read_checkpoint(folder)
    absent = indexed_tensors(folder)
    for header in headers:
        absent.pop(header.name, None)
    return plan_weights(
        headers,
        config,
        fused=fused,
        dequantise=dequantise,
        item_bytes=item_bytes,
        draft=draft,
        absent=absent,
    )


def plan_weights(
    headers: Iterable[TensorHeader],
    config: M3Config,
    *,
    fused: Mapping[str, str],
    dequantise: bool,
    item_bytes: int = 2,
    draft: bool = False,
    absent: Mapping[str, str] = MappingProxyType({}),
) -> WeightPlan:
    """`plan_checkpoint` for headers already read; other parameters and errors as there.

    Parameters
    ----------
    absent : tensors which the index promises and no file holds -> the file that should
    """
    quantization = config.quantization
    stored: dict[str, list[TensorHeader]] = defaultdict(list)
    cache_scales: list[TensorHeader] = []
    num_modules = config.num_hidden_layers if draft else 0
    ledger = TensorLedger(
        mtp_modules(config, num_modules=num_modules) if draft else text_modules(config)
    )
    for header in headers:
        name = header.name.removeprefix(TEXT_PREFIX)
        if draft:
            is_own = is_tensor_of_draft(name, num_modules=num_modules)
        else:
            is_own = not (name.startswith(VISION_PREFIXES) or is_draft_tensor(name))
        if not is_own:
            continue
        scale = cache_scale_name(name)
        if scale is not None and ledger.knows_attention(scale.attention):
            if scale.what != "unused":
                cache_scales.append(header)
        elif ledger.add(name):
            module = name.rpartition(".")[0]
            stored[name if name in ledger.expected else module].append(header)
    try:
        ledger.require_complete()
    except ValueError as error:
        places = [f"{name} should be in {file}" for name, file in absent.items()]
        raise ValueError(" ".join([str(error), *places[:3]])) from None
    weights = []
    for module, tensors in stored.items():
        weight = PLAIN if quantization is None else quantization.format_of(module)
        if weight == PLAIN:
            _require_plain(module, tensors, quantization)
        else:
            _require_parts(weight, module, tensors, config)
        stored_bytes = sum(tensor.num_bytes for tensor in tensors)
        weights.append(
            PlannedWeight(
                module=module,
                file=tensors[0].file,
                layer=_host_layer(module, fused),
                weight=weight,
                stored_bytes=stored_bytes,
                planned_bytes=math.prod(linear_shape(config, module)) * item_bytes
                if is_linear(module) and (dequantise or weight == PLAIN)
                else stored_bytes,
            )
        )
    require_cache_scales(cache_scales, num_kv_heads=config.num_key_value_heads)
    names = tuple(scale.name for scale in cache_scales)
    plan = WeightPlan(tuple(weights), dequantise, names)
    if not dequantise:
        _require_alike(plan)
    return plan


def index_is_alike(config: M3Config, *, dequantise: bool, draft: bool = False) -> bool:
    """Whether index projections may share a host's layer with q, k and v: all stored the same.

    Parameters
    ----------
    config, dequantise, draft : as for `plan_checkpoint`
    """
    quantization = config.quantization
    if quantization is None or dequantise:
        return True
    projections = ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj")
    return all(
        len({quantization.format_of(f"{layer}.self_attn.{p}") for p in projections}) == 1
        for layer, sparse in zip(
            layer_prefixes(config, draft=draft), config.sparse_layers, strict=True
        )
        if sparse
    )


def require_in_proportion(
    plan: WeightPlan, allocated: Mapping[str, int], *, share: float = 1.0
) -> None:
    """Refuse a host that allocates far more than the files hold, before the rest is allocated.

    Parameters
    ----------
    plan : of the checkpoint
    allocated : the host's layers built so far: layer of the plan -> bytes on this rank
    share : part of each layer's weights that is this rank's own

    Raises
    ------
    ValueError : some layer takes more than `MAX_GROWTH` times its bytes on disk.
    """
    planned: dict[str, int] = defaultdict(int)
    for weight in plan.weights:
        planned[weight.layer] += weight.planned_bytes
    for layer, size in allocated.items():
        expected = planned[layer] * share
        if size > MAX_GROWTH * expected:
            formats = {w.weight.name for w in plan.weights if w.layer == layer}
            raise ValueError(
                f"{layer} takes {size:,} bytes where its {', '.join(sorted(formats))} weights are "
                f"{expected:,.0f} on disk ({size / expected:.2f} times, at most {MAX_GROWTH}): the "
                "host did not recognise how the checkpoint is quantised. Check "
                "quantization_config, or set M3_PLUGIN_DEQUANTIZE=1 if memory suffices"
            )


def _host_layer(module: str, fused: Mapping[str, str]) -> str:
    """The host's layer: fused projections share one, the routed experts of a layer share one."""
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    parent, _, projection = module.rpartition(".")
    return f"{parent}.{fused[projection]}" if projection in fused else module


def _require_plain(
    module: str, tensors: list[TensorHeader], quantization: Quantization | None
) -> None:
    for tensor in tensors:
        is_weight = tensor.name.endswith((".weight", "e_score_correction_bias"))
        if is_weight and tensor.dtype in FLOAT_DTYPES:
            continue
        if quantization is None:
            reason = "config.json has no quantization_config"
        elif module in quantization.kept:
            reason = f"the {quantization.method} config keeps {module} unquantised"
        else:
            reason = f"the {quantization.method} config does not quantise {module}"
        consequence = (
            "; a quantised index branch chooses wrong blocks beyond the dense context"
            if is_index_projection(module)
            else ""
        )
        raise ValueError(
            f"tensor {tensor.name} in {tensor.file} is stored as {tensor.dtype}, but "
            f"{reason}{consequence}. Take config.json from the checkpoint's own repository"
        )


def _require_parts(
    weight: WeightFormat, module: str, tensors: list[TensorHeader], config: M3Config
) -> None:
    parts = weight.parts(*linear_shape(config, module))
    for tensor in tensors:
        require_part(
            weight,
            parts,
            tensor=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            file=tensor.file,
        )
    found = [tensor.name.rpartition(".")[2] for tensor in tensors]
    require_all_parts(weight, parts, module=module, found=found, file=tensors[0].file)


def _require_alike(plan: WeightPlan) -> None:
    """One fused layer of a host has one quantisation method."""
    first: dict[str, PlannedWeight] = {}
    for weight in plan.weights:
        other = first.setdefault(weight.layer, weight)
        if other.weight != weight.weight:
            raise ValueError(
                f"{weight.module} in {weight.file} is stored as {weight.weight.name} and "
                f"{other.module} in {other.file} as {other.weight.name}, but the host fuses both "
                f"into {weight.layer}, which has one method; set M3_PLUGIN_DEQUANTIZE=1 if memory "
                "suffices"
            )
