"""What all tests share: one thread, and Triton imported once, in the mode that runs on a CPU."""

from __future__ import annotations

import importlib.util
import os

# Test runs share the machine's few cores with each other and with the servers they start. Threads
# that wait for work by spinning would take it from all of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from m3_kernels.testing.interpreter import interpreted

# References make millions of tiny operations, which threads only slow down. That the C++ kernels
# give the same bits with more threads is tested in tests/kernels/test_invariance.py.
torch.set_num_threads(1)

# Before any test imports a host, which would import Triton without its interpreter. Kernels that
# the hosts define afterwards are compiled ones as ever.
if importlib.util.find_spec("triton") is not None:
    with interpreted():
        pass
