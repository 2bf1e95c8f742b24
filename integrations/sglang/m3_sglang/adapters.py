"""LoRA adapters in SGLang: which layers take them, their shapes, and an adapter's names for them.

SGLang's own layers do the arithmetic, in its own batches and slots. It finds layers and tensors by
parts of names, under which an index projection counts as a main one and a shared expert as routed
ones; so it is told the names of the layers whole, and given tensors that are fused as these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA, QKVParallelLinearWithLoRA, unwrap_lora_layer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from m3_plugin.checkpoint.adapters import (
    ADAPTER_PARTS,
    adapted_modules,
    adapted_tensor,
    require_adapter_config,
    require_adapter_shapes,
    wanted_projections,
)
from m3_plugin.checkpoint.names import linear_shape
from m3_plugin.model.config import M3Config
from m3_sglang.hooks import apply_around
from m3_sglang.ours import FUSED_LAYERS

_MANAGER = "sglang.srt.lora.lora_manager.LoRAManager"
_POOL = "sglang.srt.lora.mem_pool.LoRAMemoryPool"
_ADAPTER = "sglang.srt.lora.lora.LoRAAdapter"


def fused_parts(layer: str) -> tuple[str, ...]:
    """Projections of the checkpoint that a layer of ours holds, in the order of its rows."""
    return FUSED_LAYERS.get(layer, (layer,))


def layer_of(module: str) -> str:
    """Our layer that holds a projection of the checkpoint."""
    parent, _, projection = module.rpartition(".")
    fused = (layer for layer, parts in FUSED_LAYERS.items() if projection in parts)
    return f"{parent}.{next(fused, projection)}"


def short_name(layer: str) -> str:
    """The end of a layer's name by which SGLang is told of it: `shared_experts.down_proj`."""
    return ".".join(layer.split(".")[-2:])


class AdaptedLayers:
    """Layers of one model that take adapters.

    Parameters
    ----------
    text : our causal LM, whose `model.layers` are the decoder layers
    config : of the model
    prefix : of `text` within what SGLang serves, with its dot
    targets : `--lora-target-modules`, None if left out
    """

    def __init__(
        self,
        text: nn.Module,
        config: M3Config,
        *,
        prefix: str,
        targets: Iterable[str] | None,
    ) -> None:
        self._text = text
        self.config = config
        self.prefix = prefix
        wanted = wanted_projections(targets, fused=FUSED_LAYERS)
        modules = [m for m in adapted_modules(config) if m.rpartition(".")[2] in wanted]
        self.modules = frozenset(modules)
        self.layers = frozenset(layer_of(module) for module in modules)
        self.names = frozenset(short_name(layer) for layer in self.layers)

    def takes(self, name: str) -> bool:
        """Whether SGLang is to put its LoRA layer around the module of this name."""
        return name.startswith(self.prefix) and name.removeprefix(self.prefix) in self.layers

    def find(self, short: str, layer: int) -> Any:
        """SGLang's linear of that short name in a decoder layer, None without it."""
        for parent in ("", "block_sparse_moe."):
            if (name := f"model.layers.{layer}.{parent}{short}") in self.layers:
                return unwrap_lora_layer(self._text.get_submodule(name))
        return None

    def shape_a(self, short: str, layer: int, *, rank: int) -> tuple[int, int]:
        """[rows, columns] of this rank's A of a layer; no columns without such a layer."""
        found = self.find(short, layer)
        rows = rank * stacked_parts(short)
        if found is None:
            return rows, 0
        return rows, getattr(found, "input_size_per_partition", found.input_size)

    def shape_b(self, short: str, layer: int, *, rank: int) -> tuple[int, int]:
        """[rows, columns] of this rank's B of a layer."""
        found = self.find(short, layer)
        if found is None:
            return 0, rank
        return getattr(found, "output_size_per_partition", found.output_size), rank

    def fuse(self, weights: dict[str, Tensor], *, rank: int) -> dict[str, Tensor]:
        """Tensors by projection -> tensors by layer, with zeros for parts that an adapter lacks.

        Parameters
        ----------
        weights : of one decoder layer, by `module.part` as of `adapted_tensor`
        rank : of the adapter

        Raises
        ------
        ValueError : a shape is not this model's, or half of a pair is missing.
        """
        by_module: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            part = next(part for part in ADAPTER_PARTS if name.endswith(f".{part}"))
            by_module.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
        for module, pair in by_module.items():
            shapes = {part: tuple(tensor.shape) for part, tensor in pair.items()}
            require_adapter_shapes(module, shapes, rank=rank, config=self.config)
        fused = {}
        for layer in sorted({layer_of(module) for module in by_module}):
            parent, _, short = layer.rpartition(".")
            modules = [f"{parent}.{projection}" for projection in fused_parts(short)]
            some = next(by_module[module] for module in modules if module in by_module)
            for part in ADAPTER_PARTS:
                fused[f"{layer}.{part}"] = torch.cat(
                    [
                        by_module[module][part]
                        if module in by_module
                        else _zeros(some[part], module, part, rank=rank, config=self.config)
                        for module in modules
                    ]
                )
        return fused


def _zeros(like: Tensor, module: str, part: str, *, rank: int, config: M3Config) -> Tensor:
    rows, columns = linear_shape(config, module)
    return like.new_zeros((rank, columns) if part == ADAPTER_PARTS[0] else (rows, rank))


def stacked_parts(short: str) -> int:
    """How many projections a layer holds, by its short name."""
    return len(fused_parts(short.rpartition(".")[2]))


class IndexProjectionWithLoRA(QKVParallelLinearWithLoRA):
    """Index query and key: SGLang's layer for q, k and v takes v to be as wide as k."""

    def __init__(self, base_layer: Any, lora_backend: Any) -> None:
        super().__init__(base_layer, lora_backend)
        self.output_offset = self.output_offset[:3]
        self.output_offset_cpu = self.output_offset_cpu[:3]

    def apply_lora(self, base_output: Tensor, x: Tensor) -> Tensor:
        return self.lora_backend.run_qkv_lora(
            x=x,
            qkv_lora_a=self.A_buffer_qkv,
            qkv_lora_b=self.B_buffer_qkv,
            base_output=base_output,
            output_offset=self.output_offset,
            output_offset_cpu=self.output_offset_cpu,
            max_qkv_out_dim=self.max_qkv_out_dim,
            n_slices=2,
        )

    def start_lora_a_overlap(self, x: Tensor) -> None:
        # its base class does not declare it
        backend: Any = self.lora_backend
        if backend.supports_lora_a_overlap:
            backend.start_lora_a_overlap(x, self.A_buffer_qkv, num_slices=2)


def choose_adapted_layers(
    root: nn.Module, text: nn.Module, config: M3Config, *, prefix: str
) -> None:
    """Have SGLang put its LoRA layers around the projections that take adapters, and no others.

    Parameters
    ----------
    root : what SGLang serves, with `--enable-lora`
    text : our causal LM within it, or `root` itself
    prefix : of `text` within `root`, with its dot
    """
    from sglang.srt.runtime_context import get_lora

    targets = get_lora().lora_target_modules
    adapted = AdaptedLayers(text, config, prefix=prefix, targets=targets)
    # past nn.Module; the last two are SGLang's own questions to a model
    for name, value in (
        ("adapted", adapted),
        ("should_apply_lora", adapted.takes),
        ("get_stacked_multiply", stacked_parts),
    ):
        object.__setattr__(root, name, value)
    apply_around(HOOKS, needed_for="LoRA adapters (--enable-lora)")
    if torch.get_default_device().type == "cpu":
        apply_around(HOOKS_ON_CPU, needed_for="LoRA adapters (--enable-lora) on a CPU")


def _adapted(model: Any) -> AdaptedLayers | None:
    return getattr(model, "adapted", None)


def settle_shapes(
    original: Callable[..., None],
    manager: Any,
    max_lora_rank: int | None = None,
    target_modules: Iterable[str] | None = None,
) -> None:
    """AROUND hook: names of our layers, not those that SGLang makes of an adapter's config."""
    if (adapted := _adapted(manager.base_model)) is None:
        original(manager, max_lora_rank=max_lora_rank, target_modules=target_modules)
        return
    manager.target_modules = set(adapted.names)
    ranks = [config.r for config in manager.configs.values()]
    manager.max_lora_rank = max(ranks, default=0) if max_lora_rank is None else max_lora_rank
    manager.lora_added_tokens_size = 0


def wrap_layer(
    original: Callable[..., BaseLayerWithLoRA], layer: Any, lora_backend: Any, **kwargs: Any
) -> BaseLayerWithLoRA:
    """AROUND hook: our LoRA layer around a layer that holds an index query and key."""
    if getattr(layer, "v_proj_shard_size", None) == 0:
        return IndexProjectionWithLoRA(layer, lora_backend)
    return original(layer, lora_backend, **kwargs)


def can_support(original: Callable[..., bool], pool: Any, config: Any) -> bool:
    """AROUND hook: an adapter's rank counts; its tensors' names were looked at one by one."""
    if _adapted(pool.base_model) is None:
        return original(pool, config)
    return config.r <= pool.max_lora_rank


def shape_of_a(
    original: Callable[..., Any], pool: Any, name: str, model: Any, rank: int, layer: int
) -> Any:
    """AROUND hook: [slots, rows, columns] of SGLang's buffer for A of a layer of ours."""
    if (adapted := _adapted(model)) is None:
        return original(pool, name, model, rank, layer)
    return (pool.max_loras_per_batch, *adapted.shape_a(name, layer, rank=rank))


def shape_of_b(
    original: Callable[..., Any], pool: Any, name: str, model: Any, rank: int, layer: int
) -> Any:
    """AROUND hook: [slots, rows, columns] of SGLang's buffer for B of a layer of ours."""
    if (adapted := _adapted(model)) is None:
        return original(pool, name, model, rank, layer)
    return (pool.max_loras_per_batch, *adapted.shape_b(name, layer, rank=rank))


def take_tensor(original: Callable[..., None], adapter: Any, name: str, tensor: Tensor) -> None:
    """AROUND hook: each tensor of an adapter is one of a layer that takes it, or refused.

    Raises
    ------
    ValueError : no layer takes it; SGLang would pass over it, or take it for another.
    """
    if (adapted := _adapted(adapter.base_model)) is None:
        original(adapter, name, tensor)
        return
    module, part = adapted_tensor(name, adapted.config)
    if module not in adapted.modules:
        raise ValueError(
            f"adapter module {module!r} is left out by --lora-target-modules; start the server "
            "with --lora-target-modules all"
        )
    layer = int(module.split(".")[2])
    adapter.layers[layer].weights[f"{module}.{part}"] = tensor.cpu()


def fuse_tensors(original: Callable[..., None], adapter: Any) -> None:
    """AROUND hook: an adapter's tensors by our layers, all looked at.

    Raises
    ------
    ValueError : the adapter's config says more of its tensors than SGLang reads, or a shape is
        wrong.
    """
    if (adapted := _adapted(adapter.base_model)) is None:
        original(adapter)
        return
    require_adapter_config(adapter.config.hf_config)
    for layer in adapter.layers:
        layer.weights = adapted.fuse(layer.weights, rank=adapter.config.r)


class UnpinnedMemory(TorchFunctionMode):
    """Memory asked for as pinned is plain: there is no accelerator to pin it for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.pin_memory:
            return args[0]
        kept = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kept)


def unpinned(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook for a CPU: SGLang's torch backend for adapters asks for pinned memory."""
    with UnpinnedMemory():
        return original(*args, **kwargs)


HOOKS = {
    f"{_MANAGER}.init_lora_shapes": settle_shapes,
    "sglang.srt.lora.lora_manager.get_lora_layer": wrap_layer,
    f"{_POOL}.can_support": can_support,
    f"{_POOL}.get_lora_A_shape": shape_of_a,
    f"{_POOL}.get_lora_B_shape": shape_of_b,
    f"{_ADAPTER}._process_weight": take_tensor,
    f"{_ADAPTER}._normalize_weights": fuse_tensors,
}
HOOKS_ON_CPU = {
    f"{_MANAGER}.{method}": unpinned
    for method in ("set_lora_module", "update_lora_info", "prepare_lora_batch")
}
