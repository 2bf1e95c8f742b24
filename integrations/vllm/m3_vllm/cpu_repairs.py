"""What of vLLM is wrong on a CPU and concerns M3's answers is put right: four things.

Before it verifies drafts, vLLM spreads each request's temperature, top-k and top-p over the rows of
its drafts, with a Triton kernel. On a CPU a function of `vllm.utils.cpu_triton_utils` takes that
kernel's place. It writes into an int64 copy of its output and leaves it there, so that for any
other dtype the rows keep uninitialised memory, and tokens are drawn from another distribution than
without drafts. `spread` computes the same and takes its place in turn, in workers which serve M3
with drafts on a CPU and whose own function was found wrong.

It takes its place inside the object which vLLM launches (`KernelOverride`), and not through vLLM's
registry of such functions: `vllm.triton_utils.dispatcher.register_kernels` looks at every attribute
of every module loaded by then, and fails on those of llvmlite, which n-gram drafts bring.

A prompt that is read in parts draws a token after each part, and vLLM takes all but the last draw
back: it moves the offset of the request's generator. Generators of a CPU have no offset, so one
request with a `seed` and a prompt longer than a step ends the engine. Generators that can take a
draw back take their place, in workers which serve M3 on a CPU (`take_draws_back`).

Rows of requests without a LoRA adapter have the adapter's number -1. vLLM's torch ops for CPUs take
the last adapter's weights for them, so that the model's own answers change as soon as an adapter is
loaded. What such a row is multiplied with is zero in servers of M3 with `--enable-lora`
(`leave_out_rows_without_adapter`).

Experts of data parallel ranks work on the rows of all of them. vLLM asks its communicator for
`all_gatherv` and `reduce_scatterv`, which the one for CPUs lacks: the first step ends in a
`NotImplementedError`, for every model with experts (`gather_rows_of_ranks`).

Each to be deleted when every release of the tested window has it right.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger("vllm.m3_plugin.cpu_repairs")

# Philox numbers of one draw, by which vLLM moves an offset.
_DRAW = 4

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def put_right() -> None:
    """Replace vLLM's function if it is wrong, and say so; call after vLLM has put its own there."""
    if spreads_right():
        return
    from vllm.v1.sample import rejection_sampler

    launch: Any = rejection_sampler.expand_kernel
    launch._impl = spread
    if spreads_right():
        logger.info(
            "m3-plugin: vLLM's CPU stand-in for %s, which loses the temperature, top-k and top-p "
            "of verified rows, is replaced: sampled requests are exact with drafts",
            KERNEL,
        )
    else:
        logger.warning(
            "m3-plugin: vLLM's CPU stand-in for %s loses the temperature, top-k and top-p of "
            "verified rows and could not be replaced: with --speculative-config only greedy "
            "requests (temperature 0) are exact",
            KERNEL,
        )


def spreads_right() -> bool:
    """Whether the function in the kernel's place is right for temperatures and for top-k."""
    from vllm.v1.sample import rejection_sampler

    launch: Any = rejection_sampler.expand_kernel
    ends = torch.tensor([2, 3], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32):
        output = torch.full((3,), 9, dtype=dtype)
        values = torch.tensor([0, 3], dtype=dtype)
        launch[(2,)](output, values, ends, 0, 1, rejection_sampler.MAX_SPEC_LEN)
        if output.tolist() != [1, 1, 3]:
            return False
    return True


def spread(
    output: Tensor,
    values: Tensor,
    ends: Tensor,
    replace_from: float,
    replace_to: float,
    _max_rows: int | None = None,
) -> None:
    """Each request's value on all of its rows, with the arguments of vLLM's kernel.

    Parameters
    ----------
    output : [rows], filled
    values : [requests], of the output's dtype
    ends : integer [requests], rows up to and including each request's
    replace_from, replace_to : a value that is to become another
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    output.copy_(values.where(values != replace_from, replace_to).repeat_interleave(counts))


class Rewinding(torch.Generator):
    """A CPU generator that takes draws back as vLLM asks for it, by its offset.

    A request that has no token yet has drawn nothing that counts: it goes back to its seed. One
    that begins again after a preemption has drawn; where its last draw began is not known then, so
    the numbers go on, which changes nothing in how its tokens are distributed.

    Parameters
    ----------
    seeded : whose place it takes
    request : of vLLM's, with `output_token_ids`
    """

    def __init__(self, seeded: torch.Generator, request: Any) -> None:
        super().__init__()
        self._seeded = seeded.get_state()
        self._request = weakref.ref(request)
        self.set_state(self._seeded)

    def __new__(cls, seeded: torch.Generator, request: Any) -> Rewinding:
        # without its arguments, which are ours
        return super().__new__(cls)

    def get_offset(self) -> int:
        """A draw behind the place that `set_offset` goes to."""
        return _DRAW

    def set_offset(self, offset: int) -> torch.Generator:
        """Take the last draw back."""
        request = self._request()
        if request is not None and not request.output_token_ids:
            self.set_state(self._seeded)
        return self


def take_draws_back() -> None:
    """Give requests with a seed generators that vLLM can rewind; once, in a worker on a CPU."""
    try:
        torch.Generator().get_offset()
    except RuntimeError:
        pass
    else:
        return
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    theirs: Any = CachedRequestState.__post_init__
    if getattr(theirs, "rewinds", False):
        return

    def ours(self: CachedRequestState) -> None:
        theirs(self)
        if type(self.generator) is torch.Generator and self.generator.device.type == "cpu":
            self.generator = Rewinding(self.generator, self)

    ours.rewinds = True  # type: ignore[attr-defined]
    CachedRequestState.__post_init__ = ours
    logger.info(
        "m3-plugin: vLLM on a CPU ends at a request with a seed whose prompt is read in parts; its "
        "generators are replaced"
    )


def leave_out_rows_without_adapter() -> None:
    """Have LoRA layers add nothing to rows without an adapter; once, in a worker on a CPU."""
    if leaves_out_rows_without_adapter():
        return
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    theirs: Any = PunicaWrapperCPU._apply_shrink
    if getattr(theirs, "leaves_out", False):
        return

    def ours(self: PunicaWrapperCPU, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        theirs(self, y, x, w_t_all, scale)
        y.view(-1, y.shape[-1])[self.token_lora_indices < 0] = 0

    ours.leaves_out = True  # type: ignore[attr-defined]
    PunicaWrapperCPU._apply_shrink = ours
    logger.info(
        "m3-plugin: vLLM on a CPU gives rows without a LoRA adapter the last one's; they are left "
        "out now"
    )


def leaves_out_rows_without_adapter() -> bool:
    """Whether vLLM's own ops add nothing to a row whose adapter is -1."""
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

    adapter = torch.tensor([-1])
    between, output = torch.zeros(1, 2), torch.zeros(1, 3)
    bgmv_shrink(torch.ones(1, 4), torch.ones(1, 1, 2, 4), between, adapter, 1.0)
    bgmv_expand(between, torch.ones(1, 1, 3, 2), output, adapter, add_inputs=True)
    return not output.any()


def gather_rows_of_ranks() -> None:
    """Give data parallel ranks the two collectives of their experts; once, in a worker on a CPU."""
    if gathers_rows_of_ranks():
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    theirs: Any = CpuCommunicator
    theirs.all_gatherv = all_gather_rows
    theirs.reduce_scatterv = reduce_scatter_rows
    logger.info(
        "m3-plugin: vLLM on a CPU has no collectives for rows of unequal ranks, which experts of "
        "data parallel ranks need; they are added"
    )


def gathers_rows_of_ranks() -> bool:
    """Whether vLLM's communicator for CPUs has both collectives."""
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    names = ("all_gatherv", "reduce_scatterv")
    return all(
        getattr(CpuCommunicator, name) is not getattr(DeviceCommunicatorBase, name)
        for name in names
    )


def all_gather_rows(
    communicator: Any, rows: Any, dim: int = 0, sizes: list[int] | None = None
) -> Any:
    """The rows of all ranks behind each other, in the order of ranks.

    Parameters
    ----------
    communicator : vLLM's, of the ranks
    rows : [rows, ...] of this rank, or a list of such tensors
    dim : 0
    sizes : rows of each rank; None if all have as many as this one
    """
    if isinstance(rows, list):
        return [all_gather_rows(communicator, one, dim, sizes) for one in rows]
    _require_rows(dim)
    parts = []
    for place, size in enumerate(sizes or [len(rows)] * communicator.world_size):
        own = place == communicator.rank_in_group
        part = rows.contiguous() if own else rows.new_empty(size, *rows.shape[1:])
        # gloo gathers equal shares only
        torch.distributed.broadcast(
            part, communicator.ranks[place], group=communicator.device_group
        )
        parts.append(part)
    return torch.cat(parts)


def reduce_scatter_rows(
    communicator: Any, rows: Tensor, dim: int = 0, sizes: list[int] | None = None
) -> Tensor:
    """This rank's rows of the sum over ranks, in an order that is the same on all of them.

    Parameters
    ----------
    communicator : vLLM's, of the ranks
    rows : [rows of all ranks, ...], left as it is
    dim : 0
    sizes : rows of each rank; None if all have as many
    """
    _require_rows(dim)
    summed = rows.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(summed, group=communicator.device_group)
    count = communicator.world_size
    shares = summed.split(sizes or [len(rows) // count] * count)
    return shares[communicator.rank_in_group].clone()


def _require_rows(dim: int) -> None:
    if dim != 0:
        raise ValueError(f"dim must be 0, along which ranks have their rows; got {dim}")
