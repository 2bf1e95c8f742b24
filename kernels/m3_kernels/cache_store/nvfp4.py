"""Numbers as an NVFP4 cache would give them back, in plain torch on any device.

What MiniMax-M3.1 was trained with: groups of 16 along the last dimension share an E4M3 scale, each
number becomes one of eight magnitudes and a sign. The caches that are served here have other
dtypes; they then hold numbers that NVFP4 can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 16
# From this ratio to its group's scale on, a number's magnitude grows by so much. Midpoints go to
# the even code: upwards at 0.75, 1.75 and 3.5, else down.
_UP_BEYOND = ((0.25, 0.5), (1.25, 0.5), (2.5, 1.0), (5.0, 2.0))
_UP_FROM = ((0.75, 0.5), (1.75, 0.5), (3.5, 1.0))
# E4M3's smallest and largest numbers above zero
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-9, 448.0


def nvfp4_values(values: Tensor) -> Tensor:
    """Numbers rounded to NVFP4 and back, fp32 of the same shape; a NaN spoils its group.

    Parameters
    ----------
    values : floating [..., n * 16]

    Raises
    ------
    ValueError : the last dimension is no multiple of 16.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"NVFP4 rounds groups of {GROUP} channels; got {values.shape[-1]} of them")
    groups = values.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 6
    scale = scale.clamp(_LEAST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn).float()
    ratio = groups / scale
    size = ratio.abs()
    magnitude = torch.zeros_like(size)
    for bound, step in _UP_BEYOND:
        magnitude += step * (size > bound)
    for bound, step in _UP_FROM:
        magnitude += step * (size >= bound)
    # adding zero makes no number minus zero
    return (magnitude * ratio.sign() * scale + 0.0).flatten(-2)


def nvfp4_index_keys(keys: Tensor) -> Tensor:
    """Index keys as the trained indexer multiplies them: NVFP4's numbers in E4M3, fp32 here.

    Parameters
    ----------
    keys : floating [..., n * 16]

    Raises
    ------
    ValueError : as `nvfp4_values`.
    """
    rounded = nvfp4_values(keys).clamp(-_LARGEST_SCALE, _LARGEST_SCALE)
    return rounded.to(torch.float8_e4m3fn).float()
