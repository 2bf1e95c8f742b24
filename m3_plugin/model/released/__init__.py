"""What is published about MiniMax-M3, so that its size can be worked out without a network.

`config.json` repeats the released configuration; `models.json` lists published repositories with
their `quantization_config`, shortened to what says how weights are stored; `gpus.json` holds the
memory nvidia-smi reports for a card. M3.1's configuration is made of M3's (docs/m31.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from m3_plugin.untrusted import read_json

_HERE = Path(__file__).parent
_M31 = "MiniMaxAI/MiniMax-M3.1-Flash"
_DRAFT_BYTES = {_M31: 2_301_867_426}
# What precedes the model in the hosts' command lines.
_MODEL_OPTIONS = ("serve", "--model", "--model-path")


class ModelNotFound(LookupError):
    """The model's description is nowhere to be found; the message says what to give instead."""


@dataclass(frozen=True)
class ModelSource:
    """A model's configuration and where it came from.

    Attributes
    ----------
    name : as the user gave it
    config : parsed config.json
    folder : the checkpoint's files, None if only the description is at hand
    """

    name: str
    config: dict[str, Any]
    folder: Path | None


@dataclass(frozen=True)
class Gpu:
    """A card: its memory in MiB as nvidia-smi reports it, and its architecture."""

    name: str
    memory_mib: int
    arch: str


@cache
def released_config() -> dict[str, Any]:
    """The released config.json; shared, so leave it as it is."""
    return json.loads((_HERE / "config.json").read_text())


@cache
def published_models() -> dict[str, dict[str, Any]]:
    """Repository -> its `quantization_config`, empty for the unquantised one."""
    return json.loads((_HERE / "models.json").read_text())


def published_draft_bytes(repository: str) -> int:
    """Bytes of a DSpark model in a folder of a published repository, which no host here reads."""
    return _DRAFT_BYTES.get(repository, 0)


def published_config(repository: str) -> dict[str, Any]:
    """The config of a published repository: M3's, with what is known to differ.

    Parameters
    ----------
    repository : one of `published_models`
    """
    quantization = published_models()[repository]
    config = dict(released_config())
    if quantization:
        config["quantization_config"] = quantization
    if repository == _M31:
        text = dict(config["text_config"])
        everywhere = [1] * text["num_hidden_layers"]
        text["sparse_attention_config"] = text["sparse_attention_config"] | {
            "sparse_attention_freq": everywhere,
            "sparse_disable_index_value": everywhere,
        }
        for key in ("num_mtp_modules", "num_nextn_predict_layers"):
            text.pop(key, None)
        config["text_config"] = text
    return config


@cache
def known_gpus() -> dict[str, Gpu]:
    """Cards by name."""
    listed = json.loads((_HERE / "gpus.json").read_text())
    return {name: Gpu(name=name, **entry) for name, entry in listed.items()}


def find_gpu(name: str) -> Gpu:
    """The card of that name, however it is spelt ("h200", "rtx pro 6000").

    Raises
    ------
    LookupError : lists the known names.
    """
    wanted = _letters(name)
    matches = [gpu for gpu in known_gpus().values() if _letters(gpu.name) == wanted]
    if not matches:
        starts = [gpu for gpu in known_gpus().values() if _letters(gpu.name).startswith(wanted)]
        if len(starts) == 1:
            return starts[0]
        hint = f" ({name} is {' or '.join(gpu.name for gpu in starts)})" if starts else ""
        raise LookupError(
            f"--gpu must be one of {', '.join(known_gpus())}{hint}; got {name!r}. "
            "Give --gpu-memory in GiB for any other card."
        )
    return matches[0]


def find_model(name: str) -> ModelSource:
    """A checkpoint folder, a config.json, a downloaded repository, or a published one by its id.

    A local path wins over an id. Nothing is downloaded.

    Raises
    ------
    ModelNotFound : nothing of that name; suggests the published id a gateway's name stands for.
    ValueError : a config.json that cannot be read as JSON.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return ModelSource(name, read_config(path), path.parent)
    if path.is_dir():
        return ModelSource(name, read_config(path / "config.json"), path)
    downloaded = _downloaded(name)
    if downloaded is not None:
        return ModelSource(name, read_config(downloaded / "config.json"), downloaded)
    if name in published_models():
        return ModelSource(name, published_config(name), None)
    suggestion = suggest(name)
    if suggestion is not None:
        raise ModelNotFound(f"no model {name!r} here; did you mean {suggestion}?")
    raise ModelNotFound(
        f"no model {name!r}: it is not a folder with a config.json, not in the Hugging Face cache "
        f"and not one of {', '.join(published_models())}"
    )


def misnamed_model(command_line: Sequence[str]) -> str | None:
    """What to say where a host is started with a gateway's name; None if there is nothing to say.

    The host itself would look such a repository up and not find it. A name that is only served
    (`--served-model-name minimax/m3`) is free.

    Parameters
    ----------
    command_line : of the server, as `sys.argv`
    """
    words = [part for word in command_line for part in word.split("=", 1)]
    for option, name in pairwise(words):
        if option in _MODEL_OPTIONS and suggest(name) not in (None, name):
            try:
                find_model(name)
            except ModelNotFound as error:
                return str(error)
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Parse a config.json.

    Raises
    ------
    ModelNotFound : no such file, or it may not be read.
    ValueError : not a JSON object.
    """
    try:
        config = read_json(path)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); was it written completely?") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(config).__name__}")
    return config


def suggest(name: str) -> str | None:
    """The published id behind a gateway's name such as "minimax/m3"; None if there is none.

    Names are compared by their letters and digits alone; the owner only has to say MiniMax. A path
    is no such name.
    """
    if name.startswith(("/", ".", "~")):
        return None
    letters = _letters(name.rpartition("/")[2])
    if "minimax" not in _letters(name) and letters not in ("m3", "m31"):
        return None
    letters = letters.removeprefix("minimaxai").removeprefix("minimax")
    for repository in published_models():
        own = _letters(repository.partition("/")[2]).removeprefix("minimax")
        # gateways leave "Flash" out, of which there is no other kind
        if letters in (own, own.removesuffix("flash")):
            return repository
    return None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _downloaded(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None
