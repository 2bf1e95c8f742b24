"""Weights that change while vLLM serves: its layer-wise reload, with parts of any size.

vLLM puts a model that is to be reloaded on the meta device and brings each of its layers back once
all elements of it have arrived. What is missing of a layer at the end it leaves undefined, and a
load that fails leaves the model on meta. So tensors wait here until a layer is whole; what is left
over goes in place where the layer still has the order of the checkpoint, or is refused by name; a
refusal puts the old weights back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.checkpoint.finite import require_finite
from m3_plugin.checkpoint.loading import TakesCacheScales, WeightLoader
from m3_plugin.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES
from m3_plugin.checkpoint.stored_layers import StoredExperts, StoredLinear
from m3_plugin.checkpoint.stream import Dequantiser
from m3_plugin.checkpoint.updates import (
    LoadedForm,
    VisionWeights,
    Weights,
    checked,
    load_first,
    require_folder,
)
from m3_plugin.model.vision import M3Vision
from m3_vllm.moe import ClampProbe


class ServedWeights(nn.Module, AttentionLayerBase):
    """Loads a model's weights: whole at first, any part while it serves.

    A module of its own, attached last. vLLM calls `process_weights_after_loading` of layers that
    look like attention after all others, at the end of the first load and of each reload.

    Parameters
    ----------
    root : what vLLM loads, reloads and calls `load_weights` of
    text : makes a loader for the text part of it, or for the draft
    tower : its vision part, None without
    model_config : of the model; its folder changes with `reload_weights`
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        text: Callable[[], WeightLoader],
        tower: nn.Module | None = None,
        model_config: ModelConfig,
    ) -> None:
        super().__init__()
        # in a tuple so that the model is no part of itself
        self._root = (root,)
        self.text = text
        self.prefix = TEXT_PREFIX if hasattr(root, "language_model") else ""
        self._tower = (tower if isinstance(tower, M3Vision) else None,)
        self.model_config = model_config
        self.serves = False
        self.form = LoadedForm()
        self.packed: frozenset[str] = frozenset()
        self.waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.parts: dict[str, set[str]] = {}
        self.scales: dict[str, CacheScales] = {}
        # parameters of the text model that the update in progress has changed
        self.written: set[str] = set()

    def load(self, weights: Weights) -> set[str]:
        """Load tensors by the checkpoint's names; names of the parameters loaded.

        Raises
        ------
        ValueError : the first load lacks tensors; a later one brings some that this model cannot
            take, which leaves the old weights whole.
        """
        text, vision = self._loaders()
        if self.serves:
            return self._update(text, vision, weights)
        loaded = load_first(text, vision, weights, prefix=self.prefix)
        self.form.remember(self._text_parameters())
        return loaded

    def get_attn_backend(self) -> type[AttentionBackend]:
        raise NotImplementedError("weights attend to nothing")

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return None

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        """End a load: place what still waits, and have the experts proved again.

        Raises
        ------
        ValueError : tensors of a packed layer that never became whole, what serves is named; or
            numbers that are none.
        """
        # an error here must not leave this module open
        get_layerwise_info(self).reset()
        if not self.serves:
            self.serves = True
            self.packed = self.form.packed(self._text_parameters())
            return
        self._place_scales()
        self._place_left_over()
        self._require_finite()
        for module in self._root[0].modules():
            if isinstance(module, ClampProbe):
                module.run()

    def _require_finite(self) -> None:
        """Refuse what has become of numbers: vLLM leaves memory undefined where it counts wrongly.

        Raises
        ------
        ValueError : a parameter holds NaN or infinity.
        """
        written, self.written = self.written, set()
        parameters = self._text_parameters()
        require_finite(parameters, written & parameters.keys())

    def _loaders(self) -> tuple[WeightLoader, VisionWeights]:
        vision = VisionWeights(self._tower[0], default_loader=default_weight_loader)
        return self.text(), vision

    def _text_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._text_model().named_parameters())

    def _text_model(self) -> nn.Module:
        return getattr(self._root[0], "language_model", self._root[0])

    def _update(self, text: WeightLoader, vision: VisionWeights, weights: Weights) -> set[str]:
        root = self._root[0]
        by_host = is_reloading(root)
        if not by_host:
            self.waiting.clear()
            initialize_layerwise_reload(root)
        keep_stored_layers(root, self.model_config)
        text, vision = self._loaders()
        try:
            if getattr(root, "lora_manager", None) is not None:
                raise ValueError(
                    "weights cannot change in a server that takes LoRA adapters: vLLM's layers "
                    "around the projections hide them; leave out --enable-lora"
                )
            if not isinstance(weights, Collection):
                self._require_folder(text, vision)
            for name, tensor in checked(text, vision, weights):
                if name.startswith(VISION_PREFIXES):
                    vision.load(name, tensor)
                    continue
                for part, value in text.take(name.removeprefix(TEXT_PREFIX), tensor):
                    self._wait_for_layer(text, part, value)
            if not by_host:
                self._require_whole_if_packed(text)
            self._keep_scales(text)
            written = text.finish(partial=True)
            self.written |= written
        except BaseException:
            self.waiting.clear()
            self.scales.clear()
            put_old_weights_back(root, self.model_config)
            raise
        if not by_host:
            finalize_layerwise_reload(root, self.model_config)
        return vision.finish(partial=True) | {f"{self.prefix}{name}" for name in written}

    def _require_folder(self, text: WeightLoader, vision: VisionWeights) -> None:
        """Look at the files before a stream of their tensors begins, if they are here."""
        folder = Path(self.model_config.model)
        if folder.is_dir():
            require_folder(folder, text, vision)

    def _wait_for_layer(self, text: WeightLoader, name: str, tensor: Tensor) -> None:
        """Keep a tensor until its layer is whole, then hand the layer to vLLM."""
        layer = text.destination(name).layer
        if not self._can_wait(text):
            text.write(name, tensor)
            return
        # senders use their buffers again
        self.waiting[layer][name] = tensor.clone()
        if self.waiting[layer].keys() >= self._parts_of(text)[layer]:
            for part, value in self.waiting.pop(layer).items():
                text.write(part, value)

    def _can_wait(self, text: WeightLoader) -> bool:
        """Whether the tensors of a layer can be counted: of stored scales vLLM counts elements."""
        return text.config.quantization is None or isinstance(text.rewriter, Dequantiser)

    def _parts_of(self, text: WeightLoader) -> dict[str, set[str]]:
        if not self.parts:
            for module in text.ledger.expected - text.ledger.optional:
                name = module if module.endswith("_bias") else f"{module}.weight"
                if not text.is_elsewhere(name):
                    self.parts.setdefault(text.destination(name).layer, set()).add(name)
        return self.parts

    def _require_whole_if_packed(self, text: WeightLoader) -> None:
        """Refuse part of a packed layer where no more can follow.

        Raises
        ------
        ValueError : names what was sent, and what else the layer needs.
        """
        for layer, tensors in self.waiting.items():
            if self._is_packed(text, tensors):
                raise ValueError(self._part_of_packed(text, layer, tensors))

    def _part_of_packed(self, text: WeightLoader, layer: str, sent: Iterable[str]) -> str:
        missing = sorted(self._parts_of(text)[layer] - set(sent))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return (
            f"{min(sent)} is part of {layer}, which vLLM packs for its kernel on this device and "
            f"takes whole; send {', '.join(missing[:3])}{more} too, in the same call or between "
            "start_weight_update and finish_weight_update. The old weights of that layer serve"
        )

    def _is_packed(self, text: WeightLoader, names: Iterable[str]) -> bool:
        return any(text.destination(name).parameter in self.packed for name in names)

    def _keep_scales(self, text: WeightLoader) -> None:
        """Keep scales of MSA layers until vLLM has put those that serve back into their layers."""
        for name, module in text.model.named_modules():
            if isinstance(module, TakesCacheScales) and name in text.cache_scales:
                new, old = text.cache_scales.pop(name), self.scales.get(name, CacheScales())
                self.scales[name] = CacheScales(
                    old.k if new.k is None else new.k, old.v if new.v is None else new.v
                )

    def _place_scales(self) -> None:
        scales, self.scales = self.scales, {}
        if scales:
            text = self.text()
            text.cache_scales = scales
            text.finish(partial=True)

    def _place_left_over(self) -> None:
        waiting, self.waiting = self.waiting, defaultdict(dict)
        if not waiting:
            return
        text = self.text()
        refused = []
        for layer, tensors in waiting.items():
            if self._is_packed(text, tensors):
                refused.append(self._part_of_packed(text, layer, tensors))
                continue
            for name, tensor in tensors.items():
                text.write(name, tensor)
        if refused:
            more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
            raise ValueError(f"{refused[0]}{more}; all other tensors of the update serve")


def is_reloading(root: nn.Module) -> bool:
    """Whether vLLM has opened a layer-wise reload of this model."""
    return any(get_layerwise_info(module).can_load() for module in root.modules())


def keep_stored_layers(root: nn.Module, model_config: ModelConfig) -> None:
    """Take layers out of a layer-wise reload whose parameters keep the bytes of the files.

    Tensors are written into them where they lie. vLLM would lay memory out anew and hand it over
    once it has counted as many elements as the layer has, which are not those of the files.
    """
    for module in root.modules():
        method = getattr(module, "quant_method", None)
        stored = isinstance(method, StoredLinear) or isinstance(
            getattr(method, "experts", None), StoredExperts
        )
        info = get_layerwise_info(module)
        if stored and info.can_load():
            # nothing has been loaded, and nothing is missed
            info.load_numel_total = 0
            finalize_layerwise_reload(module, model_config)


def put_old_weights_back(root: nn.Module, model_config: ModelConfig) -> None:
    """End a layer-wise reload: layers that are not whole yet serve as they did before."""
    for module in root.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    finalize_layerwise_reload(root, model_config)
