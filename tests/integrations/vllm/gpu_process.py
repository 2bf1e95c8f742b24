"""Imported, this makes a process in which vLLM builds models as on GPUs: rehearsals share one."""

from __future__ import annotations

from tests.integrations.vllm import building

building.prepare()
