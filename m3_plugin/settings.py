"""Every environment variable of the plugin, typed; nothing else in the project reads them.

| variable | values | effect |
|---|---|---|
| `M3_PLUGIN_DISABLE` | 0, 1 | 1: register nothing, the host runs as if the plugin were absent |
| `M3_PLUGIN_REQUIRED` | 0, 1 | 1: a plugin that is loaded and would stand aside ends the process |
| `M3_PLUGIN_ALLOW_UNTESTED` | 0, 1 | 1: run on a host version outside the tested window |
| `M3_PLUGIN_STATISTICS` | 0, 1 | 1: count blocks read by MSA layers, in the host's /metrics |
| `M3_PLUGIN_TIMINGS` | 0, 1 | 1: time the MSA layers, in the host's /metrics; CPU only |
| `M3_PLUGIN_CHECK` | 0, 1, n | n: look at pages, choices and results of every n-th step |
| `M3_PLUGIN_DEQUANTIZE` | 0, 1 | 1: quantised weights become plain ones while they are loaded |
| `M3_PLUGIN_RECORD_BLOCKS` | folder | sample the chosen blocks into it, for `m3-plugin blocks` |
| `M3_PLUGIN_VERIFY_TRANSFER` | folder | look up rows of caches that came from another server |
| `M3_PLUGIN_INDEX_KEYS` | auto, int8, planes | int8: half the bytes; planes: half are read (CPU) |
| `M3_PLUGIN_INDEX_SHARING` | off, scan | scan: ranks share out the scan of long contexts (CPU) |
| `M3_PLUGIN_INDEX_SHARING_FROM` | tokens | of a step whose scan is shared, 200000 at least |
| `M3_PLUGIN_CACHE_VALUES` | auto, nvfp4 | nvfp4: MSA's caches hold numbers of NVFP4 |
| `M3_PLUGIN_DENSE` | auto, host | host: dense layers on a CPU stay on the host's own kernels |
| `M3_PLUGIN_PRODUCTS` | auto, host, own | who multiplies plain weights of 16 bits on a CPU |
| `M3_PLUGIN_KERNELS` | auto, flashinfer, triton, native, torch, reference | force kernels |

A plugin that no host loads (another environment, an allow-list without it) checks nothing, REQUIRED
neither: `m3-plugin doctor` before the start, or an alert on `absent(m3_plugin:info)`, sees that.

Other names under the prefix are mistakes, which end a start that would serve MiniMax-M3 through the
plugin and are warned of in any other. Names that Kubernetes gives to every container of a namespace
with a Service called `m3-plugin` (`M3_PLUGIN_SERVICE_HOST`, `M3_PLUGIN_PORT_8000_TCP_ADDR`, ...)
are no mistakes and are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast, get_args

PREFIX = "M3_PLUGIN_"

KernelFamily = Literal["auto", "flashinfer", "triton", "native", "torch", "reference"]
IndexKeys = Literal["auto", "int8", "planes"]
IndexSharing = Literal["off", "scan"]
CacheValues = Literal["auto", "nvfp4"]
DenseLayers = Literal["auto", "host"]
Products = Literal["auto", "host", "own"]

_FLAGS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
# What Kubernetes, and Docker before it, derive from the name of a Service and its ports. A Service
# whose name only begins alike (m3-plugin-gateway) gets the prefix too.
_SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


@dataclass(frozen=True)
class Settings:
    """The plugin's environment variables after validation."""

    disable: bool = False
    required: bool = False
    allow_untested: bool = False
    statistics: bool = False
    timings: bool = False
    check: int = 0
    record_blocks: Path | None = None
    verify_transfer: Path | None = None
    dequantize: bool = False
    index_keys: IndexKeys = "auto"
    index_sharing: IndexSharing = "off"
    index_sharing_from: int = 200_000
    cache_values: CacheValues = "auto"
    dense: DenseLayers = "auto"
    products: Products = "auto"
    kernels: KernelFamily = "auto"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read `M3_PLUGIN_*` where M3 is served: a mistake is an error, never silently ignored.

        Raises
        ------
        ValueError : unknown variable under the prefix, a value outside its list, or DISABLE
            together with REQUIRED.
        """
        settings, mistakes = cls.read(environment)
        if mistakes and not settings.disable:
            raise ValueError("; ".join(mistakes))
        return settings

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> tuple[Settings, tuple[str, ...]]:
        """Read `M3_PLUGIN_*` where nobody knows yet which model is served.

        Returns
        -------
        The settings, with the default where a value is a mistake, and every mistake in words.

        Raises
        ------
        ValueError : DISABLE together with REQUIRED: there is no start that both allow.
        """
        given = {k.removeprefix(PREFIX): v for k, v in environment.items() if k.startswith(PREFIX)}
        mistakes: list[str] = []
        disable = _flag(given, "DISABLE", mistakes)
        required = _flag(given, "REQUIRED", mistakes)
        if disable and required:
            raise ValueError(
                f"{PREFIX}DISABLE=1 and {PREFIX}REQUIRED=1 contradict each other: the first keeps "
                "the plugin out, the second ends a server without it; unset one of them"
            )
        known = {field.name.upper() for field in fields(cls)}
        for name in sorted(given.keys() - known):
            if not _SERVICE_LINK.fullmatch(name):
                mistakes.append(
                    f"unknown environment variable {PREFIX}{name}; "
                    f"known: {', '.join(PREFIX + k for k in sorted(known))}"
                )
        settings = cls(
            disable=disable,
            required=required,
            allow_untested=_flag(given, "ALLOW_UNTESTED", mistakes),
            statistics=_flag(given, "STATISTICS", mistakes),
            timings=_flag(given, "TIMINGS", mistakes),
            check=_steps(given, "CHECK", mistakes),
            record_blocks=Path(folder) if (folder := given.get("RECORD_BLOCKS")) else None,
            verify_transfer=_shared_folder(given, "VERIFY_TRANSFER", mistakes),
            dequantize=_flag(given, "DEQUANTIZE", mistakes),
            index_keys=cast(IndexKeys, _choice(given, "INDEX_KEYS", get_args(IndexKeys), mistakes)),
            index_sharing=cast(
                IndexSharing, _choice(given, "INDEX_SHARING", get_args(IndexSharing), mistakes)
            ),
            index_sharing_from=_tokens(given, "INDEX_SHARING_FROM", mistakes),
            cache_values=cast(
                CacheValues, _choice(given, "CACHE_VALUES", get_args(CacheValues), mistakes)
            ),
            dense=cast(DenseLayers, _choice(given, "DENSE", get_args(DenseLayers), mistakes)),
            products=cast(Products, _choice(given, "PRODUCTS", get_args(Products), mistakes)),
            kernels=cast(KernelFamily, _choice(given, "KERNELS", get_args(KernelFamily), mistakes)),
        )
        return settings, tuple(mistakes)


def service_links(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Variables under our prefix that an orchestrator derived from the name of a Service."""
    return tuple(
        name
        for name in sorted(environment)
        if name.startswith(PREFIX) and _SERVICE_LINK.fullmatch(name.removeprefix(PREFIX))
    )


def remarks(mistakes: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """What a host should log about the variables when it loads the plugin, a line each.

    Parameters
    ----------
    mistakes : as `Settings.read` found them
    """
    said = [f"{mistake}. A start that serves MiniMax-M3 ends with this" for mistake in mistakes]
    for first in service_links(environment)[:1]:
        more = len(service_links(environment)) - 1
        others = f" and {more} more" if more else ""
        said.append(
            f"ignored: {first}{others}. Kubernetes sets them for a Service whose name begins "
            "with m3-plugin; enableServiceLinks: false turns that off"
        )
    return said


def _choice(
    given: Mapping[str, str], name: str, choices: tuple[str, ...], mistakes: list[str]
) -> str:
    """One of a variable's values; the first of them if it is not set or set to anything else."""
    value = given.get(name) or choices[0]
    if value in choices:
        return value
    mistakes.append(f"{PREFIX}{name} must be one of {', '.join(choices)}; got {value!r}")
    return choices[0]


def _steps(given: Mapping[str, str], name: str, mistakes: list[str]) -> int:
    value = given.get(name, "").strip() or "0"
    if value.isascii() and value.isdigit():
        return int(value)
    mistakes.append(f"{PREFIX}{name} must be 0, or n for every n-th step; got {given[name]!r}")
    return 0


def _tokens(given: Mapping[str, str], name: str, mistakes: list[str]) -> int:
    default: int = getattr(Settings, name.lower())
    value = given.get(name, "").strip() or str(default)
    if value.isascii() and value.isdigit():
        return int(value)
    mistakes.append(f"{PREFIX}{name} must be a number of tokens; got {given[name]!r}")
    return default


def _shared_folder(given: Mapping[str, str], name: str, mistakes: list[str]) -> Path | None:
    value = given.get(name)
    if not value or Path(value).is_absolute():
        return Path(value) if value else None
    mistakes.append(
        f"{PREFIX}{name} must be the whole path of a folder that all servers share; got {value!r}"
    )
    return None


def _flag(given: Mapping[str, str], name: str, mistakes: list[str]) -> bool:
    value = given.get(name, "").strip().lower()
    if value not in _FLAGS:
        mistakes.append(f"{PREFIX}{name} must be 0 or 1; got {given[name]!r}")
    return _FLAGS.get(value, False)
