"""`quantised_linear` in plain torch, without a compiler: some rows decoded at a time."""

from __future__ import annotations

from itertools import pairwise

from m3_kernels.quantised_linear.call import QuantisedLinear
from m3_kernels.quantised_linear.decoding import decode

# Rows decoded at a time: 24 MB in fp32 for 6,144 columns.
ROWS = 1024


def quantised_linear_torch(call: QuantisedLinear) -> None:
    """Fill `call.out`."""
    x, out = call.x, call.out
    out.zero_()
    for group, (first, last) in enumerate(pairwise(call.bounds())):
        if first == last:
            continue
        wide = x[first:last].float()
        for start in range(0, call.weight.rows, ROWS):
            part = slice(start, start + ROWS)
            out[first:last, part] = wide @ decode(call.weight.part(group, part)).T
