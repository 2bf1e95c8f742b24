"""Runs Triton kernels as the PTX that a GPU of sm_80 or sm_89 is given, on the CPU.

Triton's interpreter runs the kernel's source; what the compiler made of it, it never sees: layouts,
conversions and their rounding, copies in flight, barriers. Here each kernel is compiled and its PTX
executed instruction by instruction, over all threads of many programs at a time.

    with executed(arch=80, seed=0) as run:
        cache_store(..., backend="triton")      # tensors of the CPU
    run.instructions["cp.async"]                 # what was executed, and how often

An access outside the tensors of the call, to bytes of no tensor between them, or to shared memory
while a copy into it is in flight is a `Fault`; so is a race between warps of a program. What is
not shown: time, the order of memory between programs, and the last bits of instructions whose
results NVIDIA only bounds. `docs/gpu-kernels.md` says more.
"""

from m3_kernels.testing.ptx.faults import Fault
from m3_kernels.testing.ptx.launch import Executed, executed

__all__ = ["Executed", "Fault", "executed"]
