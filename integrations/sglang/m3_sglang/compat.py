"""The only place that reads SGLang's version or asks which platform SGLang runs on."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from packaging.version import Version

from m3_plugin.host.presence import TestedWindow
from m3_plugin.model.config import M3Config
from m3_plugin.model.mtp import mtp_config
from m3_plugin.model.pixels import PixelScale
from m3_plugin.model.resizing import FILE
from m3_plugin.model.taking import why_not_taken
from m3_plugin.settings import Settings
from m3_plugin.untrusted import read_json

_ORIGINAL_HEADS = {
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
}

# Keys which SGLang writes into a config beside what config.json says; those of heads and sizes it
# pads on a CPU begin with "original_".
_WRITTEN = frozenset(
    {
        "context_len",
        "v_head_dim",
        "swa_head_dim",
        "swa_v_head_dim",
        "encoder_only",
        "language_only",
        "language_model_only",
        "ple_offload_embedding",
        "ple_offload_backend",
        "ple_offload_dir",
    }
)
_WRITTEN_IN_VISION = frozenset({"head_dim", "num_dummy_heads"})
_WRITTEN_IN_QUANTIZATION = frozenset(
    {"packed_modules_mapping", "hf_config", "requantization_method"}
)

SGLANG_WINDOW = TestedWindow(
    package="sglang",
    minimum="0.5.19",
    below="0.5.24",
    tested=("0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
)


@functools.cache
def sglang_version() -> str:
    """Version of the installed SGLang, read without importing it.

    Once: its metadata are parsed, which takes milliseconds, and each layer asks several times.
    """
    return importlib.metadata.version("sglang")


def device_type() -> str:
    """`torch.device.type` SGLang would choose by itself on this machine.

    "cuda" is ROCm's name for its devices too, which the choice of kernels refuses.
    """
    from sglang.srt import utils

    if utils.is_cuda() or utils.is_hip():
        return "cuda"
    # no kernels of ours: not to be taken for a CPU. `is_musa` came in after the oldest release
    others = ("xpu", "npu", "hpu", "musa")
    asked = ((name, getattr(utils, f"is_{name}", None)) for name in others)
    return next((name for name, is_there in asked if is_there is not None and is_there()), "cpu")


def _is_older_than(release: str) -> bool:
    """As in `TestedWindow`, a pre-release counts as its release."""
    return Version(Version(sglang_version()).base_version) < Version(release)


def needs_vision_config_attributes() -> bool:
    """Whether this SGLang, on CPU, reads attributes of `vision_config`, which may be a dict.

    `adjust_config_with_unaligned_cpu_tp` does so up to 0.5.22 and ends with an AttributeError.
    """
    return device_type() == "cpu" and _is_older_than("0.5.23")


def needs_triton_on_cpu() -> bool:
    """Whether this SGLang, on a CPU, launches Triton kernels and captures graphs all the same.

    Its cache allocator and its choice of graphs do so up to 0.5.21.
    """
    return _is_older_than("0.5.22")


def speculation_is_tested() -> bool:
    """Whether this SGLang has the speculative workers our hooks were written for."""
    return not _is_older_than("0.5.23")


def adapters_are_tested() -> bool:
    """Whether this SGLang has the LoRA layers our hooks were written for."""
    return not _is_older_than("0.5.23")


def takes_adapters() -> bool:
    """Whether this server was started with `--enable-lora`, on a release where we serve it."""
    if not adapters_are_tested():
        return False
    from sglang.srt.runtime_context import get_lora

    return bool(get_lora().enable_lora)


def fleets_are_tested() -> bool:
    """Whether stages, experts by rank and disaggregation of this SGLang are those that were run."""
    return not _is_older_than("0.5.23")


def is_disaggregated() -> bool:
    """Whether this process belongs to a server of prompts or of decoding alone."""
    if not fleets_are_tested():
        return False
    from sglang.srt.runtime_context import get_disagg

    return get_disagg().disaggregation_mode in ("prefill", "decode")


def has_host_cache() -> bool:
    """Whether evicted pages go to a second pool (`--enable-hierarchical-cache`)."""
    if not fleets_are_tested():
        return False
    from sglang.srt.runtime_context import get_memory

    return bool(get_memory().enable_hierarchical_cache)


def has_cache_files() -> bool:
    """Whether pages go on to files just now (`--hicache-storage-backend`); that may change."""
    if not has_host_cache():
        return False
    from sglang.srt.runtime_context import get_memory

    return get_memory().hicache_storage_backend is not None


def copy_layer_by_layer(server_args: Any) -> None:
    """Declare how HiCache copies on a CPU: by rows of layers, and not by kernels."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(
        server_args,
        "m3-plugin",
        hicache_io_backend="direct",
        hicache_mem_layout="layer_first",
    )


def keep_no_retracted_requests(server_args: Any) -> None:
    """Declare that a decode server answers 503 to a request it must retract.

    SGLang would copy its caches; the pool for M3 has no such copy, and the scheduler ends.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "m3-plugin", disaggregation_decode_retraction_backup="none")


class PipelineStage(NamedTuple):
    """What this process holds of a model.

    Attributes
    ----------
    layers : its decoder layers
    is_first_rank : whether it holds the embedding
    is_last_rank : whether it holds the final norm and the head
    """

    layers: range
    is_first_rank: bool
    is_last_rank: bool


def pipeline_stage(num_layers: int) -> PipelineStage:
    """The stage of this process in a model of that many decoder layers."""
    if not fleets_are_tested():
        return PipelineStage(range(num_layers), is_first_rank=True, is_last_rank=True)
    from sglang.srt.distributed import get_pp_indices
    from sglang.srt.runtime_context import get_parallel

    rank, size = get_parallel().pp_rank, get_parallel().pp_size
    start, end = get_pp_indices(num_layers, rank, size)
    return PipelineStage(range(start, end), is_first_rank=rank == 0, is_last_rank=rank == size - 1)


class ExpertCut(NamedTuple):
    """This rank's part of a layer's routed experts.

    Attributes
    ----------
    group, groups : which of so many groups of ranks; each has experts of its own, in order
    rank, ranks : its place among the ranks of the group, which share the channels of each expert
    """

    group: int
    groups: int
    rank: int
    ranks: int

    def own(self, num_experts: int) -> range:
        """Which of a layer's experts this rank has a part of."""
        count = num_experts // self.groups
        return range(self.group * count, (self.group + 1) * count)


def expert_cut() -> ExpertCut:
    """How this process's ranks share routed experts."""
    if not fleets_are_tested():
        return ExpertCut(0, 1, tensor_parallel_rank(), tensor_parallel_size())
    from sglang.srt.runtime_context import get_parallel

    found = get_parallel()
    return ExpertCut(found.moe_ep_rank, found.moe_ep_size, found.moe_tp_rank, found.moe_tp_size)


def has_cache_budget() -> bool:
    """Whether this SGLang sizes its cache pools in `KVCacheConfigurator`; older ones in the runner.

    It came in 0.5.22.
    """
    return not _is_older_than("0.5.22")


def deep_gemm_is_the_default(device: str) -> bool:
    """Whether SGLang gives MXFP8 experts to DeepGEMM here: it does on SM100 and SM103."""
    from sglang.srt.utils import is_cuda

    if not is_cuda() or device == "cpu":
        return False
    import torch

    return torch.cuda.get_device_capability()[0] == 10


def needs_weight_only_mxfp8(device: str) -> bool:
    """Whether SGLang cannot serve MXFP8 here: its kernels are for chips of SM100 and SM103 alone.

    It refuses older chips and CPUs, and gives the experts to kernels of SM100 on later ones.

    Parameters
    ----------
    device : SGLang's server argument
    """
    from sglang.srt.utils import is_cuda

    if not is_cuda():
        return device == "cpu"
    import torch

    return torch.cuda.get_device_capability()[0] != 10


def serves_own_experts() -> bool:
    """Whether this SGLang has a scheme for NVFP4 experts beside MXFP8 weights (M3.1)."""
    return not _is_older_than("0.5.23")


def why_sglang_serves_it_better(hf_config: Any) -> str | None:
    """Why a checkpoint of M3.1 is left to SGLang on this machine; None if it is not.

    On SM100 and SM103 SGLang runs it natively, with products of FP4 and the caches it was trained
    for, which this plugin has no kernels for.
    """
    if not serves_own_experts() or not deep_gemm_is_the_default("cuda"):
        return None
    quantization = M3Config.from_hf(_values(hf_config)).quantization
    if quantization is None or not quantization.has_own_experts:
        return None
    return (
        "config key 'quantization_config.moe_quant_algo' says NVFP4, which SGLang multiplies "
        "natively on this chip"
    )


def expert_offset(layer: type, beta: float) -> dict[str, Any]:
    """The argument that tells expert kernels what they add to `up`, which some take to be 0.

    Before 0.5.22 there is none, and no kernel that would need it.
    """
    known = "gemm1_beta" in inspect.signature(layer.__init__).parameters
    return {"gemm1_beta": beta} if known else {}


def resolved(server_args: Any) -> Any:
    """What SGLang has decided so far, by the names of its arguments; read-only.

    Up to 0.5.21 it writes its decisions into the record. Later the record stays what the operator
    gave, and decisions lie beside it.
    """
    try:
        from sglang.srt.arg_groups.overrides import resolving_view
    except ImportError:
        return server_args
    return resolving_view(server_args)


def leave_prefill_graphs_out(server_args: Any) -> None:
    """Declare that steps of prompts stay out of CUDA graphs, which SGLang captures by default.

    A declaration of its own: SGLang does not take this one from what override providers return.
    """
    config = getattr(resolved(server_args), "cuda_graph_config", None)
    if config is None or config.prefill.backend == "disabled":
        return
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    graphs = with_phase(config, Phase.PREFILL, backend=Backend.DISABLED)
    declare_resolution(server_args, "m3-plugin", cuda_graph_config=graphs)


def run_adapters_in_torch(server_args: Any) -> None:
    """Declare SGLang's torch backend for LoRA adapters; its default launches Triton kernels."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "m3-plugin", lora_backend="torch_native")


def tensor_parallel_size() -> int:
    """Ranks that share each layer, from SGLang's context of the running process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_size


def tensor_parallel_rank() -> int:
    """This process's place among the ranks that share each layer."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


def attention_parallel_size() -> int:
    """Ranks that share the heads of each attention layer; fewer than all with `--attn-dp-size`."""
    if not fleets_are_tested():
        return tensor_parallel_size()
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_tp_size


def attention_parallel_rank() -> int:
    """This process's place among the ranks that share the heads of each attention layer."""
    if not fleets_are_tested():
        return tensor_parallel_rank()
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_tp_rank


def attends_apart() -> bool:
    """Whether groups of ranks attend for requests of their own (`--attn-dp-size`)."""
    return attention_parallel_size() < tensor_parallel_size()


def attention_partition() -> dict[str, Any]:
    """Arguments that cut a parallel linear among the ranks that share attention."""
    return {"parallel_group": "attn_tp"} if attends_apart() else {}


def gather_of_attention(part: Any) -> Any:
    """[n, ...] of this rank -> [ranks * n, ...] of those that share attention heads, in order."""
    from sglang.srt.distributed import parallel_state

    name = "get_attn_tp_group" if attends_apart() else "get_tp_group"
    return getattr(parallel_state, name)().all_gather(part, dim=0)


class SharedRows(NamedTuple):
    """Rows of all groups of ranks that attend apart, for layers that all of them share.

    Attributes
    ----------
    gather : this group's rows, whole on each of its ranks, and the step, to the rows of all
    scatter : the rows of all, summed over ranks, and the step, to this group's
    add_up : a part of this group's rows to the sum of its ranks
    """

    gather: Callable[[Any, Any], Any]
    scatter: Callable[[Any, Any], Any]
    add_up: Callable[[Any], Any]


def shared_rows() -> SharedRows | None:
    """SGLang's exchange between groups of ranks that attend apart; None for a single group."""
    if not attends_apart():
        return None
    from sglang.srt.layers import dp_attention as host
    from sglang.srt.runtime_context import get_parallel

    def gather(own: Any, step: Any) -> Any:
        rows = host.get_global_dp_buffer(get_parallel().tp_group)
        host.dp_gather_replicate(rows, own, step)
        return rows

    def scatter(rows: Any, step: Any) -> Any:
        own = host.get_local_dp_buffer(get_parallel().tp_group)
        host.dp_scatter(own, rows.contiguous(), step)
        return own

    return SharedRows(gather, scatter, host.attn_tp_all_reduce)


def second_stream(device_type: str) -> Any:
    """SGLang's stream for one part of a layer beside another; None where it has none."""
    if device_type != "cuda" or _is_older_than("0.5.22"):
        return None
    from sglang.srt.runtime_context import get_stream

    return get_stream("alt")


def few_rows_router() -> Any:
    """SGLang's router product of a few bf16 rows with fp32 weights, one launch; None without.

    Two functions of rows and weights: whether it takes them, and the product. Before 0.5.23 it
    takes no fp32 weights.
    """
    if _is_older_than("0.5.23"):
        return None
    from sglang.kernels.ops.gemm.router_gemv import router_gemv, router_gemv_supported

    return router_gemv_supported, router_gemv


@cache
def fused_norm_and_rope() -> Any:
    """SGLang's kernel of its own M3: Gemma norms and RoPE of q and k in place; None without.

    It is CUDA's, and 0.5.22 is the oldest release whose source was read for it.
    """
    from sglang.srt.utils import is_cuda

    if not is_cuda() or _is_older_than("0.5.22"):
        return None
    from sglang.kernels.ops.attention.minimax_qknorm_rope import minimax_qknorm_rope

    return minimax_qknorm_rope


class FusedSum(NamedTuple):
    """SGLang's sum over ranks with a norm behind it, one launch.

    Attributes
    ----------
    register : makes its buffer, on every rank
    takes : (rows, columns) to whether the buffer holds them; never before `register`
    allowed : whether nothing that is decided at run time, but for the rows, speaks against it
    sum_and_norm : part, stream, weight and epsilon of the norm to (normalised, stream)
    """

    register: Callable[[], None]
    takes: Callable[[int, int], bool]
    allowed: Callable[[], bool]
    sum_and_norm: Callable[..., tuple[Any, Any]]


def fused_sum(device_type: str) -> FusedSum | None:
    """What SGLang's own M3 sums and normalises with on this chip and these ranks; None without."""
    if device_type != "cuda" or _is_older_than("0.5.23"):
        return None
    from sglang.kernels.ops.communication.all_reduce_fusion import all_reduce_residual_norm
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
    from sglang.srt.layers.layer_boundary import get_attn_tp_context
    from sglang.srt.layers.quantization import mxfp4_flashinfer_trtllm_moe as plane
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        is_in_breakable_cuda_graph,
    )
    from sglang.srt.models import minimax_m3
    from sglang.srt.runtime_context import get_exec

    if not minimax_m3._uses_push_plane_fusion():
        return None

    def allowed() -> bool:
        return not (
            is_in_breakable_cuda_graph()
            or is_batch_invariant_mode_enabled()
            or get_attn_tp_context().input_scattered
            or get_exec().comm.enable_quant_communications
        )

    # sizes of SGLang's own M3: 341 rows of 6,144 columns
    register = partial(
        plane.register_fused_all_reduce_comm, max_push_size=4 << 20, max_push_blocks=512
    )
    return FusedSum(register, plane.can_fuse_all_reduce, allowed, all_reduce_residual_norm)


def is_capturing() -> bool:
    """Whether SGLang records this step in a CUDA graph; of releases that have a second stream."""
    from sglang.srt.model_executor.runner import get_is_capture_mode

    return get_is_capture_mode()


def shares_out_pictures() -> bool:
    """Whether each rank is to encode a part of the pictures (`--mm-enable-dp-encoder`)."""
    from sglang.srt.runtime_context import get_server_args

    server_args: Any = get_server_args()
    return bool(getattr(resolved(server_args), "mm_enable_dp_encoder", False))


def preprocessor_file(server_args: Any) -> Any:
    """What the served checkpoint's preprocessor_config.json says; {} if it has none.

    Raises
    ------
    ValueError : the file cannot be read.
    """
    from transformers.utils.hub import cached_file

    file = cached_file(
        server_args.model_path,
        FILE,
        revision=server_args.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return {} if file is None else read_json(Path(file))


def pixel_scale() -> PixelScale | None:
    """What the served checkpoint's pixels are normalised with, as every process reads it."""
    from sglang.srt.runtime_context import get_server_args

    # a fault of the file ends the server when its processor is made, unless it serves text alone
    with suppress(ValueError, OSError):
        return PixelScale.read(preprocessor_file(get_server_args()) or None)
    return None


def partition_shared_by(ranks: int) -> dict[str, Any]:
    """Arguments that let a linear of attention share each shard between consecutive ranks.

    Up to 0.5.21 SGLang's linears take rank and number of ranks, from 0.5.22 a group.
    """
    if _is_older_than("0.5.22"):
        return {
            "tp_rank": tensor_parallel_rank() // ranks,
            "tp_size": tensor_parallel_size() // ranks,
        }
    from sglang.srt.layers.linear import ReplicatedParallelGroup

    group = "attn_tp" if attends_apart() else "tp"
    return {"parallel_group": ReplicatedParallelGroup(group=group, replica_size=ranks)}


def read_config(hf_config: Any) -> M3Config:
    """The model's config as SGLang parsed it, checked for what a paged host can serve."""
    config = M3Config.from_hf(_values(hf_config))
    config.require_paged_host()
    return config


def read_draft_config(hf_config: Any) -> M3Config:
    """The MTP module's config as SGLang parsed it and `configure_draft` cut it."""
    config = mtp_config(_values(hf_config), num_modules=1)
    config.require_paged_host()
    return config


def why_left_alone(hf_config: Any, *, draft: bool) -> str | None:
    """Why a model of one of our architectures is not ours to serve; None if it is."""
    reason = why_not_taken(_values(hf_config), draft=draft)
    # a misspelt variable is reported where arguments are read
    if reason is None and not draft and not Settings.read()[0].dequantize:
        return why_sglang_serves_it_better(hf_config)
    return reason


def _values(hf_config: Any) -> dict[str, Any]:
    """The config as config.json has it, without what SGLang writes into it for itself.

    On CPU, SGLang writes more heads into the config than the checkpoint has when the ranks exceed
    them, and keeps the true numbers beside.
    """
    values = hf_config.to_dict()
    text = values.get("text_config") or values
    for key, original in _ORIGINAL_HEADS.items():
        if original in text:
            text[key] = text[original]
    for section, written in (
        (values, _WRITTEN),
        (text, _WRITTEN),
        (values.get("vision_config"), _WRITTEN_IN_VISION),
    ):
        if isinstance(section, dict):
            for key in [k for k in section if k in written or k.startswith("original_")]:
                del section[key]
    if quantization := values.get("quantization_config"):
        values["quantization_config"] = stored_quantization(quantization)
    return values


def stored_quantization(section: Mapping[str, Any]) -> dict[str, Any]:
    """A config's section on quantisation as config.json has it.

    SGLang adds keys to it while it builds the model, and names ModelOpt's method after the format
    it found (modelopt_mixed, modelopt_fp4).
    """
    stored = {k: v for k, v in section.items() if k not in _WRITTEN_IN_QUANTIZATION}
    if str(stored.get("quant_method")).startswith("modelopt_"):
        stored["quant_method"] = "modelopt"
    return stored
