"""What vLLM gets wrong on a CPU, and what takes its place."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from vllm.config.lora import LoRAConfig
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import (
    apply_sampling_constraints,
    expand_batch_to_tokens,
    rejection_sample,
)
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from m3_vllm import cpu_repairs
from m3_vllm.cpu_repairs import put_right, spread, spreads_right
from tests.integrations.draws import NUM_DRAWS, chi_square_p


@pytest.fixture(scope="module")
def kernels_of_a_worker() -> Any:
    """vLLM replaces its kernels, once, as in a worker on a CPU; what it launches in one's place."""
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    return rejection_sampler.expand_kernel


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, kernels_of_a_worker: Any) -> list[str]:
    """What is logged, where vLLM's own function is in place."""
    monkeypatch.setattr(kernels_of_a_worker, "_impl", kernels_of_a_worker.func)
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            cpu_repairs.logger, level, lambda message, *_, level=level: lines.append(level)
        )
    return lines


def expanded(dtype: torch.dtype) -> list[Any]:
    """By the function that calls the kernel."""
    values = torch.tensor([0, 40, 70], dtype=dtype)
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    return expand_batch_to_tokens(values, ends, 6, replace_from=0, replace_to=1).tolist()


def test_vllms_own_is_wrong_and_ours_takes_its_place(said: list[str]) -> None:
    """Where the first line fails, vLLM's is right by now: `m3_vllm.cpu_repairs` can go."""
    assert not spreads_right()
    put_right()
    assert spreads_right()
    for dtype in (torch.float32, torch.int32, torch.int64):
        assert expanded(dtype) == [1, 40, 40, 40, 70, 70]
    assert said == ["info"]
    put_right()
    assert said == ["info"], "a right one is to be left alone"


def test_modules_that_no_search_can_look_at_do_not_matter(said: list[str]) -> None:
    """numba, which n-gram drafts import, brings objects that vLLM's `register_kernels` fails on."""
    importlib.import_module("numba")
    assert not spreads_right()
    put_right()
    assert said == ["info"]


def test_what_cannot_be_put_right_is_warned_of(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_repairs, "spread", lambda *_: None)
    put_right()
    assert said == ["warning"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_row_has_its_requests_value(dtype: torch.dtype) -> None:
    """Requests of no, one and several rows; a replaced value."""
    output = torch.full((4,), 9, dtype=dtype)
    values = torch.tensor([5, 0, 3], dtype=dtype)
    spread(output, values, torch.tensor([0, 1, 4], dtype=torch.int32), 0, 1, 128)
    assert output.tolist() == [1, 3, 3, 3]


def sampling(num_reqs: int, *, temperature: float, top_k: int) -> SamplingMetadata:
    """As vLLM's runner makes it of requests with these parameters."""
    none = torch.zeros(num_reqs)
    return SamplingMetadata(
        temperature=torch.full((num_reqs,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=torch.full((num_reqs,), top_k, dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.usefixtures("said")
@pytest.mark.parametrize("drafts", [[0, 1], [2, 3], [3, 2]])
def test_verified_tokens_have_the_targets_distribution(drafts: list[int]) -> None:
    """Through vLLM's own rejection sampler, at a temperature and with top-k, whatever was drafted.

    One of 10,000 right samplers would fail; this one always draws the same.
    """
    put_right()
    torch.manual_seed(1)
    logits = torch.tensor([[2.0, 0.5, 1.0, -3.0], [-1.0, 1.0, 2.0, 1.5]])
    metadata = sampling(NUM_DRAWS, temperature=2.0, top_k=3)
    ends = torch.arange(2, 2 * NUM_DRAWS + 1, 2, dtype=torch.int32)
    tokens = rejection_sample(
        torch.tensor(drafts, dtype=torch.int32).repeat(NUM_DRAWS),
        [2] * NUM_DRAWS,
        2,
        ends,
        None,
        apply_sampling_constraints(logits.repeat(NUM_DRAWS, 1), ends, metadata),
        torch.zeros(NUM_DRAWS, 1, dtype=torch.int32),
        metadata,
    )
    accepted = tokens[:, 0] == drafts[0]
    for row, seen in enumerate((tokens[:, 0], tokens[accepted, 1])):
        possible = logits[row].topk(3).indices.tolist()
        weights = (logits[row, possible].double() / 2.0).softmax(-1).tolist()
        exact = {(token,): weight for token, weight in zip(possible, weights, strict=True)}
        drawn = Counter((token,) for token in seen.tolist())
        assert set(drawn) <= set(exact)
        assert not drawn or chi_square_p(drawn, exact) > 1e-4
    assert tokens[~accepted, 1].eq(-1).all()


@pytest.fixture
def rewinding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests get our generators while the test runs."""
    monkeypatch.setattr(
        CachedRequestState, "__post_init__", CachedRequestState.__dict__["__post_init__"]
    )
    cpu_repairs.take_draws_back()


def seeded_request(seed: int = 7) -> CachedRequestState:
    """As vLLM makes one."""
    return CachedRequestState(
        req_id="a",
        prompt_token_ids=[1, 2],
        mm_features=[],
        sampling_params=None,
        generator=torch.Generator().manual_seed(seed),
        block_ids=([],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


def take_back(generator: torch.Generator) -> None:
    """As vLLM does after a part of a prompt."""
    generator.set_offset(generator.get_offset() - 4)


def test_vllm_cannot_take_a_draw_back_on_a_cpu() -> None:
    """Where this fails, `take_draws_back` can go."""
    with pytest.raises(RuntimeError, match="does not use offset"):
        take_back(torch.Generator())


@pytest.mark.usefixtures("rewinding")
def test_parts_of_a_prompt_draw_nothing() -> None:
    request = seeded_request()
    generator = request.generator
    assert generator is not None
    for _ in range(3):
        torch.empty(9).exponential_(generator=generator)
        take_back(generator)
    drawn = torch.empty(9).exponential_(generator=generator)
    assert torch.equal(drawn, torch.empty(9).exponential_(generator=torch.manual_seed(7)))


@pytest.mark.usefixtures("rewinding")
def test_a_request_that_begins_again_repeats_no_draw() -> None:
    request = seeded_request()
    assert request.generator is not None
    drawn = [torch.empty(9).exponential_(generator=request.generator)]
    request.output_token_ids.append(5)
    for _ in range(2):
        drawn.append(torch.empty(9).exponential_(generator=request.generator))
        take_back(request.generator)
    assert len({tuple(values.tolist()) for values in drawn}) == 3


@pytest.mark.usefixtures("rewinding")
def test_requests_are_repaired_once_and_those_without_a_seed_are_left_alone() -> None:
    ours = CachedRequestState.__post_init__
    cpu_repairs.take_draws_back()
    assert CachedRequestState.__post_init__ is ours
    request = seeded_request()
    request.generator = None
    CachedRequestState.__post_init__(request)
    assert request.generator is None


@pytest.fixture
def leaving_out() -> Iterator[None]:
    theirs = PunicaWrapperCPU._apply_shrink
    cpu_repairs.leave_out_rows_without_adapter()
    yield
    PunicaWrapperCPU._apply_shrink = theirs


def adapted_rows() -> list[bool]:
    """Of three rows, the second without an adapter: to which is something added?"""
    lora = LoRAConfig(max_loras=2, max_lora_rank=8)
    wrapper = PunicaWrapperCPU(8, max_batches=4, device="cpu", lora_config=lora)
    mapping = LoRAMapping((1, 0, 2), (1, 0, 2), is_prefill=False)
    wrapper.update_metadata(mapping, [1, 2], max_loras=2, vocab_size=32)
    rows = torch.zeros(3, 5)
    a, b = torch.ones(2, 1, 8, 4), torch.ones(2, 1, 5, 8)
    wrapper.add_lora_linear(rows, torch.ones(3, 4), (a,), (b,), 1.0, (5,))
    return rows.any(dim=1).tolist()


def test_vllm_gives_rows_without_an_adapter_the_last_one() -> None:
    """Where this fails, `leave_out_rows_without_adapter` can go."""
    assert not cpu_repairs.leaves_out_rows_without_adapter()
    assert adapted_rows() == [True, True, True]


@pytest.mark.usefixtures("leaving_out")
def test_rows_without_an_adapter_are_left_out() -> None:
    assert adapted_rows() == [True, False, True]
    ours = PunicaWrapperCPU._apply_shrink
    cpu_repairs.leave_out_rows_without_adapter()
    assert PunicaWrapperCPU._apply_shrink is ours


def rows_of(rank: int, size: int) -> torch.Tensor:
    return torch.arange(size * 3.0).view(size, 3) + 100 * (rank + 1)


def exchange(rank: int, folder: str) -> None:
    """What experts of data parallel ranks ask vLLM's communicator for; results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group: Any = dist.group.WORLD
    communicator = CpuCommunicator(group, torch.device("cpu"), group, unique_name="dp")
    sizes = [1, 4]
    refused = []
    for name in ("all_gatherv", "reduce_scatterv"):
        with pytest.raises(NotImplementedError):
            getattr(communicator, name)(rows_of(rank, sizes[rank]), 0, sizes)
        refused.append(name)
    cpu_repairs.gather_rows_of_ranks()
    own = rows_of(rank, sizes[rank])
    ids = torch.full((sizes[rank], 2), rank, dtype=torch.int32)
    gathered = communicator.all_gatherv([own, ids], 0, sizes)
    # what a rank's experts make of all rows
    parts = (gathered[0] * (rank + 1)).bfloat16()
    kept = parts.clone()
    output = torch.empty(sizes[rank], 3).bfloat16()
    communicator.reduce_scatterv_into_output(parts, output, 0, sizes)
    assert torch.equal(parts, kept)
    torch.save((gathered, output), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_vllm_cannot_gather_unequal_shares_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first line fails, `gather_rows_of_ranks` can go."""
    assert not cpu_repairs.gathers_rows_of_ranks()
    for name in ("all_gatherv", "reduce_scatterv"):
        # put back afterwards
        monkeypatch.setattr(CpuCommunicator, name, getattr(CpuCommunicator, name))
    cpu_repairs.gather_rows_of_ranks()
    assert cpu_repairs.gathers_rows_of_ranks()


@pytest.mark.extended
def test_two_ranks_gather_unequal_shares(tmp_path: Path) -> None:
    spawn(exchange, (str(tmp_path),), nprocs=2)
    everything = torch.cat([rows_of(0, 1), rows_of(1, 4)])
    outputs = []
    for rank in (0, 1):
        (rows, ids), output = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(rows, everything)
        assert ids.tolist() == [[0, 0]] + 4 * [[1, 1]]
        outputs.append(output)
    summed = everything.bfloat16() + (2 * everything).bfloat16()
    assert torch.equal(torch.cat(outputs), summed)


def test_only_rows_are_gathered() -> None:
    with pytest.raises(ValueError, match="dim must be 0, along which ranks have their rows; got 1"):
        cpu_repairs.all_gather_rows(None, torch.zeros(2, 2), 1)
