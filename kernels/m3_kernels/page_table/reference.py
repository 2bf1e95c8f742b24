"""The oracle of the page table: plain torch, any device, nothing read back to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def fill_page_table_reference(
    page_table: Tensor, *, slots: Tensor, rows: Tensor, seq_lens: Tensor, page_size: int
) -> None:
    """Fill the table; arguments as in the public function, already checked."""
    first = torch.arange(page_table.shape[1], device=slots.device) * page_size
    exists = first < seq_lens[:, None]
    slot = slots[rows.long()[:, None], first.clamp(max=max(slots.shape[1] - 1, 0))]
    page_table.copy_(torch.where(exists, slot // page_size, page_table))
