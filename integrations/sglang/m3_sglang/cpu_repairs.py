"""Speculation by chains on a plain CPU: the few kernels SGLang has for accelerators only.

SGLang's package from PyPI has these functions for CUDA and others, and for CPUs in a kernel package
that is not published. For a chain of drafts (one candidate per step, no tree) each is a few lines
of torch, which SGLang's own hooks put in place. Signatures and meanings are SGLang's: arguments it
fills are filled here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3_plugin.host.presence import PluginRefusal
from m3_plugin.model.rope import ComputedRope
from m3_sglang.hooks import apply_around


def build_chain(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Positions of the rows to verify and their order; every row has at most one successor.

    `tree_mask` stays all true: on a CPU no attention reads it, a chain's rows see their prefix.

    Parameters
    ----------
    seq_lens : integer [requests], committed tokens
    positions : int64 [requests * num_verify_tokens], filled
    retrieve_index, retrieve_next_token, retrieve_next_sibling : int64 [requests,
        num_verify_tokens], -1 everywhere; the first two are filled
    """
    if topk != 1:
        raise NotImplementedError(f"on CPU, drafts are chains: topk must be 1; got {topk}")
    steps = torch.arange(num_verify_tokens, device=seq_lens.device)
    positions.copy_((seq_lens[:, None] + steps).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token[:, :-1] = steps[1:]


def verify_chain_greedily(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept drafts for as long as each is what the target says after the one before.

    Parameters
    ----------
    predicts : int32 [requests * rows], filled: the target's token after each row
    accept_index : int32 [requests, rows], -1 everywhere; accepted rows are filled in, the first
        (the token the target chose last time) always
    accept_token_num : int32 [requests], filled: accepted drafts
    candidates : int64 [requests, rows], the target's last token and the drafts after it
    target_predict : int64 [requests, rows], the target's token after each row
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    accepted = right.long().cumprod(dim=1).sum(dim=1)
    _fill_accepted(
        predicts, accept_index, accept_token_num, accepted=accepted, chosen=target_predict
    )
    return predicts, accept_index, accept_token_num


def verify_chain_by_sampling(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    *,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    **_unused: Any,
) -> None:
    """Accept each draft with the target's probability of it; the first refused is drawn anew.

    A refused draft is drawn from what the target gives to all other tokens, so that every token is
    distributed as without drafts. Arguments as in `verify_chain_greedily`.

    Parameters
    ----------
    uniform_samples : fp32 [requests, rows], one coin per draft
    uniform_samples_for_final_sampling : fp32 [requests]
    target_probs : fp32 [requests, rows, vocabulary]
    threshold_single, threshold_acc : 1 keeps the distribution; SGLang's knobs to accept more
    """
    num_reqs, num_rows = candidates.shape
    drafted = candidates[:, 1:, None]
    probs = target_probs[:, :-1].gather(2, drafted).squeeze(2)
    # below, not up to: a coin may be 0, and a token without probability is never right
    heads = (uniform_samples[:, : num_rows - 1] < probs / threshold_acc) | (
        probs >= threshold_single
    )
    accepted = heads.long().cumprod(dim=1).sum(dim=1)
    request = torch.arange(num_reqs)
    rest = target_probs[request, accepted].clone()
    refused = accepted < num_rows - 1
    rest[request[refused], candidates[request[refused], accepted[refused] + 1]] = 0.0
    cumulative = rest.cumsum(dim=1)
    threshold = uniform_samples_for_final_sampling[:, None] * cumulative[:, -1:]
    drawn = (cumulative <= threshold).sum(dim=1).clamp(max=rest.shape[1] - 1)
    chosen = candidates.roll(-1, dims=1)
    chosen[request, accepted] = drawn
    _fill_accepted(predicts, accept_index, accept_token_num, accepted=accepted, chosen=chosen)


def greedy_if_all_are(original: Any, *, is_all_greedy: bool, **_unused: Any) -> bool:
    """AROUND hook on `_verify_uses_greedy`, which on a CPU would answer sampled requests greedily.

    SGLang has no sampling verification for a CPU; `verify_chain_by_sampling` is ours.
    """
    return is_all_greedy


def _fill_accepted(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    *,
    accepted: Tensor,
    chosen: Tensor,
) -> None:
    rows = torch.arange(chosen.numel()).view_as(chosen)
    steps = torch.arange(chosen.shape[1])
    kept = steps <= accepted[:, None]
    predicts.copy_(torch.where(kept, chosen, 0).flatten())
    accept_index.copy_(torch.where(kept, rows, -1)[:, : accept_index.shape[1]])
    accept_token_num.copy_(accepted)


def last_accepted(
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Fill int32 `bonus_tokens` [requests] with the last of each request's accepted tokens."""
    tokens = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(tokens.gather(1, (accept_lens.long() - 1)[:, None]).squeeze(1))


def draft_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Fill `out_cache_loc` with each request's next `num_cols` slots, request by request."""
    out_cache_loc.copy_(_slots_from(req_to_token, req_pool_indices, seq_lens, count=num_cols))


def verify_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
    **_unused: Any,
) -> Tensor:
    """Slots of the rows to verify: int64 [requests * draft_token_num]."""
    return _slots_from(req_to_token, req_pool_indices, start_offset, count=draft_token_num)


def _slots_from(req_to_token: Tensor, rows: Tensor, starts: Tensor, *, count: int) -> Tensor:
    columns = starts.long()[:, None] + torch.arange(count)
    return req_to_token[rows.long()[:, None], columns].flatten().long()


def move_nothing(
    data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor, num_locs: int, *_: Any
) -> None:
    """A chain's keys stay; SGLang's pool only tries its kernel, from one slot to itself.

    Raises
    ------
    NotImplementedError : keys would have to move, as a tree's.
    """
    if not torch.equal(tgt_loc[:num_locs], src_loc[:num_locs]):
        raise NotImplementedError("on CPU, drafts are chains, whose keys do not move")


def last_slots(original: Any, *args: Any, **kwargs: Any) -> Tensor:
    """AROUND hook on `get_last_loc`, which takes Triton for any backend not called torch_native."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args, **kwargs)


def assign_slots(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write the slots a request was given into its row of `req_to_token`, from start to end."""
    bounds = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    taken = 0
    for row, (start, end) in zip(req_pool_indices.tolist(), bounds, strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(
            req_to_token.dtype
        )
        taken += end - start


def plain_rope(original: Any, head_size: int, rotary_dim: int, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on `get_rope`, for dense draft models: SGLang's asks for another engine's kernel.

    Only the plain kind is replaced; any scaled one is left to SGLang.
    """
    scaling = kwargs.get("rope_scaling")
    kind = (scaling or {}).get("rope_type", "default")
    if args or kind != "default" or not kwargs.get("is_neox_style", True):
        return original(head_size, rotary_dim, *args, **kwargs)
    rotary_dim = int(rotary_dim * kwargs.get("partial_rotary_factor", 1.0))
    return ComputedRope(head_dim=head_size, rotary_dim=rotary_dim, theta=kwargs["base"])


def keep_top_k(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Probabilities [rows, vocabulary] of the `top_ks` [rows] likeliest tokens, sum 1 again."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ordered[torch.arange(probs.shape[-1]) >= top_ks[:, None]] = 0.0
    return _in_place(ordered, order)


def keep_top_p(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Probabilities [rows, vocabulary] of the likeliest tokens up to mass `top_ps`, sum 1 again."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    ordered[ordered.cumsum(-1) - ordered >= top_ps[:, None]] = 0.0
    return _in_place(ordered, order)


def _in_place(ordered: Tensor, order: Tensor) -> Tensor:
    kept = torch.zeros_like(ordered).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)


def _instead(replacement: Callable[..., Any]) -> Callable[..., Any]:
    """As an AROUND hook that never calls the original."""
    return lambda original, *args, **kwargs: replacement(*args, **kwargs)


_SPECULATIVE = "sglang.kernels.ops.speculative"
HOOKS = {
    f"{_SPECULATIVE}.spec_tree.build_tree_kernel_efficient_func": _instead(build_chain),
    f"{_SPECULATIVE}.spec_tree.verify_tree_greedy_func": _instead(verify_chain_greedily),
    f"{_SPECULATIVE}.eagle.fill_bonus_tokens_func": _instead(last_accepted),
    f"{_SPECULATIVE}.cache_locs.assign_draft_cache_locs_contiguous_func": _instead(draft_slots),
    f"{_SPECULATIVE}.cache_locs.assign_extend_cache_locs_uniform_func": _instead(verify_slots),
    "sglang.kernels.ops.kvcache.cache_move.copy_all_layer_kv_cache_func": _instead(move_nothing),
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": _instead(assign_slots),
    "sglang.srt.mem_cache.allocation.get_last_loc": last_slots,
    "sglang.srt.layers.rotary_embedding.get_rope": plain_rope,
    "sglang.srt.speculative.eagle_utils._verify_uses_greedy": greedy_if_all_are,
}


def put_in_place() -> None:
    """Put the functions above where SGLang calls its kernels; once per process.

    Raises
    ------
    PluginRefusal : SGLang has no function of that name any more, or is told to draw drafts at
        random, which its own kernel for that, not ours, could verify.
    """
    from sglang.srt.runtime_context import get_spec
    from sglang.srt.speculative import eagle_utils

    if get_spec().speculative_use_rejection_sampling:
        raise PluginRefusal(
            "--speculative-use-rejection-sampling needs a GPU; leave it out: on a CPU drafts are "
            "the draft model's likeliest tokens, and sampled answers are as without drafts"
        )
    apply_around(HOOKS, needed_for="speculative decoding (--speculative-algorithm)")
    # SGLang has None in these places, and its hooks replace an original wherever it is referred to
    eagle_utils.tree_speculative_sampling_target_only = verify_chain_by_sampling
    eagle_utils.top_k_renorm_prob = keep_top_k
    eagle_utils.top_p_renorm_prob = keep_top_p


def exchange_rows() -> None:
    """Let ranks that attend apart (`--attn-dp-size`) exchange rows; once per process.

    SGLang has all of it in torch as well, and takes that where its own variable for CPU kernels is
    set (`SGLANG_USE_CPU_ENGINE`), which needs a package that is not published.

    Raises
    ------
    PluginRefusal : SGLang has the choice elsewhere by now.
    """
    from sglang.srt.model_executor import forward_batch_info

    if not hasattr(forward_batch_info, "_is_cpu"):
        raise PluginRefusal("this SGLang chooses pinned memory for --attn-dp-size elsewhere")
    # two lines of its own read it: memory for copies, and the length of a padded request
    forward_batch_info._is_cpu = True
    apply_around(
        {_COPY_ROWS: copy_rows, _GATHER_ROWS: gather_rows},
        needed_for="attention apart (--attn-dp-size)",
    )


_COPY_ROWS = "sglang.srt.layers.dp_attention.memcpy_func"
_GATHER_ROWS = "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather_into_tensor"


def copy_rows(original: Any, *args: Any) -> None:
    """AROUND hook on what copies rows between buffers: SGLang's own copy of it in torch."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(*args)


def gather_rows(original: Any, group: Any, output: Tensor, own: Tensor) -> None:
    """AROUND hook on what gathers equal parts: torch's own, which its op for GPUs stands before."""
    torch.distributed.all_gather_into_tensor(output, own, group=group.device_group)
