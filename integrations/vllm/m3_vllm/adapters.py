"""LoRA adapters in vLLM: which layers take them, and an adapter's names for those layers.

vLLM's own layers do the arithmetic. It puts them around every projection whose name it is given,
and asks the model for a mapper of an adapter's names; it passes over names that lead to no layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.platforms import current_platform

from m3_plugin.checkpoint.adapters import (
    adapted_modules,
    adapted_tensor,
    require_adapter_shapes,
    wanted_projections,
)
from m3_plugin.model.config import M3Config
from m3_vllm import cpu_repairs
from m3_vllm.quantization import StoredWeights

# vLLM's names of our fused layers, and what they are made of; `--lora-target-modules` may hold both
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "index_proj": ("index_q_proj", "index_k_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def takes_adapters(vllm_config: VllmConfig) -> bool:
    """Whether this server was started with `--enable-lora`."""
    return vllm_config.lora_config is not None


def choose_adapted_layers(
    vllm_config: VllmConfig, config: M3Config, *, prefix: str
) -> AdapterNames | None:
    """Have vLLM put its LoRA layers around the projections that take adapters, and no others.

    Left to itself it wraps routed experts, too, which it cannot on every device; and told a name
    without its layer it looks for it in the vision tower as well.

    Parameters
    ----------
    prefix : of the text model within what vLLM serves, with its dot

    Returns
    -------
    What translates an adapter's names for those layers; None without `--enable-lora`.

    Raises
    ------
    ValueError : `--lora-target-modules` names something else; or weights are multiplied as stored,
        around which vLLM has no LoRA layer.
    """
    lora = vllm_config.lora_config
    if lora is None:
        return None
    method = vllm_config.quant_config
    if method is not None and method.get_name() == StoredWeights.method:
        raise ValueError(
            "--enable-lora cannot be used with weights that a CPU multiplies as they are stored: "
            "vLLM's LoRA layers need plain ones; set M3_PLUGIN_DEQUANTIZE=1"
        )
    wanted = wanted_projections(lora.target_modules, fused=FUSED)
    names = set()
    for module in adapted_modules(config):
        parent, _, projection = module.rpartition(".")
        if projection in wanted:
            fused = next((name for name, parts in FUSED.items() if projection in parts), projection)
            # vLLM asks by the name of its layer, and by those of an adapter
            names |= {f"{prefix}{parent}.{name}" for name in (projection, fused)}
    lora.target_modules = sorted(names)
    refuse_other_shapes()
    if current_platform.is_cpu():
        cpu_repairs.leave_out_rows_without_adapter()
    return AdapterNames(config, prefix=prefix, targets=names)


def refuse_other_shapes() -> None:
    """Have tensors of an adapter for our model looked at when it is loaded; once, in a worker.

    vLLM copies what is smaller than a layer into a corner of it, and the rest counts as zero.
    """
    from vllm.lora.lora_model import LoRAModel

    theirs: Any = LoRAModel.from_lora_tensors
    if getattr(theirs, "looks_at_shapes", False):
        return

    def ours(cls: type[LoRAModel], *args: Any, **kwargs: Any) -> LoRAModel:
        mapper = kwargs.get("weights_mapper")
        if isinstance(mapper, AdapterNames):
            require_shapes(kwargs["tensors"], kwargs["peft_helper"], mapper.config)
        return theirs.__func__(cls, *args, **kwargs)

    ours.looks_at_shapes = True  # type: ignore[attr-defined]
    LoRAModel.from_lora_tensors = classmethod(ours)  # type: ignore[method-assign]


def require_shapes(tensors: Mapping[str, Tensor], peft: Any, config: M3Config) -> None:
    """Refuse an adapter whose tensors are not those of this model's projections.

    Parameters
    ----------
    tensors : by their names in the adapter's file
    peft : vLLM's `PEFTHelper` of the adapter; 0.31's knows one rank for all

    Raises
    ------
    ValueError : half of a pair is missing or has another shape.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        module, part = adapted_tensor(name, config)
        shapes.setdefault(module, {})[part] = tuple(tensor.shape)
        named = name.removeprefix("base_model.model.").removesuffix(f".{part}")
        rank_of = getattr(peft, "get_rank_and_scaling", None)
        ranks[module] = peft.r if rank_of is None else rank_of(named)[0]
    for module, found in shapes.items():
        require_adapter_shapes(module, found, rank=ranks[module], config=config)


@contextmanager
def without_adapters() -> Iterator[None]:
    """Build layers that take no adapters, as they would be built without `--enable-lora`.

    vLLM gives routed experts another kernel with it, which runs on no CPU.
    """
    vllm_config = get_current_vllm_config()
    if vllm_config.lora_config is None:
        yield
        return
    plain = copy.copy(vllm_config)
    plain.lora_config = None
    with set_current_vllm_config(plain):
        yield


class AdapterNames:
    """What vLLM takes for a model's `hf_to_vllm_mapper` while it reads an adapter.

    Parameters
    ----------
    config : of the model
    prefix : of the text model within what vLLM serves
    targets : names of all that takes adapters here (`choose_adapted_layers`)
    """

    def __init__(self, config: M3Config, *, prefix: str, targets: Collection[str]) -> None:
        self.config = config
        self.prefix = prefix
        self.targets = frozenset(targets)

    def get_rename_mapper(self) -> AdapterNames:
        """Itself: it does nothing but rename."""
        return self

    def map_name(self, name: str) -> str:
        """A tensor of an adapter -> the tensor of the layer that it changes.

        Raises
        ------
        ValueError : no layer that takes adapters has this name.
        """
        module, part = adapted_tensor(name, self.config)
        if f"{self.prefix}{module}" not in self.targets:
            raise ValueError(
                f"adapter module {module!r} is left out by --lora-target-modules; name "
                "its projection there, too"
            )
        return f"{self.prefix}{module}.{part}"

    # as vLLM 0.31 and 0.32 call it
    _map_name = map_name
