"""Model classes under SGLang's architecture names; SGLang imports every module of this package.

An import error of a module it would log and pass over, so the module is imported here first. A
scheduler reports the `ImportError` of a package to its parent, which `SystemExit` would not.
"""

from m3_sglang.exits import ending_the_process

with ending_the_process(ImportError):
    from m3_sglang.models import minimax_m3, minimax_m3_mtp  # noqa: F401
