"""Weights that change while SGLang serves: parts of any size, and folders looked at before.

SGLang writes into parameters where they lie. A load that fails it undoes by loading again, from the
folder that has just failed, and an error of a bucket ends its scheduler; so everything is checked
before, and a refusal is answered instead of raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn

from m3_plugin.checkpoint.loading import WeightLoader
from m3_plugin.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES
from m3_plugin.checkpoint.updates import (
    LoadedForm,
    VisionWeights,
    Weights,
    holds_any,
    load_first,
    require_folder,
    update_in_place,
)
from m3_sglang.cache_files import name_pages_by
from m3_sglang.compat import has_cache_files, has_host_cache
from m3_sglang.hooks import apply_around

logger = logging.getLogger(__name__)

# what SGLang keeps in files is not emptied by an update
_PAGES_IN_FILES = (
    "weights cannot change while pages of the old ones go to files (--hicache-storage-backend): "
    "detach the store before (DELETE /hicache/storage-backend) and attach it again, or start anew"
)
# forms of a bucket that come as tensors by the checkpoint's names
_FORMS = (None, "flattened_bucket")


class ServedWeights(nn.Module):
    """Loads a model's weights: whole at first, any part while it serves.

    A module of its own, attached last: SGLang calls `quant_method.process_weights_after_loading` of
    each module in order, after the first load and after updates.

    Parameters
    ----------
    root : what SGLang calls `load_weights` of
    text : makes a loader for the text part of it, or for the draft
    tower : its vision part, None without
    is_draft : whether it drafts with MTP modules, which a target's folder may lack
    after_first : called with the loader of the first load once that is whole
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        text: Callable[[], WeightLoader],
        tower: nn.Module | None = None,
        is_draft: bool = False,
        after_first: Callable[[WeightLoader], None] = lambda loader: None,
    ) -> None:
        super().__init__()
        answer_refusals()
        if has_host_cache() and not is_draft:
            name_pages_by(root)
        self.is_draft = is_draft
        self.after_first = after_first
        # in tuples so that the model is no part of itself
        self._root = (root,)
        self._tower = (tower,)
        self.text = text
        self.prefix = TEXT_PREFIX if hasattr(root, "language_model") else ""
        self.serves = False
        self.form = LoadedForm()
        self.packed: frozenset[str] = frozenset()
        self.quant_method = _EndsLoading()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by the checkpoint's names; names of the parameters loaded.

        Raises
        ------
        ValueError : the first load lacks tensors; a later one brings some that this model cannot
            take.
        """
        text, vision = self.loaders()
        if not self.serves:
            loaded = load_first(text, vision, weights, prefix=self.prefix)
            self.form.remember(text.parameters)
            self.after_first(text)
            return loaded
        return update_in_place(text, vision, self._loadable(text, weights), prefix=self.prefix)

    def loaders(self) -> tuple[WeightLoader, VisionWeights]:
        """Fresh ones for one load."""
        vision = VisionWeights(self._tower[0], default_loader=default_weight_loader)
        return self.text(), vision

    def require_folder(self, folder: Path) -> None:
        """Refuse a checkpoint that cannot take the place of the one that serves.

        Raises
        ------
        ValueError : see `m3_plugin.checkpoint.updates.require_folder`.
        """
        text, vision = self.loaders()
        require_folder(folder, text, vision)
        self._require_loadable(text, text.parameters)

    def end_loading(self) -> None:
        """Note, after the first load, which parameters SGLang has packed for a kernel."""
        if not self.serves:
            self.packed = self.form.packed(self.loaders()[0].parameters)
            self.serves = True

    def _loadable(self, text: WeightLoader, weights: Weights) -> Weights:
        """The same tensors, refused where SGLang cannot bring a packed parameter back."""
        if not isinstance(weights, list):
            return weights
        targets = [
            text.destination(name.removeprefix(TEXT_PREFIX)).parameter
            for name, _ in weights
            if not name.startswith(VISION_PREFIXES)
        ]
        self._require_loadable(text, targets)
        return weights

    def _require_loadable(self, text: WeightLoader, targets: Iterable[str]) -> None:
        for target in targets:
            if target in self.packed and not self._is_reopened(text, target):
                raise ValueError(
                    f"SGLang has packed {target} for its kernel and cannot take it again; start "
                    "the server anew for these weights"
                )

    def _is_reopened(self, text: WeightLoader, target: str) -> bool:
        """Whether host or plugin bring a packed parameter back before a load."""
        layer = text.model.get_submodule(target.rpartition(".")[0])
        parent = text.model.get_submodule(target.rpartition(".")[0].rpartition(".")[0])
        method = type(getattr(layer, "quant_method", None))
        base = QuantizeMethodBase.restore_weights_before_loading
        restored = getattr(method, "restore_weights_before_loading", base) is not base
        return restored or getattr(parent, "is_interleaved", False)


class _EndsLoading:
    """Carries SGLang's after-loading call; owns no weights."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert isinstance(layer, ServedWeights)
        layer.end_loading()

    def restore_weights_before_loading(self, layer: nn.Module) -> None:
        """Nothing to restore."""


def answer_refusals() -> None:
    """Put our hooks around SGLang's updates; a release that has them elsewhere is left alone."""
    try:
        from sglang.srt.model_executor.model_runner_components import weight_updater
    except ImportError:
        logger.info("m3-plugin: this SGLang updates weights unguarded; a broken folder may end it")
        return
    hooks = {
        "update_weights_from_disk": refuse_folder,
        "update_weights_from_tensor": answer_refusal,
        "update_weights_from_distributed": answer_refusal,
        "load_weights_from_distributed": answer_refusal,
    }
    updater = weight_updater.WeightUpdater
    apply_around(
        {
            f"{weight_updater.__name__}.WeightUpdater.{method}": hook
            for method, hook in hooks.items()
            if hasattr(updater, method)
        },
        needed_for="weights that change while serving",
    )


def refuse_folder(original: Any, updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of an update from disk: a folder is looked at before anything is loaded."""
    served = getattr(_model_of(updater), "served", None)
    folder = Path(model_path)
    if isinstance(served, ServedWeights) and has_cache_files():
        return _refused(_PAGES_IN_FILES)
    if isinstance(served, ServedWeights) and folder.is_dir():
        try:
            if served.is_draft and not holds_any(folder, served.loaders()[0]):
                return True, f"{folder} holds no MTP weights: the draft stays as it is"
            served.require_folder(folder)
        except ValueError as error:
            return _refused(error)
    return _or_the_folder_before(original, updater, model_path, *args, **kwargs)


def _or_the_folder_before(
    original: Any, updater: Any, model_path: str, *args: Any, **kwargs: Any
) -> Any:
    """Load a folder; if that fails half way, as when a disk does, the one loaded before it.

    SGLang's own way back reads the folder that has just failed, and its scheduler ends.
    """
    before = updater.model_config.model_path
    try:
        success, message = original(updater, model_path, *args, **kwargs)
    except Exception as error:
        original(updater, before, *args, **kwargs)
        return _refused(f"{model_path}: {error}; the weights of {before} serve")
    if not success:
        # noted before anything was loaded
        updater.model_config.model_path = before
    return success, message


def answer_refusal(original: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of an update with tensors: what our loader refuses is the answer."""
    served = getattr(_model_of(updater), "served", None)
    if not isinstance(served, ServedWeights):
        return original(updater, *args, **kwargs)
    if has_cache_files():
        return _refused(_PAGES_IN_FILES)
    if (form := kwargs.get("load_format")) not in _FORMS:
        return _refused(
            f"load_format must be {_FORMS[1]} or left out for MiniMax-M3; got {form!r}: others "
            "write past the names of the checkpoint and what SGLang packed"
        )
    try:
        return original(updater, *args, **kwargs)
    except ValueError as error:
        return _refused(error)


def _model_of(updater: Any) -> Any:
    return updater.get_model()


def _refused(error: ValueError | str) -> tuple[bool, str]:
    message = f"m3-plugin: {error}"
    logger.warning("%s", message)
    return False, message
