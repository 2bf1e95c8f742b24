"""One line of a diagnosis, and the whole of it, fit to be sent to strangers."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from m3_plugin.untrusted import printable

Status = Literal["ok", "note", "warning", "failure"]

# How common services spell their tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])("
    r"(hf_|api_org_|sk-|gh[opusr]_|github_pat_|glpat-|nvapi-|xox[abeoprs]-|pypi-|npm_|gsk_|r8_|AIza)"
    r"[A-Za-z0-9_-]{8,}"
    r"|(AKIA|ASIA)[A-Z0-9]{12,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*)?"
    r")"
)
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9+/=._~-]{6,}")
_USER_OF_URL = re.compile(r"(\w+://)[^\s/@'\"]+@")
# A name that says so, and its value: KEY=value, "key": "value", --api-key value
_NAMED = re.compile(
    r"(?i)([A-Za-z0-9_.-]*(?:api[_-]?key|access[_-]?key|secret|passwd|password|(?<!max)[_-]token|"
    r"\btoken|credential|signature)(?:[_-]?key)?[\"']?(?:\s*[=:]\s*|\s+(?=[\"']))[\"']?"
    r"|--(?:api-key|hf-token|token|password)\s+)"
    r"(?!<)[^\s\"',;&<]{4,}"
)


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes
    ----------
    section : what it is about, e.g. "vLLM" or "model"
    status : "failure" means M3 would not be served by us, or not at all
    value : what was found
    advice : what to do about it; every warning and failure has one
    id : the same in every release, for programs: "kernels.self_test", "gpu.0"; a fact that there
        may be several of (one per file or key) comes several times
    """

    section: str
    name: str
    status: Status
    value: str
    advice: str = ""
    id: str = ""


@dataclass
class Report:
    """All findings in the order of the checks."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that keeps M3 from being handed to the plugin."""
        return not any(finding.status == "failure" for finding in self.findings)

    def add(
        self,
        section: str,
        name: str,
        value: str,
        *,
        status: Status = "ok",
        advice: str = "",
        id: str | None = None,
    ) -> None:
        """Append a finding, cleaned of what does not belong in a bug report.

        Parameters
        ----------
        id : by default made of section and name
        """
        name, value, advice = (clean(printable(text)) for text in (name, value, advice))
        identity = id or f"{_slug(section)}.{_slug(name)}"
        self.findings.append(Finding(section, name, status, value, advice, identity))

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }


def _slug(words: str) -> str:
    """Words as a part of an id: letters and digits with underscores between them."""
    return "_".join(re.findall(r"\w+", words)).lower()


def clean(text: str) -> str:
    """`text` without the user's home directory, the machine's name and what looks like a secret.

    Common tokens, credentials in URLs and values of names like `API_KEY` are masked. A secret that
    looks like any other word is not: whoever sends a report reads it before.
    """
    home = str(Path.home())
    if home != os.sep:
        text = text.replace(home, "~")
    name = socket.gethostname()
    # a machine called "m3" or "gpu" would take innocent words with it
    if len(name) > 4:
        text = text.replace(name, "<host>")
    text = _USER_OF_URL.sub(r"\1<user>@", text)
    text = _AUTHORIZATION.sub(r"\1\2<token>", text)
    text = _NAMED.sub(r"\1<secret>", text)
    return _TOKEN.sub("<token>", text)
