"""The faults, and the tests that must notice each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change of one line, as a careless hand would make it.

    Attributes
    ----------
    name : what is wrong with it
    file : relative to the repository
    old, new : text that occurs exactly once, and what takes its place
    tests : files whose tests must fail
    select : pytest's `-k`, to run those that matter
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    select: str = ""


KERNELS = "kernels/m3_kernels"
INDEX = ("tests/kernels/test_index_topk.py",)
PLANES = ("tests/kernels/test_index_planes.py",)
ATTENTION = ("tests/kernels/test_sparse_attention.py", "tests/kernels/test_invariance.py")
DENSE = ("tests/kernels/test_dense_attention.py",)
STORE = ("tests/kernels/test_cache_store.py",)
INDEX_TRITON = ("tests/kernels/triton/test_index_topk.py",)
ATTENTION_TRITON = ("tests/kernels/triton/test_sparse_attention.py",)
STORE_TRITON = ("tests/kernels/triton/test_cache_store.py",)
SESSION = ("tests/plugin/attention/test_session.py",)
CONFIG = ("tests/plugin/model/test_config.py",)
WORKSPACE = ("tests/plugin/attention/test_workspace.py",)
CHECKS = ("tests/plugin/attention/test_checks.py",)
SOAK = ("tests/plugin/soak",)
NATIVE_BUILD = ("tests/kernels/test_native_build.py",)
GPU_SERVERS = ("tests/integrations/vllm/test_gpu_servers.py",)
GRAPHS = ("tests/integrations/sglang/test_graphs.py",)
SGLANG = "integrations/sglang/m3_sglang"

FAULTS = (
    # index_topk in C++
    Fault(
        "index native: ties go to the higher id",
        f"{KERNELS}/index_topk/native.cpp",
        "if (scores[b] > heap[0].score) {",
        "if (scores[b] >= heap[0].score) {",
        INDEX,
    ),
    Fault(
        "index native: the block of the row itself is not visible",
        f"{KERNELS}/index_topk/native.cpp",
        "const int64_t visible = (tile.position + row) / page_size_ + 1;",
        "const int64_t visible = std::max<int64_t>(1, (tile.position + row) / page_size_);",
        INDEX,
    ),
    Fault(
        "index native: keys behind the row count",
        f"{KERNELS}/index_topk/native.cpp",
        "if (seen < kPanel) dot = first_lanes(seen - v * kLanes) ? dot : splat(kMinusInfinity);",
        "",
        INDEX,
    ),
    Fault(
        "index native: NaN wins",
        f"{KERNELS}/index_topk/native.cpp",
        "best = dot > best ? dot : best;",
        "best = best > dot ? best : dot;",
        INDEX,
    ),
    Fault(
        "index native: init blocks are not forced",
        f"{KERNELS}/index_topk/native.cpp",
        "const int64_t init_end = std::min(num_init_, visible);",
        "const int64_t init_end = 0 * std::min(num_init_, visible);",
        INDEX,
    ),
    Fault(
        "index native: one local block too few",
        f"{KERNELS}/index_topk/native.cpp",
        "visible - std::min(num_local_, visible))};",
        "visible - std::min(std::max<int64_t>(0, num_local_ - 1), visible))};",
        INDEX,
    ),
    Fault(
        "index native: ids stay in order of score",
        f"{KERNELS}/index_topk/native.cpp",
        "        std::sort(begin, end);\n",
        "",
        INDEX,
    ),
    Fault(
        "index native: scales of int8 keys are of the next token",
        f"{KERNELS}/index_topk/native.cpp",
        "page * scales_->stride[0] + key, present);",
        "page * scales_->stride[0] + key + (key + present < page_size_), present);",
        INDEX,
    ),
    # index keys in two planes
    Fault(
        "planes native: the low bytes may be of half their size",
        f"{KERNELS}/native_planes.h",
        "constexpr float kLowPlaneBound = 128.02f;",
        "constexpr float kLowPlaneBound = 2.0f;",
        PLANES,
    ),
    Fault(
        "planes native: a block is what one of its tokens scores",
        f"{KERNELS}/index_topk/native.cpp",
        "std::max(score, second[b])",
        "score",
        PLANES,
    ),
    Fault(
        "planes native: what could be as good as the next is chosen",
        f"{KERNELS}/index_topk/native.cpp",
        "if (range.low > ceiling) {",
        "if (range.low >= floor) {",
        PLANES,
    ),
    Fault(
        "planes native: tokens behind a row are seen",
        f"{KERNELS}/index_topk/native.cpp",
        "if (causal) bound = number < seen ? bound : nothing;",
        "",
        PLANES,
    ),
    Fault(
        "planes: low bytes of the next token",
        f"{KERNELS}/cache_store/native.cpp",
        "page * low_pages->stride[0] + offset * low_pages->stride[1], low->size[1]);",
        "page * low_pages->stride[0], low->size[1]);",
        STORE,
    ),
    # index_topk in torch
    Fault(
        "index torch: equal scores beyond the room are taken too",
        f"{KERNELS}/index_topk/torch_cpu.py",
        "(equal & (equal.cumsum(dim=-1) <= room))",
        "(equal & (equal.cumsum(dim=-1) <= room + 1))",
        INDEX,
    ),
    Fault(
        "index torch: local blocks come before init blocks",
        f"{KERNELS}/index_topk/torch_cpu.py",
        "for tier in (init, local, visible & ~init & ~local):",
        "for tier in (local, init, visible & ~init & ~local):",
        INDEX,
    ),
    Fault(
        "index torch: NaN is kept",
        f"{KERNELS}/index_topk/torch_cpu.py",
        "        dots.masked_fill_(dots.isnan(), -math.inf)\n",
        "",
        INDEX,
    ),
    # index_topk in Triton
    Fault(
        "index triton: -0.0 ranks below 0.0",
        f"{KERNELS}/index_topk/triton_select.py",
        "bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)",
        "bits = score.to(tl.int32, bitcast=True)",
        INDEX_TRITON,
    ),
    Fault(
        "index triton: negative scores rank upside down",
        f"{KERNELS}/index_topk/triton_select.py",
        "scored = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        "scored = tl.where(bits < 0, bits, bits)",
        INDEX_TRITON,
    ),
    Fault(
        "index triton: the higher id wins a tie",
        f"{KERNELS}/index_topk/triton_select.py",
        "tl.min(tl.where(key == top, block, NO_BLOCK), axis=0)",
        "tl.max(tl.where(key == top, block, -1), axis=0)",
        INDEX_TRITON,
    ),
    Fault(
        "index triton: local blocks beyond the room are in no order",
        f"{KERNELS}/index_topk/triton_select.py",
        "tl.where(crowded, tl.where(init_alone, TAKEN, scored), LOCAL_KEY)",
        "LOCAL_KEY",
        INDEX_TRITON,
    ),
    Fault(
        "index triton: rows before position 0 see block 0",
        f"{KERNELS}/index_topk/triton_select.py",
        "own = tl.where(position < 0, -1, position // PAGE_SIZE)",
        "own = position // PAGE_SIZE",
        INDEX_TRITON,
    ),
    # sparse_attention
    Fault(
        "attention native: the last key of a block is not seen",
        f"{KERNELS}/sparse_attention/native.cpp",
        "if (id < 0 || id > own) continue;",
        "if (id < 0 || id >= own) continue;",
        ATTENTION,
    ),
    Fault(
        "attention native: an id twice counts twice",
        f"{KERNELS}/sparse_attention/native.cpp",
        "return static_cast<int32_t>(std::unique(sorted, end) - sorted);",
        "return static_cast<int32_t>(end - sorted);",
        ATTENTION,
    ),
    Fault(
        "attention native: sums are merged without their maxima",
        f"{KERNELS}/native_attention.h",
        "into.sum = into.sum * old_weight + part.sum",
        "into.sum = into.sum + part.sum",
        ATTENTION,
    ),
    Fault(
        "attention native: no scale",
        f"{KERNELS}/native_attention.h",
        "Floats x = load<Floats>(logits + j) * splat(scale_);",
        "Floats x = load<Floats>(logits + j);",
        ATTENTION,
    ),
    # dense_attention
    Fault(
        "dense native: the last segment is left out",
        f"{KERNELS}/dense_attention/native.cpp",
        "return (tile.position + tile.rows - 1) / (page_size_ * kSegmentBlocks) + 1;",
        "return (tile.position + tile.rows - 1) / (page_size_ * kSegmentBlocks);",
        DENSE,
    ),
    Fault(
        "dense native: a row sees the key after its own",
        f"{KERNELS}/dense_attention/native.cpp",
        "const int64_t seen = tile.position + row - start + 1;",
        "const int64_t seen = tile.position + row - start + 2;",
        DENSE,
    ),
    Fault(
        "dense native: segments are those of the tile, not of the context",
        f"{KERNELS}/dense_attention/native.cpp",
        "const int64_t begin = segment * kSegmentBlocks;",
        "const int64_t begin = segment * kSegmentBlocks + (tile.rows > kFewRows);",
        DENSE,
    ),
    Fault(
        "dense native: split steps merge the segments of another head",
        f"{KERNELS}/dense_attention/native.cpp",
        "write_tile(w, tile, i % kv_heads_);",
        "write_tile(w, tile, (i + 1) % kv_heads_);",
        DENSE,
    ),
    Fault(
        "attention native: panels of values are those of other channels",
        f"{KERNELS}/native_attention.h",
        "pack_value_panel(values, d, count, w.v_panels + d * page_size_);",
        "pack_value_panel(values, 0, count, w.v_panels + d * page_size_);",
        DENSE,
    ),
    Fault(
        "dense torch: rows of a chunk see its last row's keys",
        f"{KERNELS}/dense_attention/torch_cpu.py",
        "logits.masked_fill_(key_position > position[:, None], -math.inf)",
        "logits.masked_fill_(key_position > position[-1], -math.inf)",
        DENSE,
    ),
    Fault(
        "dense torch: earlier pages keep their weight",
        f"{KERNELS}/dense_attention/torch_cpu.py",
        "attended *= (log_sum[..., None] - base).exp_()",
        "attended *= 1",
        DENSE,
    ),
    Fault(
        "vLLM: layers with a window are attended whole",
        "integrations/vllm/m3_vllm/cpu_dense.py",
        "and self.sliding_window == -1",
        "and self.sliding_window >= -1",
        ("tests/integrations/vllm/test_cpu_dense.py",),
    ),
    Fault(
        "attention torch: future keys of the last block are seen",
        f"{KERNELS}/sparse_attention/torch_cpu.py",
        "visible = valid[..., None] & (key_positions <= position[:, None, None, None])",
        "visible = valid[..., None] & (key_positions >= 0)",
        ATTENTION,
    ),
    Fault(
        "attention torch: an invisible NaN is multiplied by zero",
        f"{KERNELS}/sparse_attention/torch_cpu.py",
        "    values.masked_fill_(~visible.transpose(2, 3), 0)\n",
        "",
        ATTENTION,
    ),
    Fault(
        "attention torch: the page table of request 0 for all",
        f"{KERNELS}/sparse_attention/torch_cpu.py",
        "page_table[request[rows]],",
        "page_table[request[rows] * 0],",
        ATTENTION,
    ),
    # cache_store
    Fault(
        "store native: V goes where K goes",
        f"{KERNELS}/cache_store/native.cpp",
        "page * v_pages->stride[0] + head * v_pages->stride[1] + offset * v_pages->stride[2],",
        "page * v_pages->stride[0] + head * v_pages->stride[1] + offset * k_pages->stride[2],",
        STORE,
    ),
    Fault(
        "store native: padding is stored",
        f"{KERNELS}/cache_store/native.cpp",
        "if (slot < 0) return;",
        "if (slot < -1) return;",
        STORE,
    ),
    Fault(
        "store triton: int8 index keys are truncated",
        f"{KERNELS}/cache_store/triton_write.py",
        "key = (key + 12582912.0) - 12582912.0",
        "key = tl.floor(key)",
        STORE_TRITON,
    ),
    Fault(
        "store triton: scales of an fp8 cache multiply",
        f"{KERNELS}/cache_store/triton_write.py",
        "values = values * tl.div_rn(1.0, scale)[:, None]",
        "values = values * scale[:, None]",
        STORE_TRITON,
    ),
    # the session and what goes with it
    Fault(
        "session: statistics count prefill as decode",
        "m3_plugin/attention/session.py",
        'if batch.phase == "decode":\n            self.decode_rows',
        'if batch.phase != "decode":\n            self.decode_rows',
        ("tests/plugin/attention/test_session.py", "tests/plugin/attention/test_observers.py"),
    ),
    Fault(
        "rope: angles in the order of the other convention",
        "m3_plugin/model/rope.py",
        "return torch.cat((angles.cos(), angles.sin()), dim=-1)",
        "return torch.cat((angles.sin(), angles.cos()), dim=-1)",
        ("tests/plugin/model/test_rope.py",),
    ),
    Fault(
        "rope: frequencies of another base",
        "m3_plugin/model/rope.py",
        "frequencies = (1.0 / theta**exponents)",
        "frequencies = (1.0 / (theta + 1) ** exponents)",
        ("tests/plugin/model/test_rope.py",),
    ),
    Fault(
        "heads: ranks beyond the heads get none",
        "m3_plugin/model/config.py",
        "return max(1, num_heads // tp_size)",
        "return num_heads // tp_size",
        ("tests/plugin/sizing/test_cache_bytes.py",),
    ),
    Fault(
        "sizing: int8 index keys have no scales",
        "m3_plugin/sizing/cache_bytes.py",
        '_SCALE_BYTES = {"int8": 2,',
        '_SCALE_BYTES = {"int8": 0,',
        ("tests/plugin/sizing/test_cache_bytes.py",),
    ),
    Fault(
        "sizing: values count once, not as keys and values",
        "m3_plugin/sizing/cache_bytes.py",
        "kv = 2 * heads",
        "kv = heads",
        ("tests/plugin/sizing/test_cache_bytes.py",),
    ),
    # checkpoints
    Fault(
        "codecs: the high half of a byte comes first",
        "m3_plugin/quantization/codecs.py",
        "torch.stack((packed & 0xF, packed >> 4), dim=-1)",
        "torch.stack((packed >> 4, packed & 0xF), dim=-1)",
        ("tests/plugin/quantization/test_codecs.py",),
    ),
    Fault(
        "codecs: an exponent of zero is zero",
        "m3_plugin/quantization/codecs.py",
        "torch.where(stored == 0, _FP32_TWO_TO_MINUS_127, stored <<",
        "torch.where(stored == 0, 0, stored <<",
        ("tests/plugin/quantization/test_codecs.py",),
    ),
    Fault(
        "codecs: the global scale always multiplies",
        "m3_plugin/quantization/codecs.py",
        "scales = scales / factor if weight.divides else scales * factor",
        "scales = scales * factor",
        ("tests/plugin/quantization/test_codecs.py",),
    ),
    Fault(
        "codecs: stored zero points without their offset",
        "m3_plugin/quantization/codecs.py",
        '(unpack_nibbles(parts["qzeros"]).T + weight.stored_zero_offset)',
        '(unpack_nibbles(parts["qzeros"]).T)',
        ("tests/plugin/quantization/test_codecs.py",),
    ),
    Fault(
        "codecs: columns of an act-order export in order",
        "m3_plugin/quantization/codecs.py",
        "    if stored is not None:\n        return stored.long()\n",
        "",
        ("tests/plugin/quantization/test_codecs.py",),
    ),
    Fault(
        "plan triton: rows belong to the request before",
        "kernels/m3_kernels/work_plan/triton.py",
        "(ends[None, :] <= row[:, None])",
        "(ends[None, :] < row[:, None])",
        ("tests/kernels/triton/test_work_plan.py",),
    ),
    Fault(
        "plan triton: ranges by truncated 32-bit products",
        "kernels/m3_kernels/work_plan/triton.py",
        "begin = (taker.to(tl.int64) * total // num_programs).to(tl.int32)",
        "begin = taker * (total // num_programs)",
        ("tests/kernels/triton/test_work_plan.py",),
    ),
    Fault(
        "plan triton: requests behind the first chunk are lost",
        "kernels/m3_kernels/work_plan/triton.py",
        "total += tl.sum(decode_blocks(",
        "total = tl.sum(decode_blocks(",
        ("tests/kernels/triton/test_work_plan.py",),
    ),
    Fault(
        "experts: gate is clamped on both sides",
        "m3_plugin/model/experts.py",
        "gate = gate.clamp(max=config.swiglu_limit)",
        "gate = gate.clamp(-config.swiglu_limit, config.swiglu_limit)",
        ("tests/plugin/model/test_experts.py",),
    ),
    Fault(
        "experts: no plus one",
        "m3_plugin/model/experts.py",
        "((up + config.swiglu_beta) * glu)",
        "(up * glu)",
        ("tests/plugin/model/test_experts.py",),
    ),
    Fault(
        "loading: a foreign tensor counts as ours",
        "m3_plugin/checkpoint/loading.py",
        "if self.is_foreign(name) or self._is_cache_scale(name, tensor):",
        "if self._is_cache_scale(name, tensor):",
        ("tests/plugin/checkpoint/test_loading.py",),
    ),
    Fault(
        "headers: a file that is too long is whole",
        "m3_plugin/checkpoint/headers.py",
        "if end != behind and all(",
        "if end > behind and all(",
        ("tests/plugin/checkpoint",),
    ),
    # the tests' own tools
    Fault(
        "gate: spills are no fault",
        f"{KERNELS}/testing/compile_gate.py",
        "if compiled.stack or spills:",
        "if compiled.stack and spills:",
        ("tests/kernels/triton/test_compile_gate.py",),
        "judgement",
    ),
    Fault(
        "gate: another option, the same fingerprint",
        f"{KERNELS}/testing/compile_gate.py",
        "        sorted(given.items()),\n",
        "",
        ("tests/kernels/triton/test_compile_gate.py",),
        "fingerprints",
    ),
    Fault(
        "environments: PyTorch's index is asked first",
        "constraints/torch_index.py",
        "elif is_found(torch):",
        "elif is_found(torch) and False:",
        ("tests/plugin/test_torch_index.py",),
    ),
    # what only a GPU server does
    Fault(
        "vLLM: a cache that is taken away stays alive",
        "integrations/vllm/m3_vllm/caches.py",
        "        self.caches: MSACaches | None = None\n",
        "        self.__dict__.setdefault('caches', None)\n",
        GPU_SERVERS,
    ),
    Fault(
        "vLLM: pipeline stages of a B200 disagree on the layout",
        "integrations/vllm/m3_vllm/backend.py",
        "        if device_major() == 10:\n",
        "        if device_major() == 11:\n",
        GPU_SERVERS,
    ),
    Fault(
        "vLLM: an EAGLE3 head reads one rank's part of the stream",
        "integrations/vllm/m3_vllm/model.py",
        "if partial and index + 1 in self.aux_hidden_state_layers:",
        "if partial and index in ():",
        ("tests/integrations/vllm/test_norms.py",),
        "sums_over_ranks",
    ),
    Fault(
        "workspace: counters of parts are what memory holds",
        "m3_plugin/attention/workspace.py",
        "        self.scratch.attention.arrivals.zero_()\n",
        "",
        WORKSPACE,
        "no_part_arrived",
    ),
    Fault(
        "attention decode: the page table's width is compiled for",
        f"{KERNELS}/sparse_attention/triton_decode.py",
        '    "table_stride",\n    "lse_stride_row",',
        '    "lse_stride_row",',
        WORKSPACE,
        "serving_compiles_nothing",
    ),
    Fault(
        "warm-up: long contexts are left to the first user",
        "m3_plugin/attention/warm_up.py",
        "for max_seq_len in shorter | {capacity.max_seq_len}:",
        "for max_seq_len in shorter:",
        WORKSPACE,
        "serving_compiles_nothing",
    ),
    Fault(
        "vLLM: a stage does not say how wide an EAGLE3 head's streams are",
        "integrations/vllm/m3_vllm/model.py",
        "        self.config = vllm_config.model_config.hf_text_config\n        plan =",
        "        plan =",
        ("tests/integrations/vllm/test_building.py",),
    ),
    Fault(
        "vision: one rank encodes all pictures",
        "m3_plugin/model/vision_shares.py",
        "        rank = patches.index(min(patches))\n",
        "        rank = 0\n",
        ("tests/plugin/model/test_vision_shares.py",),
    ),
    Fault(
        "warm-up: contexts of middle length are left to the first user",
        f"{KERNELS}/index_topk/workspace.py",
        "CHOICE_BLOCKS = (256, 1024)",
        "CHOICE_BLOCKS = (256,)",
        WORKSPACE,
        "serving_compiles_nothing",
    ),
    Fault(
        "mxfp8 triton: a program of its own takes the first segment",
        f"{KERNELS}/mxfp8_linear/triton.py",
        "start = segment * SEGMENT",
        "start = segment * 0",
        ("tests/kernels/triton/test_mxfp8_linear.py",),
    ),
    Fault(
        "mxfp8 triton: a program that takes all segments sums them as one",
        f"{KERNELS}/mxfp8_linear/triton.py",
        "for start in range(0, num_columns, SEGMENT):\n"
        "            end = tl.minimum(num_columns, start + SEGMENT)",
        "for start in range(0, num_columns, num_columns):\n            end = num_columns",
        ("tests/kernels/triton/test_mxfp8_linear.py",),
        "segments_of_columns",
    ),
    Fault(
        "mxfp8 triton: tiles of prompts wait for the first prompt",
        f"{KERNELS}/mxfp8_linear/triton.py",
        "for tokens in (*least, *most):",
        "for tokens in most:",
        ("tests/kernels/triton/test_mxfp8_linear.py",),
        "compiled_ahead",
    ),
    Fault(
        "tuning: every context is looked up anew",
        f"{KERNELS}/index_topk/triton.py",
        "blocks = power_of_two(plan.max_blocks)",
        "blocks = plan.max_blocks",
        ("tests/kernels/triton/test_host_time.py",),
    ),
    Fault(
        "SGLang: row starts of a captured graph belong to nobody",
        f"{SGLANG}/graphs.py",
        "cu_seqlens_q=self.starts[step.query_len][: num_reqs + 1],",
        "cu_seqlens_q=self.starts.pop(step.query_len)[: num_reqs + 1].clone(),",
        GRAPHS,
        "first_graph",
    ),
    Fault(
        "SGLang: graphs multiply by router weights of before an update",
        f"{SGLANG}/router.py",
        "            self.parts.copy_(bf16_parts(",
        "            self.parts = (bf16_parts(",
        ("tests/integrations/sglang/test_router.py",),
    ),
    Fault(
        "vLLM: further steps of a draft keep the first one's division of work",
        "integrations/vllm/m3_vllm/backend.py",
        "        self.session.replan(metadata.plan)\n",
        "        metadata.plan.batch.seq_lens\n",
        ("tests/integrations/vllm/test_graphs.py",),
        "divides_its_work",
    ),
    Fault(
        "SGLang: drafting steps share one division of work",
        f"{SGLANG}/session.py",
        "            plan_buffers=allocate_work_plan(\n",
        "            plan_buffers=session.workspace.plan_buffers or allocate_work_plan(\n",
        ("tests/integrations/sglang/test_sessions.py",),
        "all_its_steps",
    ),
    Fault(
        "descriptors of pages are made for every launch",
        f"{KERNELS}/triton_shared.py",
        "    if key not in kept:\n",
        "    if True:\n",
        ("tests/kernels/triton/test_host_time.py",),
        "descriptor",
    ),
    Fault(
        "SGLang: rows of a padded request lie before position 0",
        f"{SGLANG}/graphs.py",
        "if step.query_len > step.unseen + 1:",
        "if step.query_len < step.unseen:",
        GRAPHS,
        "padded",
    ),
    Fault(
        "SGLang: a replay makes the page table of the whole context",
        f"{SGLANG}/graphs.py",
        "seq_lens=batch.seq_lens,",
        "seq_lens=batch.seq_lens.clamp(min=self.req_to_token.shape[1]),",
        GRAPHS,
        "replay_reads",
    ),
    Fault(
        "SGLang: caches take the workspace's memory",
        f"{SGLANG}/registration.py",
        "return max(0, available - wanted)",
        "return max(0, available)",
        ("tests/integrations/sglang/test_memory.py",),
    ),
    Fault(
        "SGLang: attention is cut among ranks that see other requests",
        f"{SGLANG}/options.py",
        '    "attn_dp_size": (_ONE, _DATA_PARALLEL),\n',
        "",
        ("tests/integrations/sglang/test_arguments.py",),
    ),
    Fault(
        "checks: a page outside the pool passes",
        "m3_plugin/attention/checks.py",
        "outside = visible & ((table < 0) | (table >= num_pages))",
        "outside = visible & (table < 0)",
        CHECKS,
    ),
    Fault(
        "checks: a page of another place passes",
        "m3_plugin/attention/checks.py",
        "    yield from _pages_at_two_places(table, visible, num_pages=num_pages)\n",
        "",
        CHECKS,
    ),
    Fault(
        "checks: a row may be stored anywhere",
        "m3_plugin/attention/checks.py",
        "torch.nonzero((own >= 0) & (own != wanted))",
        "torch.nonzero((own >= 0) & (own < 0))",
        CHECKS,
    ),
    Fault(
        "checks: a gap in what was chosen passes",
        "m3_plugin/attention/checks.py",
        "    good &= (chosen == front).all(-1)\n",
        "",
        CHECKS,
    ),
    Fault(
        "checks: a step that drafting changes is looked at once",
        "m3_plugin/attention/session.py",
        "            self.checker.replanned()\n",
        "            pass\n",
        CHECKS,
    ),
    Fault(
        "weights: large numbers are taken for infinite ones",
        "m3_plugin/checkpoint/finite.py",
        "        if bad:\n",
        "        if True:\n",
        ("tests/plugin/checkpoint/test_finite.py",),
    ),
    Fault(
        "weights: NaN in 8 bits passes",
        "m3_plugin/checkpoint/finite.py",
        "return (values.view(torch.uint8) & 0x7F) > largest",
        "return (values.view(torch.uint8) & 0x7F) > 0x7F",
        ("tests/plugin/checkpoint/test_finite.py",),
    ),
    Fault(
        "checks: NaN behind the last attention passes",
        "m3_plugin/attention/checks.py",
        "    finite = torch.isfinite(hidden[: len(rows.request)]).all(-1).cpu()\n",
        "    finite = torch.ones(len(rows.request), dtype=torch.bool)\n",
        CHECKS,
    ),
    Fault(
        "checks: rows of a step before are those of a rehearsal",
        "m3_plugin/attention/checks.py",
        "        begun, self._begun = self._begun, False\n",
        "        begun = self._begun\n",
        CHECKS,
    ),
    Fault(
        "weights: NaN is found by nobody at the first load",
        "m3_plugin/checkpoint/updates.py",
        "    require_finite(text.parameters, told)\n",
        "",
        ("tests/plugin/checkpoint/test_finite.py",),
        "first_load",
    ),
    Fault(
        "native build: builders do not wait for each other",
        f"{KERNELS}/native_build.py",
        "                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        NATIVE_BUILD,
        "starting_together",
    ),
    Fault(
        "native build: a library that was cut short is loaded",
        f"{KERNELS}/native_build.py",
        "        if found.st_size < table + entry_size * entries:\n",
        "        if found.st_size < 0:\n",
        NATIVE_BUILD,
        "cut_short",
    ),
    Fault(
        "native build: a full disk ends the start",
        f"{KERNELS}/native_build.py",
        "    except OSError as error:\n        # a full disk",
        "    except ZeroDivisionError as error:\n        # a full disk",
        NATIVE_BUILD,
        "locks_or_room",
    ),
    Fault(
        "native build: a home that cannot be written ends the start",
        f"{KERNELS}/native_build.py",
        "    except (OSError, RuntimeError) as error:\n",
        "    except RuntimeError as error:\n",
        NATIVE_BUILD,
        "unusable_cache_folder",
    ),
    Fault(
        "native build: a lock is waited for by the wall clock",
        f"{KERNELS}/native_build.py",
        "        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS\n",
        "        deadline = time.time() + LOCK_TIMEOUT_SECONDS\n",
        ("tests/test_architecture.py",),
        "wall_clock",
    ),
    Fault(
        "recorder: a full disk ends the request",
        "m3_plugin/attention/recorder.py",
        "            self._end(str(error))\n",
        "            raise\n",
        ("tests/plugin/attention/test_selection.py",),
        "full_disk",
    ),
    Fault(
        "vLLM: an engine outlives the process that started it",
        "integrations/vllm/m3_vllm/orphans.py",
        "        os.kill(engine, signal.SIGTERM)\n",
        "        return\n",
        ("tests/integrations/vllm/test_orphans.py",),
        "killed_starter",
    ),
    Fault(
        "soak: a long answer in plain text is never wrong",
        "m3_plugin/soak/judging.py",
        'request.kind == "long" and prompt.exact',
        'request.kind == "long"',
        SOAK,
    ),
    Fault(
        "soak: an error in a stream is an end",
        "m3_plugin/soak/driver.py",
        "reply.finished = not reply.reason",
        "reply.finished = True",
        SOAK,
    ),
    Fault(
        "soak: a refusal without a reason passes",
        "m3_plugin/soak/judging.py",
        "if not reply.reason or (",
        "if (",
        SOAK,
    ),
    Fault(
        "soak: what a client heard before it left is not judged",
        "m3_plugin/soak/judging.py",
        "if prompt is None or prompt.begins_right(said):",
        "if True:",
        SOAK,
    ),
    Fault(
        "soak: the warm-up counts for slopes",
        "m3_plugin/soak/record.py",
        "if at >= WARM_UP and minute.idle",
        "if minute.idle",
        SOAK,
    ),
    Fault(
        "a draw that is taken back is lost",
        "integrations/vllm/m3_vllm/cpu_repairs.py",
        "            self.set_state(self._seeded)\n        return self",
        "            pass\n        return self",
        ("tests/integrations/vllm/test_cpu_repairs.py",),
        "parts_of_a_prompt",
    ),
    Fault(
        "an adapter of an expert is passed over",
        "m3_plugin/checkpoint/adapters.py",
        "    if part not in taken:",
        "    if part not in taken and not part.startswith('block_sparse_moe'):",
        ("tests/plugin/checkpoint/test_adapters.py",),
    ),
    Fault(
        "rows without an adapter get one",
        "integrations/vllm/m3_vllm/cpu_repairs.py",
        "[self.token_lora_indices < 0] = 0",
        "[self.token_lora_indices < -1] = 0",
        ("tests/integrations/vllm/test_cpu_repairs.py",),
    ),
)
