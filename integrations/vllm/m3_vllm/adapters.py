"""LoRA adapters in vLLM: which layers take them, and an adapter's names for those layers.

vLLM's own layers do the arithmetic. It puts them around every projection whose name it is given,
and asks the model for a mapper of an adapter's names; it passes over names that lead to no layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.platforms import current_platform

from m3_plugin.checkpoint.adapters import ADAPTED, adapted_module
from m3_plugin.model.config import M3Config
from m3_vllm import cpu_repairs

# vLLM's names of our fused layers, which `--lora-target-modules` may hold as well
_FUSED = ("qkv_proj", "index_proj", "gate_up_proj")
_PARTS = ("lora_A.weight", "lora_B.weight")


def takes_adapters(vllm_config: VllmConfig) -> bool:
    """Whether this server was started with `--enable-lora`."""
    return vllm_config.lora_config is not None


def choose_adapted_layers(vllm_config: VllmConfig) -> None:
    """Have vLLM put its LoRA layers around the projections that take adapters, and no others.

    Left to itself it wraps routed experts, too, which it cannot on every device.

    Raises
    ------
    ValueError : `--lora-target-modules` names something else.
    """
    lora = vllm_config.lora_config
    if lora is None:
        return
    wanted = ADAPTED if lora.target_modules is None else lora.target_modules
    strange = sorted(set(wanted) - {*ADAPTED, *_FUSED})
    if strange:
        raise ValueError(
            f"--lora-target-modules {' '.join(strange)}: adapters are taken by "
            f"{', '.join(ADAPTED)} of the text model; leave the others out"
        )
    lora.target_modules = list(wanted)
    if current_platform.is_cpu():
        cpu_repairs.leave_out_rows_without_adapter()


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
    """

    def __init__(self, config: M3Config, *, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def get_rename_mapper(self) -> AdapterNames:
        """Itself: it does nothing but rename."""
        return self

    def map_name(self, name: str) -> str:
        """A tensor of an adapter -> the tensor of the layer that it changes.

        Raises
        ------
        ValueError : no layer that takes adapters has this name.
        """
        for part in _PARTS:
            if name.endswith(f".{part}"):
                module = adapted_module(name.removesuffix(f".{part}"), self.config)
                return f"{self.prefix}{module}.{part}"
        raise ValueError(
            f"adapter tensor {name!r}: only lora_A and lora_B of projections are taken; save the "
            "adapter without modules_to_save and embeddings, or merge it into the weights"
        )

    # as vLLM 0.31 and 0.32 call it
    _map_name = map_name
