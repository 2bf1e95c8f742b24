"""vLLM's registry of models, asked per config: ours where we read every key, else vLLM's own.

The registry chooses by the architecture's name before anything of ours sees the config, and has no
hook. Its two methods that are given the config are therefore replaced on the one registry object;
everything else in vLLM, its cache of model facts included, goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from vllm.logger import init_logger

from m3_plugin.model.taking import (
    draft_refusal,
    is_dspark,
    refusal,
    stands_aside,
    why_not_taken,
)
from m3_plugin.settings import Settings

# Under vllm.* so that vLLM's own logging configuration shows it in every process.
logger = init_logger("vllm.m3_plugin.registry")

DRAFT_ARCHITECTURE = "MiniMaxM3MTP"
# What vLLM makes of it for methods that would read an M3 checkpoint as another model's draft.
_OTHER_DRAFTS = tuple(f"{method}{DRAFT_ARCHITECTURE}" for method in ("DFlash", "DSpark"))
INSTEAD_OF_DRAFT = "leave --speculative-config out, or draft with EAGLE3 or n-grams"
METHODS = ("inspect_model_cls", "resolve_model_cls")


def why_left_alone(hf_config: Any) -> str | None:
    """Why a model of one of our architectures is not ours to serve; None if it is."""
    architectures = getattr(hf_config, "architectures", None) or [None]
    draft = architectures[0] == DRAFT_ARCHITECTURE
    return why_not_taken(hf_config.to_dict(), draft=draft)


def choose_by_config(registry: Any, *, architectures: Collection[str], settings: Settings) -> None:
    """Let a registry answer with the classes it has now for configs that are not ours.

    Call it before our classes are registered.

    Parameters
    ----------
    registry : `vllm.model_executor.models.ModelRegistry`
    architectures : names under which our classes will be registered
    """
    own = type(registry)(dict(registry.models))
    for method in METHODS:
        setattr(
            registry,
            method,
            _choosing(
                getattr(registry, method),
                getattr(own, method),
                architectures=architectures,
                has_own=own.models.keys(),
                required=settings.required,
            ),
        )


def _choosing(
    ours: Callable[..., Any],
    hosts: Callable[..., Any],
    *,
    architectures: Collection[str],
    has_own: Collection[str],
    required: bool,
) -> Callable[..., Any]:
    def choose(asked: str | list[str], model_config: Any) -> Any:
        names = [asked] if isinstance(asked, str) else list(asked)
        if any(DRAFT_ARCHITECTURE in name for name in names):
            _require_no_other_draft(names, model_config)
        if not any(name in architectures for name in names):
            return ours(asked, model_config)
        reason = why_left_alone(model_config.hf_config)
        if reason is None:
            return ours(asked, model_config)
        if required or not any(name in has_own for name in names):
            raise refusal("vLLM", reason, required=required)
        logger.warning_once("%s", stands_aside("vLLM", reason))
        return hosts(asked, model_config)

    return choose


def _require_no_other_draft(names: Collection[str], model_config: Any) -> None:
    """Refuse a draft in MiniMax-M3's format that is no MTP module, before vLLM says it knows none.

    Raises
    ------
    ValueError : names the model that was to draft.
    """
    other = any(name in _OTHER_DRAFTS for name in names)
    if other or is_dspark(model_config.hf_config.to_dict()):
        asked = f"--speculative-config model {model_config.model}"
        raise draft_refusal(asked, instead=INSTEAD_OF_DRAFT)
