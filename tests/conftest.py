"""What all tests share: Triton is imported once, in the mode that runs on a CPU."""

from __future__ import annotations

import importlib.util

from m3_kernels.testing.interpreter import interpreted

# Before any test imports a host, which would import Triton without its interpreter. Kernels that
# the hosts define afterwards are compiled ones as ever.
if importlib.util.find_spec("triton") is not None:
    with interpreted():
        pass
