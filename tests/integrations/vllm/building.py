"""Build the released model as one of several GPUs would, on the meta device, and its cache specs.

    python -m tests.integrations.vllm.building FOLDER_OF_A_CONFIG_JSON

In that process vLLM believes in GPUs (`rehearsal.become_a_gpu`), its groups of ranks are real
with a backend that moves nothing. No weight is allocated and nothing is computed. Prints JSON.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from m3_plugin.attention.backends import KernelChoice
from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.integrations.vllm.rehearsal import CHIPS, Anything, become_a_gpu, resolved

# chip, tensor parallel, pipeline stages, what else is typed
SERVERS = (
    ("H100", 1, 1, ""),
    ("H100", 2, 1, ""),
    ("H100", 4, 1, ""),
    ("H100", 8, 1, ""),
    ("H100", 8, 1, "--kv-cache-dtype fp8"),
    ("H100", 8, 1, "--enable-expert-parallel"),
    ("H100", 4, 2, ""),
    ("B200", 4, 2, ""),
)
# What layers take from vLLM's extensions while they are built.
OPERATIONS = (
    *("silu_and_mul", "silu_and_mul_with_clamp"),
    *("rotary_embedding", "vocab_parallel_embedding"),
)
AUX_LAYERS = (2, 30, 57)
# of a rank, for its cache
CACHE_BYTES = 400 * 2**30


@contextmanager
def rank(config: Any, *, place: int, tensor: int, stages: int, beside: int = 0) -> Iterator[None]:
    """vLLM's groups as on a rank, the first one or another, of that stage of a server."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state as host
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    of, size = place * tensor + beside, tensor * stages
    make_group = torch.distributed.new_group

    def without_moving(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return make_group(*args, backend="fake", **kwargs)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=of, world_size=size)
    with (
        mock.patch.object(torch.distributed, "new_group", without_moving),
        mock.patch.object(MessageQueue, "create_from_process_group"),
        mock.patch.object(host, "in_the_same_node_as", return_value=[True] * size),
        set_current_vllm_config(config),
    ):
        host.init_distributed_environment(size, of, "env://", of, "fake")
        host.initialize_model_parallel(tensor, stages, backend="fake")
        try:
            yield
        finally:
            host.destroy_model_parallel()
            host.destroy_distributed_environment()


def on_meta() -> None:
    """Sessions of the Triton kernels without a chip to try them on."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    from m3_plugin.attention import assembly
    from m3_vllm import session

    triton = KernelChoice(family="triton", reason="rehearsed", refused=())
    mock.patch.multiple(
        assembly,
        choose_kernels=lambda *a, **kw: triton,
        require_served=lambda *a, **kw: None,
        try_kernels=lambda *a, **kw: None,
    ).start()
    mock.patch.object(session, "device_type", return_value="meta").start()
    # which experts a rank holds is read while the model is built
    made = ExpertMapManager.__init__

    def made_of_numbers(self: Any, *arguments: Any, **options: Any) -> None:
        with torch.device("cpu"):
            made(self, *arguments, **options)

    mock.patch.object(ExpertMapManager, "__init__", made_of_numbers).start()
    # what vLLM notes of every layer for a later reload takes half of the time, and none comes
    mock.patch("vllm.model_executor.model_loader.utils.record_metadata_for_reloading").start()


def with_operations(made: Callable[[str], Any] = lambda name: lambda *arguments: None) -> None:
    """Let layers find the operations that vLLM's extensions would bring, as `made` makes them."""
    namespace: Any = torch._ops._OpNamespace
    known = namespace.__getattr__

    def ask(self: Any, name: str) -> Any:
        try:
            return known(self, name)
        except AttributeError:
            # vLLM defines operations on its own after it has asked whether they are there
            if self.name in ("_C", "_moe_C") and name in OPERATIONS:
                return made(name)
            raise

    namespace.__getattr__ = ask


def build(config: Any) -> Any:
    """The model of this rank."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        return initialize_model(vllm_config=config)


def specs_of(config: Any) -> dict[str, Any]:
    """The cache spec of each layer, as vLLM's runner finds them."""
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    return get_kv_cache_spec(config)


def layouts_of(config: Any, specs: dict[str, Any]) -> list[str]:
    """The layouts of pages this rank can do, as its worker reports them."""
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    layers = config.compilation_config.static_forward_context
    backends = {layers[name].get_attn_backend() for name in specs}
    return [layout.name for layout in get_supported_kv_cache_layouts(list(backends))]


def stage(config: Any, model: Any) -> dict[str, Any]:
    """What a pipeline stage is, with the streams of an EAGLE3 head going through it."""
    from vllm.v1.worker.gpu.spec_decode.eagle import eagle3_utils

    model.set_aux_hidden_state_layers(AUX_LAYERS)
    eagle3_utils.reserve_aux_intermediate_tensor_slots(model)
    empty = model.make_empty_intermediate_tensors(3, torch.bfloat16, "meta")
    inner = model.language_model.model
    return {
        "layers": [inner.start_layer, inner.end_layer],
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "passed": {name: list(tensor.shape) for name, tensor in empty.tensors.items()},
        "workspace": inner.session.workspace.num_bytes,
    }


def server(folder: str, tensor: int, stages: int, typed: str) -> dict[str, Any]:
    """All stages of a server, and the cache that vLLM would share among them."""
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    command = f"--tensor-parallel-size {tensor} --pipeline-parallel-size {stages} {typed}"
    found: list[dict[str, Any]] = []
    specs: list[dict[str, Any]] = []
    layouts: list[list[str]] = []
    config: Any = None
    for place in range(stages):
        config = resolved(folder, command)
        # as vLLM settles it for our backends once the model is loaded
        config.cache_config.block_size = 128
        with rank(config, place=place, tensor=tensor, stages=stages):
            model = build(config)
            found.append(stage(config, model))
            specs.append(specs_of(config))
            layouts.append(layouts_of(config, specs[-1]))
    layout = resolve_kv_cache_layout(
        config, layouts, [spec for found_specs in specs for spec in found_specs.values()]
    )
    config.cache_config.kv_cache_layout = layout.name
    made = get_kv_cache_configs(config, specs, [CACHE_BYTES] * stages)
    return {
        "stages": found,
        "layouts": layouts,
        "layout": layout.name,
        "blocks": [each.num_blocks for each in made],
        "groups": [len(each.kv_cache_groups) for each in made],
        "block_size": sorted({g.kv_cache_spec.block_size for g in made[0].kv_cache_groups}),
        "cached_layers": sum(len(each) for each in specs),
    }


@functools.cache
def prepare() -> Any:
    """Make this process one in which models are built as on GPUs; returns the platform."""
    declare_missing_ops()
    # Triton's configurations of another model's kernels, which cannot be listed without Triton;
    # passes of torch.compile, which look for operations of the extensions
    for name in (
        "vllm.model_executor.layers.mamba.ops.ssd_combined",
        "vllm.compilation.passes.pass_manager",
    ):
        sys.modules[name] = Anything(name)
    gpu = become_a_gpu()
    base = "vllm.distributed.device_communicators.base_device_communicator"
    gpu.get_device_communicator_cls = classmethod(lambda cls: f"{base}.DeviceCommunicatorBase")
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    on_meta()
    with_operations()
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, SimpleNamespace)
    # vLLM collects garbage behind every load: not through all that was imported
    gc.freeze()
    return gpu


def main(folder: str) -> None:
    from tests.integrations.vllm.drafting import drafts
    from tests.integrations.vllm.stages import loads

    gpu = prepare()
    found: dict[str, Any] = {}
    for chip, tensor, stages, typed in SERVERS:
        gpu.chip = CHIPS[chip]
        name = f"{chip}: tp {tensor}, pp {stages} {typed}".strip()
        try:
            found[name] = server(folder, tensor, stages, typed)
        except Exception as error:
            import traceback

            found[name] = {
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc()[-3000:],
            }
    gpu.chip = CHIPS["H100"]
    report = {"servers": found, "drafts": drafts(folder, gpu), "loads": loads(folder)}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
