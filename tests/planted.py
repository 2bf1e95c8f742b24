"""A folder with modules that a stranger named like those our processes import."""

from __future__ import annotations

from pathlib import Path

MODULES = (
    *("torch", "triton", "numpy", "packaging", "typer", "rich", "json", "typing_extensions"),
    *("vllm", "sglang", "transformers", "m3_plugin", "m3_kernels", "m3_vllm", "m3_sglang"),
    *("sitecustomize", "usercustomize"),
)


def plant(folder: Path) -> Path:
    """Write the modules; returns the file in which each that runs leaves its name."""
    ran = folder / "ran.txt"
    for module in MODULES:
        (folder / f"{module}.py").write_text(
            f"with open({str(ran)!r}, 'a') as file:\n    print({module!r}, file=file)\n"
            "raise ImportError('a module of a stranger')\n"
        )
    return ran
