"""Runs Triton kernels on the CPU in Triton's interpreter, leaving the process as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "TRITON_INTERPRET"


@contextmanager
def interpreted() -> Iterator[None]:
    """Within: `TRITON_INTERPRET=1`. Kernels whose files are first imported within are interpreted.

    The switch is undone at the end, so that servers started by the same process do not inherit it.

    Raises
    ------
    RuntimeError : Triton was already imported without the switch; its own library functions are
        then compiled ones, which the interpreter cannot call
    """
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(tl.sort, InterpretedFunction):
            raise RuntimeError(
                f"Triton was imported before {SWITCH}=1 was set; import it within interpreted() "
                f"first, or start the process with {SWITCH}=1"
            )
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
