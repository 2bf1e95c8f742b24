"""HiCache's files (`--hicache-storage-backend file`): pages of these weights, in this form.

SGLang keeps pages of K, V and index keys in files, which outlive the server and which others may
read. A file's name says the tokens, the served model's name and the rank, and its content says
nothing: pages of other weights, dtypes or layouts would be read as if they were right. What decides
their bytes is therefore put into the name; pages that were written otherwise are not found.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from m3_plugin.checkpoint.cache_scales import CacheScales
from m3_plugin.checkpoint.samples import digest
from m3_plugin.settings import Settings
from m3_sglang.hooks import apply_around
from m3_sglang.options import require_store

_ATTACH = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller"
    ".HybridCacheController.attach_storage_backend"
)

# the model of this process, whose weights the pages are of
_served: list[weakref.ref[nn.Module]] = []


def name_pages_by(model: nn.Module) -> None:
    """From now on name files of pages by this model's weights too; those are loaded later.

    Raises
    ------
    PluginRefusal : SGLang opens its store elsewhere by now.
    """
    _served[:] = [weakref.ref(model)]
    apply_around({_ATTACH: attach}, needed_for="--hicache-storage-backend")


def attach(
    original: Callable[..., Any],
    controller: Any,
    storage_backend: str,
    *args: Any,
    model_name: str | None = None,
    **kwargs: Any,
) -> Any:
    """AROUND hook of what opens the store, at the start or while the server runs.

    Raises
    ------
    ValueError : a store that was never run.
    """
    require_store(storage_backend)
    entries = controller.mem_pool_host.entries
    if torch.device(controller.device).type == "cpu":
        # nothing is pinned there, and SGLang would ask for a pinned page to read into
        for entry in entries:
            entry.host_pool.pin_memory = False
    model = _served[0]()
    assert model is not None
    name = f"{model_name or ''}-{form(entries)}-{digest(numbers_of(model))}"
    return original(controller, storage_backend, *args, model_name=name, **kwargs)


def numbers_of(model: nn.Module) -> dict[str, Tensor]:
    """What of a model decides its pages, by names: weights, and scales of an fp8 cache."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        scales = getattr(module, "cache_scales", CacheScales())
        for which, scale in (("k_scale", scales.k), ("v_scale", scales.v)):
            if scale is not None:
                found[f"{name}.{which}"] = scale
    return found


def form(entries: Iterable[Any]) -> str:
    """Eight hexadecimal digits of what decides the bytes of a page beside weights and tokens.

    Parameters
    ----------
    entries : SGLang's, of each pool whose pages go to files
    """
    settings = Settings.from_environment()
    pools = [
        (
            str(entry.name),
            str(entry.device_pool.dtype),
            str(entry.host_pool.dtype),
            entry.host_pool.layout,
            entry.host_pool.page_size,
            entry.host_pool.size_per_token,
        )
        for entry in entries
    ]
    said = repr((pools, settings.index_keys, settings.cache_values))
    return hashlib.sha256(said.encode()).hexdigest()[:8]
