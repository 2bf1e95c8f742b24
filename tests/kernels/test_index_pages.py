"""Where a page of int8 index keys and their scales has what."""

from __future__ import annotations

import pytest
import torch

from m3_kernels.index_pages import SCALE_DTYPE, bytes_per_token, split_pages


def test_every_byte_is_a_keys_or_a_scales() -> None:
    memory = torch.zeros(3, 128, bytes_per_token(128), dtype=torch.int8)
    keys, scales = split_pages(memory)
    assert keys.shape == (3, 128, 128)
    assert scales.shape == (3, 128)
    keys[1] = 1
    assert int(memory[1].sum()) == 128 * 128
    assert not scales.any()
    scales[1, 5] = 0.5
    assert int(keys.sum()) == 128 * 128
    assert not memory[[0, 2]].any()
    keys[:] = 0
    assert memory.view(SCALE_DTYPE).sum() == 0.5


def test_keys_lie_where_descriptors_want_them() -> None:
    """Compute capability 9 reads pages by tensor maps, whose strides are multiples of 16 bytes."""
    keys, scales = split_pages(torch.zeros(3, 128, bytes_per_token(128), dtype=torch.int8))
    assert all(stride % 16 == 0 for stride in keys.stride()[:-1])
    assert keys.stride(2) == scales.stride(1) == 1


def test_pages_within_a_larger_pool() -> None:
    """A host may keep other layers' pages between ours."""
    pool = torch.zeros(4, 2, 16, bytes_per_token(32), dtype=torch.int8)
    keys, scales = split_pages(pool[:, 1])
    keys.fill_(3)
    scales.fill_(2)
    assert not pool[:, 0].any()
    assert (pool[:, 1].flatten(1)[:, : 16 * 32] == 3).all()


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"must be torch\.int8; got torch\.bfloat16"):
        split_pages(torch.zeros(2, 16, 34).bfloat16())
    with pytest.raises(ValueError, match=r"strides \[\*, 34, 1\]; got"):
        split_pages(torch.zeros(2, 34, 16, dtype=torch.int8).transpose(1, 2))
