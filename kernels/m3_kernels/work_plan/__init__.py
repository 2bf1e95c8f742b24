"""The op `work_plan`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.work_plan.interface import allocate_work_plan, fill_work_plan, make_work_plan
from m3_kernels.work_plan.plan import DECODE_ROWS, TILE_ROWS, WorkPlan, WorkPlanBuffers

__all__ = [
    "DECODE_ROWS",
    "TILE_ROWS",
    "WorkPlan",
    "WorkPlanBuffers",
    "allocate_work_plan",
    "fill_work_plan",
    "make_work_plan",
]
