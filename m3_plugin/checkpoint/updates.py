"""Weights that change while a model serves: what may come, and what is asked before a byte changes.

A model's first load must be whole; later ones bring any part of it, in any order, in buckets of any
size, by the names of the checkpoint. Names and shapes of a bucket are checked before any of it is
written, those of a folder from the headers of its files: a refusal leaves the old weights whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from m3_plugin.checkpoint.finite import require_finite, require_finite_files
from m3_plugin.checkpoint.headers import read_checkpoint, shard_files
from m3_plugin.checkpoint.loading import ReopensLoading, WeightLoader, stored_as
from m3_plugin.checkpoint.names import TEXT_PREFIX, VISION_PREFIXES, TensorLedger
from m3_plugin.checkpoint.samples import sample
from m3_plugin.model.config import M3Config
from m3_plugin.model.vision import CHECKPOINT_PREFIXES
from m3_plugin.untrusted import read_json

Weights = Iterable[tuple[str, Tensor]]


class VisionWeights:
    """Loads vision tower and projector; their modules are named as in the checkpoint.

    Parameters
    ----------
    tower : `M3Vision`; None passes over its tensors, as of a model served for text alone
    default_loader : of the host, for a parameter without a loader of its own
    """

    def __init__(self, tower: nn.Module | None, *, default_loader: Callable[..., None]) -> None:
        self.is_read = tower is not None
        named = () if tower is None else tower.named_parameters()
        self.parameters = {f"vision_tower.{name}": parameter for name, parameter in named}
        self.default_loader = default_loader
        self.loaded: set[str] = set()

    def require_known(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is none of the tower's, or of another shape; nothing is written.

        Raises
        ------
        ValueError : names the tensor, and what its shape must be.
        """
        if not self.is_read:
            return
        target = _tower_parameter(name)
        if target not in self.parameters:
            raise ValueError(f"checkpoint tensor {name} has no counterpart in the vision tower")
        wanted = tuple(self.parameters[target].shape)
        if shape != wanted:
            raise ValueError(
                f"tensor {name} must have shape {list(wanted)} in this model; got {list(shape)}"
            )

    def load(self, name: str, tensor: Tensor) -> None:
        """Load one tensor by its name in the checkpoint.

        Raises
        ------
        ValueError : see `require_known`.
        """
        if not self.is_read:
            return
        self.require_known(name, tuple(tensor.shape))
        target = _tower_parameter(name)
        parameter = self.parameters[target]
        getattr(parameter, "weight_loader", self.default_loader)(parameter, tensor)
        self.loaded.add(target)

    def finish(self, *, partial: bool = False) -> set[str]:
        """Names of what was loaded: everything, if the load was to be whole.

        Raises
        ------
        ValueError : tensors missing.
        """
        if not partial:
            require_no_missing(self.parameters.keys() - self.loaded)
        return self.loaded


def _tower_parameter(name: str) -> str:
    for checkpoint, ours in CHECKPOINT_PREFIXES.items():
        if name.startswith(checkpoint):
            return ours + name.removeprefix(checkpoint)
    # transformers 5 gives the tower's MLP the name of the text's experts when it saves a checkpoint
    return name.replace(".block_sparse_moe.fc", ".mlp.fc")


def require_no_missing(vision: Collection[str]) -> None:
    """Refuse a checkpoint that lacks tensors of the vision part.

    Raises
    ------
    ValueError : names the first few.
    """
    if vision:
        names = sorted(vision)
        raise ValueError(f"checkpoint lacks {len(names)} vision tensor(s): {', '.join(names[:5])}")


def load_first(
    text: WeightLoader, vision: VisionWeights, weights: Weights, *, prefix: str = ""
) -> set[str]:
    """Load a whole checkpoint into a model just built; names of the parameters loaded.

    Parameters
    ----------
    prefix : of the text part's parameters in the model

    Raises
    ------
    ValueError : tensors missing or left over, or weights that are NaN or infinite.
    """
    for name, tensor in weights:
        if name.startswith(VISION_PREFIXES):
            vision.load(name, tensor)
        else:
            text.load(name.removeprefix(TEXT_PREFIX), tensor)
    seen, told = vision.finish(), text.finish()
    require_finite(text.parameters, told)
    require_finite(vision.parameters, seen)
    return seen | {f"{prefix}{name}" for name in told}


def noting_names(weights: Weights, names: list[str]) -> Weights:
    """The same tensors; their names are in `names` once they have been taken."""
    for name, tensor in weights:
        names.append(name)
        yield name, tensor


def require_known(text: WeightLoader, vision: VisionWeights, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that this model cannot take.

    Raises
    ------
    ValueError : names it.
    """
    if name.startswith(VISION_PREFIXES):
        vision.require_known(name, tuple(tensor.shape))
    else:
        text.require_known(name.removeprefix(TEXT_PREFIX), *stored_as(tensor))


def checked(text: WeightLoader, vision: VisionWeights, weights: Weights) -> Weights:
    """The same tensors: a bucket checked as a whole, a stream tensor by tensor as it comes.

    Raises
    ------
    ValueError : a tensor that this model cannot take, or that is NaN or infinite somewhere; of a
        bucket, before any is given out.
    """
    if isinstance(weights, Collection):
        for name, tensor in weights:
            _require_takeable(text, vision, name, tensor)
        return weights
    return _checked_stream(text, vision, weights)


def _checked_stream(text: WeightLoader, vision: VisionWeights, weights: Weights) -> Weights:
    for name, tensor in weights:
        _require_takeable(text, vision, name, tensor)
        yield name, tensor


def _require_takeable(text: WeightLoader, vision: VisionWeights, name: str, tensor: Tensor) -> None:
    require_known(text, vision, name, tensor)
    require_finite({name: tensor}, [name])


def update_in_place(
    text: WeightLoader, vision: VisionWeights, weights: Weights, *, prefix: str = ""
) -> set[str]:
    """Write any part of a checkpoint into a model that serves; names of the parameters written.

    For hosts whose parameters keep the order of the checkpoint, but for what `ReopensLoading`
    modules do to them.

    Parameters
    ----------
    prefix : of the text part's parameters in the model

    Raises
    ------
    ValueError : a tensor that this model cannot take.
    """
    opened: dict[str, ReopensLoading] = {
        name: module
        for name, module in text.model.named_modules()
        if isinstance(module, ReopensLoading)
    }
    try:
        for name, tensor in checked(text, vision, weights):
            if name.startswith(VISION_PREFIXES):
                vision.load(name, tensor)
                continue
            for part, value in text.take(name.removeprefix(TEXT_PREFIX), tensor):
                target = text.destination(part).parameter
                for module in [module for module in opened if target.startswith(f"{module}.")]:
                    opened.pop(module).start_loading()
                    text.parameters = dict(text.model.named_parameters())
                text.write(part, value)
    finally:
        written = text.finish(partial=True)
    return vision.finish(partial=True) | {f"{prefix}{name}" for name in written}


def require_folder(folder: Path, text: WeightLoader, vision: VisionWeights) -> None:
    """Refuse a checkpoint on disk that cannot take the place of the one that serves.

    Parameters
    ----------
    folder : its files; their headers are read first, then every tensor once
    text, vision : loaders of the model that serves

    Raises
    ------
    ValueError : a shard missing or cut short; tensors missing, left over, of other shapes, or NaN
        or infinite somewhere; a config.json that quantises otherwise.
    """
    _require_same_quantisation(folder, text.config)
    ledger = TensorLedger(text.ledger.expected)
    seen: set[str] = set()
    for header in read_checkpoint(folder):
        if header.name.startswith(VISION_PREFIXES):
            vision.require_known(header.name, header.shape)
            seen.add(_tower_parameter(header.name))
            continue
        name = header.name.removeprefix(TEXT_PREFIX)
        text.require_known(name, header.shape, header.dtype)
        if not text.is_foreign(name):
            ledger.add(name)
    ledger.leftover.clear()  # cache scales; anything else was refused above
    ledger.require_complete()
    require_no_missing(vision.parameters.keys() - seen)
    # a host that finds out half way has half of them in place
    require_finite_files(shard_files(folder))


def _require_same_quantisation(folder: Path, served: M3Config) -> None:
    file = folder / "config.json"
    if not file.exists():
        return
    new = M3Config.from_hf(read_json(file)).quantization
    old = served.quantization
    if (new and new.method) != (old and old.method):
        raise ValueError(
            f"{folder} is stored as {new.method if new else 'plain weights'}, the model that "
            f"serves as {old.method if old else 'plain weights'}; start a server for it"
        )


def holds_any(folder: Path, text: WeightLoader) -> bool:
    """Whether a checkpoint on disk holds any tensor of the model, as a draft's may not.

    Raises
    ------
    ValueError : a shard missing or cut short.
    """
    names = [header.name.removeprefix(TEXT_PREFIX) for header in read_checkpoint(folder)]
    return any(text.ledger.module_of(name) and not text.is_foreign(name) for name in names)


class LoadedForm:
    """Remembers parameters as they were loaded, to tell which ones a host then packed.

    A parameter that still has its shape and its bits takes later tensors in place; one that a
    kernel's own order was made of does not. A few numbers of each are compared.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[torch.Size, torch.dtype, Tensor]] = {}

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take note of parameters just loaded, before the host processes them."""
        self._loaded = {name: self._form(parameter) for name, parameter in parameters.items()}

    def packed(self, parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
        """Names of those that are no longer as they were loaded, or never were (dummy weights)."""
        return frozenset(
            name
            for name, parameter in parameters.items()
            if not self._is_as_loaded(name, parameter)
        )

    def _is_as_loaded(self, name: str, parameter: Tensor) -> bool:
        if name not in self._loaded:
            return False
        shape, dtype, bits = self._loaded[name]
        if (parameter.shape, parameter.dtype) != (shape, dtype):
            return False
        return torch.equal(sample(parameter), bits)

    def _form(self, parameter: Tensor) -> tuple[torch.Size, torch.dtype, Tensor]:
        return parameter.shape, parameter.dtype, sample(parameter)
