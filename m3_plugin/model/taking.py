"""Whether a config is one that this plugin serves exactly; every other is left to the host's class.

Both hosts choose a model's class by the architecture's name, and successors of M3 keep the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3_plugin.model.config import M3Config
from m3_plugin.model.mtp import mtp_config
from m3_plugin.model.vision import VisionConfig

_NO_VISION = "MiniMaxM3SparseForCausalLM"


def why_not_taken(config: Mapping[str, Any], *, draft: bool = False) -> str | None:
    """What keeps the plugin from serving a model of this config; None if nothing does.

    Parameters
    ----------
    config : parsed config.json, or what a host made of it
    draft : the model is the MTP module of such a checkpoint, or a checkpoint of that module alone
    """
    try:
        if draft:
            mtp_config(config, num_modules=1).require_paged_host()
            return None
        M3Config.from_hf(config).require_paged_host()
        architectures = config.get("architectures") or [None]
        if config.get("vision_config") and architectures[0] != _NO_VISION:
            VisionConfig.from_hf(config)
    except ValueError as error:
        return str(error)
    return None


def is_dspark(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a DSpark draft, as M3.1's repository has one in a folder `dspark/`.

    Parameters
    ----------
    config : parsed config.json, or what a host made of it, which may have renamed the architecture
    """
    text = config.get("text_config")
    keys = [*config, *(text if isinstance(text, Mapping) else ())]
    architectures = config.get("architectures") or ()
    return any(str(key).startswith("dspark_") for key in keys) or any(
        str(name).startswith("DSpark") for name in architectures
    )


def draft_refusal(asked: str, *, instead: str) -> ValueError:
    """The error for a draft that no MiniMax-M3 of this plugin can use.

    Parameters
    ----------
    asked : the option and its value
    instead : the way out, in the host's options
    """
    return ValueError(
        f"m3-plugin: {asked} is not served with MiniMax-M3: DSpark and DFlash drafts, M3.1's in "
        f"dspark/ among them, are left unread; {instead}"
    )


def stands_aside(host: str, reason: str) -> str:
    """The line logged where the host's own class takes a model over."""
    return (
        f"m3-plugin stands aside, {host}'s own class serves this model: {reason}. "
        "Set M3_PLUGIN_REQUIRED=1 to make this an error."
    )


def refusal(host: str, reason: str, *, required: bool) -> ValueError:
    """The error where the host has no class of its own, or the user will have this plugin's."""
    why = "M3_PLUGIN_REQUIRED=1 is set" if required else f"{host} has no class of its own for it"
    return ValueError(f"m3-plugin cannot serve this model exactly, and {why}: {reason}")
