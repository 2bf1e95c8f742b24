"""Runs Triton kernels on the CPU in Triton's interpreter, leaving the process as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        with _patching_once_per_launch():
            yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


@contextmanager
def _patching_once_per_launch() -> Iterator[None]:
    """Each call of one jitted function by another makes the interpreter patch the language anew.

    Once per module and launch has the same effect, and takes two thirds off the time.
    """
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    run_grid = interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch_language(function)

    def run_patched(self: Any, *arguments: Any, **named: Any) -> None:
        patched.clear()
        run_grid(self, *arguments, **named)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_patched
    try:
        yield
    finally:
        interpreter._patch_lang = patch_language
        interpreter.GridExecutor.__call__ = run_grid
