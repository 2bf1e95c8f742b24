"""The session that a host gets for the released model on a CPU."""

from __future__ import annotations

import torch

from m3_plugin.attention.assembly import make_session
from m3_plugin.attention.batch import StepCapacity
from m3_plugin.attention.session import MSASession
from m3_plugin.model.config import M3Config
from m3_plugin.model.released import released_config


def released_session() -> MSASession:
    """With room for one row, in bf16, by the variables of the moment."""
    session = make_session(
        M3Config.from_hf(released_config()),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        index_dtype=torch.bfloat16,
        tensor_parallel_size=1,
        capacity=StepCapacity(max_requests=1, max_rows=1, max_seq_len=1),
    )
    assert session is not None
    return session
