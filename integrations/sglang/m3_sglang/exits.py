"""The one way out of a host that swallows exceptions; imports the standard library only.

It must work when everything else of the plugin is broken, so it reads `M3_PLUGIN_REQUIRED` itself.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_TRUE = ("1", "true", "yes")


@contextmanager
def ending_the_process(
    ending: Callable[[str], BaseException] = SystemExit,
) -> Iterator[None]:
    """Turn an exception into one that ends the process, or into a warning.

    SGLang logs an entry point's exception and goes on without the plugin; `SystemExit` passes.

    Parameters
    ----------
    ending : what ends the process from where the context is used

    Raises
    ------
    SystemExit, or what `ending` makes : under `M3_PLUGIN_REQUIRED=1`; names the exception.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if os.environ.get("M3_PLUGIN_REQUIRED", "").strip().lower() in _TRUE:
            traceback.print_exception(error)
            raise ending(f"m3-plugin is required (M3_PLUGIN_REQUIRED=1): {reason}") from error
        logger.warning(
            "m3-plugin is NOT ACTIVE, SGLang's own MiniMax-M3 will be used: %s. "
            "Set M3_PLUGIN_REQUIRED=1 to make this an error.",
            reason,
        )
