"""Quantised checkpoints shared by the engine tests of all hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m3_plugin.testing.quantised import QuantName, quantise_checkpoint, reference_checkpoint

DEQUANTISE = {"M3_PLUGIN_DEQUANTIZE": "1"}


class QuantisedCheckpoints:
    """Writes each checkpoint once: `stored` as published, `reference` as the same numbers plain."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.folder = folder

    def stored(self, quant: QuantName) -> Path:
        return self._once(quantise_checkpoint, quant, f"{quant}-stored")

    def reference(self, quant: QuantName) -> Path:
        return self._once(reference_checkpoint, quant, f"{quant}-reference")

    def _once(self, write: Callable[..., Path], quant: QuantName, name: str) -> Path:
        target = self.folder / name
        return target if target.exists() else write(self.source, target, quant)
