"""Framework-neutral core of m3-plugin: what MiniMax-M3 is and in which order its attention runs."""

from importlib.metadata import version

__version__ = version("m3-plugin")

__all__ = ["__version__"]
