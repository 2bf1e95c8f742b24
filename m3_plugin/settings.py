"""Every environment variable of the plugin, typed; nothing else in the project reads them.

| variable | values | effect |
|---|---|---|
| `M3_PLUGIN_DISABLE` | 0, 1 | 1: register nothing, the host runs as if the plugin were absent |
| `M3_PLUGIN_REQUIRED` | 0, 1 | 1: absence, refusal or fallback ends the process with the reason |
| `M3_PLUGIN_ALLOW_UNTESTED` | 0, 1 | 1: run on a host version outside the tested window |
| `M3_PLUGIN_STATISTICS` | 0, 1 | 1: count blocks read by MSA layers, in the host's /metrics |
| `M3_PLUGIN_TIMINGS` | 0, 1 | 1: time the MSA layers, in the host's /metrics; CPU only |
| `M3_PLUGIN_DEQUANTIZE` | 0, 1 | 1: quantised weights become plain ones while they are loaded |
| `M3_PLUGIN_RECORD_BLOCKS` | folder | sample the chosen blocks into it, for `m3-plugin blocks` |
| `M3_PLUGIN_INDEX_KEYS` | auto, int8 | int8: index keys in half the bytes, blocks may differ |
| `M3_PLUGIN_KERNELS` | auto, triton, native, torch, reference | force a kernel family |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast, get_args

PREFIX = "M3_PLUGIN_"

KernelFamily = Literal["auto", "triton", "native", "torch", "reference"]
IndexKeys = Literal["auto", "int8"]

_FLAGS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


@dataclass(frozen=True)
class Settings:
    """The plugin's environment variables after validation."""

    disable: bool = False
    required: bool = False
    allow_untested: bool = False
    statistics: bool = False
    timings: bool = False
    record_blocks: Path | None = None
    dequantize: bool = False
    index_keys: IndexKeys = "auto"
    kernels: KernelFamily = "auto"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read `M3_PLUGIN_*`; a misspelt name or value is an error, never silently ignored.

        Raises
        ------
        ValueError : unknown variable under the prefix, or a value outside its list.
        """
        given = {k.removeprefix(PREFIX): v for k, v in environment.items() if k.startswith(PREFIX)}
        known = {field.name.upper() for field in fields(cls)}
        for name in sorted(given.keys() - known):
            raise ValueError(
                f"unknown environment variable {PREFIX}{name}; "
                f"known: {', '.join(PREFIX + k for k in sorted(known))}"
            )
        return cls(
            disable=_flag(given, "DISABLE"),
            required=_flag(given, "REQUIRED"),
            allow_untested=_flag(given, "ALLOW_UNTESTED"),
            statistics=_flag(given, "STATISTICS"),
            timings=_flag(given, "TIMINGS"),
            record_blocks=Path(folder) if (folder := given.get("RECORD_BLOCKS")) else None,
            dequantize=_flag(given, "DEQUANTIZE"),
            index_keys=cast(IndexKeys, _choice(given, "INDEX_KEYS", get_args(IndexKeys))),
            kernels=cast(KernelFamily, _choice(given, "KERNELS", get_args(KernelFamily))),
        )


def _choice(given: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of a variable's values; the first of them if it is not set."""
    value = given.get(name) or choices[0]
    if value not in choices:
        raise ValueError(f"{PREFIX}{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def _flag(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "").strip().lower()
    if value not in _FLAGS:
        raise ValueError(f"{PREFIX}{name} must be 0 or 1; got {given[name]!r}")
    return _FLAGS[value]
