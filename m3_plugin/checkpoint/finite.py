"""Are the weights of a model numbers? One NaN in one expert shows months later, in one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# Elements looked at together: a copy of so many must fit beside the model.
_PART = 1 << 26
# Formats of 8 bits in which all ones behind the sign mean NaN; e5m2 has infinities too.
_LARGEST_FINITE = {
    torch.float8_e4m3fn: 0x7E,
    torch.float8_e5m2: 0x7B,
}


def require_finite(parameters: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse a model whose weights hold NaN or infinity; one pass over them, where they lie.

    Parameters
    ----------
    parameters : of the model; integers, such as packed codes, are passed over
    names : those that came from the checkpoint

    Raises
    ------
    ValueError : names the parameter, the place of the first such value, and how many there are.
    """
    for name in sorted(names):
        values = parameters[name].detach()
        if values.is_meta or not values.is_floating_point() or _sum_is_finite(values):
            continue
        bad = [
            (start + int(place), wrong.sum().item())
            for start, part in _parts(values)
            for wrong in [_not_finite(part)]
            for place in torch.nonzero(wrong).flatten()[:1]
        ]
        if bad:
            first, count = bad[0][0], sum(number for _, number in bad)
            raise ValueError(
                f"{name} holds {count} values that are NaN or infinite, the first at "
                f"{_index(first, values.shape)} of {list(values.shape)}; the checkpoint's file is "
                "damaged or was written so: compare its checksum, and download it again"
            )


def require_finite_files(files: Iterable[Path]) -> None:
    """Refuse safetensors files whose tensors hold NaN or infinity; each is read once, in turn.

    Raises
    ------
    ValueError : see `require_finite`.
    """
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as stored:
            names = stored.keys()
            for name in names:
                require_finite({name: stored.get_tensor(name)}, [name])


def _sum_is_finite(values: Tensor) -> bool:
    """Whether the sum of 16 or 32 bit values is finite, which needs no memory; False if unknown."""
    if values.dtype in _LARGEST_FINITE or values.dtype.itemsize == 1:
        return False
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))


def _parts(values: Tensor) -> Iterable[tuple[int, Tensor]]:
    flat = values.reshape(-1)
    return ((start, flat[start : start + _PART]) for start in range(0, flat.numel(), _PART))


def _not_finite(values: Tensor) -> Tensor:
    """Bool, one per value."""
    largest = _LARGEST_FINITE.get(values.dtype)
    if largest is not None:
        return (values.view(torch.uint8) & 0x7F) > largest
    return ~torch.isfinite(values.float())


def _index(flat: int, shape: torch.Size) -> list[int]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]
