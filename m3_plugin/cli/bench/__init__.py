"""`m3-plugin bench`: speed on this machine, never of a result that was not checked first."""

from __future__ import annotations

from m3_plugin.cli.bench.cpu import bench_cpu
from m3_plugin.cli.bench.kernels import bench_kernels
from m3_plugin.cli.bench.serve import bench_serve

__all__ = ["bench_cpu", "bench_kernels", "bench_serve"]
