"""Build the released model as one of several GPUs would, on the meta device, and its cache specs.

    python -m tests.integrations.vllm.building FOLDER_OF_A_CONFIG_JSON

A process of its own: vLLM believes in GPUs (`rehearsal.become_a_gpu`), its groups of ranks are real
with a backend that moves nothing. No weight is allocated and nothing is computed. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from m3_plugin.attention.backends import KernelChoice
from m3_plugin.host.torchvision_ops import declare_missing_ops
from tests.integrations.vllm.rehearsal import CHIPS, become_a_gpu, resolved

# chip, tensor parallel, pipeline stages, what else is typed
SERVERS = (
    ("H100", 1, 1, ""),
    ("H100", 2, 1, ""),
    ("H100", 4, 1, ""),
    ("H100", 8, 1, ""),
    ("H100", 8, 1, "--kv-cache-dtype fp8"),
    ("H100", 4, 2, ""),
    ("B200", 8, 1, ""),
    ("B200", 4, 2, ""),
)
AUX_LAYERS = (2, 30, 57)
GIB = 2**30


@contextmanager
def rank(config: Any, *, place: int, tensor: int, stages: int) -> Iterator[None]:
    """vLLM's groups as on the first rank of that stage of a server."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state as host

    of, size = place * tensor, tensor * stages
    make_group = torch.distributed.new_group

    def without_moving(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        return make_group(*args, backend="fake", **kwargs)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=of, world_size=size)
    patched = mock.patch.object(torch.distributed, "new_group", without_moving)
    with patched, set_current_vllm_config(config):
        host.init_distributed_environment(size, of, "env://", of, "fake")
        host.initialize_model_parallel(tensor, stages, backend="fake")
        try:
            yield
        finally:
            host.destroy_model_parallel()
            host.destroy_distributed_environment()


def on_meta() -> Any:
    """Sessions of the Triton kernels without a chip to try them on."""
    from m3_plugin.attention import assembly
    from m3_vllm import session

    triton = KernelChoice(family="triton", reason="rehearsed", refused=())
    stack = mock.patch.multiple(
        assembly, choose_kernels=lambda *a, **kw: triton, try_kernels=lambda *a, **kw: None
    )
    stack.start()
    mock.patch.object(session, "device_type", return_value="meta").start()
    return stack


def with_operations() -> None:
    """Let layers find the operations that vLLM's extensions would bring; none of them is called."""
    namespace: Any = torch._ops._OpNamespace
    known = namespace.__getattr__

    def ask(self: Any, name: str) -> Any:
        try:
            return known(self, name)
        except AttributeError:
            if self.name in ("_C", "_moe_C") and not name.startswith("__"):
                return lambda *arguments: None
            raise

    namespace.__getattr__ = ask


def build(config: Any) -> Any:
    """The model of this rank."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        return initialize_model(vllm_config=config)


def specs_of(config: Any) -> dict[str, Any]:
    """The cache spec of each layer, as vLLM's runner asks for it."""
    layers = config.compilation_config.static_forward_context
    found = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    return {name: spec for name, spec in found.items() if spec is not None}


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
        with rank(config, place=place, tensor=tensor, stages=stages):
            model = build(config)
            found.append(stage(config, model))
            specs.append(specs_of(config))
            layouts.append(layouts_of(config, specs[-1]))
    config.cache_config.block_size = 128
    made = get_kv_cache_configs(config, specs, [40 * GIB] * stages)
    return {
        "stages": found,
        "layouts": layouts,
        "layout": str(resolve_kv_cache_layout(config, layouts)),
        "blocks": [each.num_blocks for each in made],
        "groups": [len(each.kv_cache_groups) for each in made],
        "block_size": sorted({g.kv_cache_spec.block_size for g in made[0].kv_cache_groups}),
        "cached_layers": sum(len(each) for each in specs),
        "bytes_per_block": [
            sum(t.size for t in each.kv_cache_tensors) // each.num_blocks for each in made
        ],
    }


def main(folder: str) -> None:
    declare_missing_ops()
    gpu = become_a_gpu()
    base = "vllm.distributed.device_communicators.base_device_communicator"
    gpu.get_device_communicator_cls = classmethod(lambda cls: f"{base}.DeviceCommunicatorBase")
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    on_meta()
    with_operations()
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
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
