"""The op `page_table`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.page_table.interface import fill_page_table

__all__ = ["fill_page_table"]
