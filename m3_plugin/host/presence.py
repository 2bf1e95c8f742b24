"""Never silently absent: host version windows, and the line every process logs about itself.

Both hosts serve M3 in-tree and both swallow a plugin's import error, so a plugin that failed looks
exactly like one that works. Adapters therefore decide here, log here, and fail here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from packaging.version import Version

from m3_plugin import __version__
from m3_plugin.settings import Settings


class PluginRefusal(RuntimeError):
    """The plugin will not take part; the message says why and how to change that."""


@dataclass(frozen=True)
class TestedWindow:
    """Host releases that are accepted: `minimum` <= release < `below`.

    Attributes
    ----------
    tested : those the test suite really ran on; a release is one of them with any patch or build
    """

    package: str
    minimum: str
    below: str
    tested: tuple[str, ...] = ()

    # pytest would otherwise try to collect a class called Test*
    __test__ = False

    def was_tested(self, version: str) -> bool:
        """Whether the test suite ran on this release."""
        found = Version(version).release
        return any(found[: len(t)] == t for t in (Version(name).release for name in self.tested))

    def refusal(self, version: str) -> str | None:
        """Why `version` is outside the window, None when it is inside."""
        release = Version(version)
        if Version(self.minimum) <= Version(release.base_version) < Version(self.below):
            return None
        return (
            f"{self.package} {version} is outside the tested window "
            f"[{self.minimum}, {self.below}); install a tested release, or set "
            "M3_PLUGIN_ALLOW_UNTESTED=1 to run anyway"
        )


def stands_aside(*, logger: str) -> bool:
    """Whether `M3_PLUGIN_DISABLE=1` keeps the plugin out; says so, on the logger of that name.

    Raises
    ------
    ValueError : the plugin is required too.
    """
    settings, _ = Settings.read()
    if settings.disable:
        logging.getLogger(logger).warning("%s", _not_active("M3_PLUGIN_DISABLE=1"))
    return settings.disable


def require_tested(window: TestedWindow, version: str, *, settings: Settings) -> None:
    """Refuse an untested host version unless the user asked for it.

    Raises
    ------
    PluginRefusal : outside the window and `M3_PLUGIN_ALLOW_UNTESTED` is not set.
    """
    refusal = window.refusal(version)
    if refusal is not None and not settings.allow_untested:
        raise PluginRefusal(refusal)


def attestation(*, host: str, host_version: str, kernels: str, detail: str) -> str:
    """The one line that proves presence: versions, what was done, which kernels and why."""
    return f"m3-plugin {__version__} in {host} {host_version}: {detail}; MSA kernels: {kernels}"


def absence(reason: str) -> str:
    """The line logged when the plugin stands aside although it was loaded."""
    return f"{_not_active(reason)}. Set M3_PLUGIN_REQUIRED=1 to make this an error."


def _not_active(reason: str) -> str:
    return (
        f"m3-plugin {__version__} is NOT ACTIVE, the host's own MiniMax-M3 will be used: {reason}"
    )
