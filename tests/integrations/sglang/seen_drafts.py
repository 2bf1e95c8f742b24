"""A plugin of SGLang for tests: what each drafting round proposed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integrations.sglang import extra_plugin

ROUND = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker.draft"


@dataclass(frozen=True)
class SeenDrafts:
    """The test's view of the rounds of an engine with this plugin."""

    folder: Path

    def install(self) -> dict[str, str]:
        """Make this module a plugin; returns the variables of engines that are to load it."""
        return extra_plugin.install(self.folder, module=__name__)

    def rounds(self) -> list[list[list[int]]]:
        """Per round so far: the drafts of each request."""
        file = self.folder / "rounds"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def register() -> None:
    """Entry point: hook the draft worker's round."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ROUND, seen_round, HookType.AROUND)


def seen_round(original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: a chain per request, behind the token the target chose last."""
    verify_input = original(worker, batch, *args, **kwargs)
    chains = verify_input.draft_token.view(-1, verify_input.draft_token_num)
    with (extra_plugin.folder() / "rounds").open("a") as file:
        file.write(json.dumps(chains[:, 1:].tolist()) + "\n")
    return verify_input
