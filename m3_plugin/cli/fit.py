"""`m3-plugin fit`: how much context fits on these cards, and the command that serves it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from m3_plugin.sizing.cache_bytes import CacheDType
    from m3_plugin.sizing.fit import Fit, Weights

CPU = "CPU"
# What fp8 and fp4 caches would give, beside the requested pair.
_ALTERNATIVES = (("bf16", "bf16"), ("bf16", "int8"), ("fp8", "bf16"), ("fp8", "int8"))


@dataclass(frozen=True)
class Machine:
    """What one rank has.

    Attributes
    ----------
    memory : bytes of one device
    reserve : bytes for everything but weights and cache
    arch : compute capability as major * 10 + minor; None for a CPU or a card not in the table
    """

    name: str
    memory: int
    utilization: float
    reserve: int
    tp_size: int
    arch: int | None = None


@dataclass(frozen=True)
class Sizing:
    """Everything `fit` works out.

    Attributes
    ----------
    weights_run : host -> how it holds them on this machine; empty for a card not in the table
    dequantised : bytes of the same weights in 16 bits; None of an unquantised checkpoint
    alternatives : (K/V dtype, index dtype) to what would fit with these
    """

    model: str
    machine: Machine
    storage: str
    weights: Weights
    weights_run: dict[str, str]
    dequantised: Weights | None
    kv_dtype: CacheDType
    index_dtype: CacheDType
    fit: Fit
    alternatives: dict[tuple[str, str], Fit]

    @property
    def fits(self) -> bool:
        """Whether at least one request of the wanted length has room."""
        return self.fit.requests > 0


def fit_command(
    model: Annotated[str, typer.Option(help="A checkpoint folder, a config.json, or an id.")],
    gpu: Annotated[str, typer.Option(help="H100, H200, A100-80GB, B200, ...; CPU for none.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel ranks, one card each.")] = 8,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=1, help="GiB of one card (or of the machine), if not in the table."),
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="Storage of K and V.")] = "bf16",
    index_cache_dtype: Annotated[str, typer.Option(help="Storage of the index keys.")] = "bf16",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens per request; default: as many as fit.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.1, max=1, help="Share of the memory the server may use.")
    ] = 0.9,
    reserve: Annotated[
        float, typer.Option(min=0, help="GiB per rank for activations, graphs, communication.")
    ] = 6.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Weights, cache, longest context and launch commands from the config; exit 0 if it fits.

    Computed, not measured: --reserve and --utilization are allowances.
    """
    from m3_plugin.model.released import ModelNotFound

    try:
        machine = _machine(
            gpu, gpu_memory, tp_size=tp, utilization=utilization, reserve=int(reserve * 2**30)
        )
        sizing = size(
            model,
            machine,
            kv_dtype=_cache_dtype(kv_cache_dtype, "--kv-cache-dtype"),
            index_dtype=_cache_dtype(index_cache_dtype, "--index-cache-dtype"),
            context=max_model_len,
        )
    except (ModelNotFound, LookupError, ValueError) as error:
        message = error.args[0] if error.args else str(error)
        Console(stderr=True).print(message, style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(as_dict(sizing), indent=1))
    else:
        _print(sizing)
    raise typer.Exit(0 if sizing.fits else 1)


def size(
    model: str,
    machine: Machine,
    *,
    kv_dtype: CacheDType,
    index_dtype: CacheDType,
    context: int | None,
) -> Sizing:
    """Work everything out.

    Raises
    ------
    ModelNotFound, ValueError : no such model, or one that cannot be served or sized.
    """
    from m3_plugin.model.config import M3Config
    from m3_plugin.model.released import find_model
    from m3_plugin.quantization.chips import how_weights_run
    from m3_plugin.sizing.fit import fit, weight_bytes

    source = find_model(model)
    config = M3Config.from_hf(source.config)
    if context is not None and context > config.max_position_embeddings:
        raise ValueError(
            f"--max-model-len must be at most the model's {config.max_position_embeddings:,} "
            f"positions; got {context:,}"
        )
    loaded = weight_bytes(config, source.config, tp_size=machine.tp_size)

    def with_cache(kv: CacheDType, index: CacheDType) -> Fit:
        return fit(
            config,
            loaded,
            memory=machine.memory,
            utilization=machine.utilization,
            reserve=machine.reserve,
            tp_size=machine.tp_size,
            kv_dtype=kv,
            index_dtype=index,
            context=context,
        )

    pairs = cast("list[tuple[CacheDType, CacheDType]]", list(_ALTERNATIVES))
    return Sizing(
        model=model,
        machine=machine,
        storage=str(config.quantization or "bf16"),
        weights=loaded,
        weights_run=how_weights_run(config.quantization, arch=machine.arch)
        if machine.arch is not None or machine.name == CPU
        else {},
        dequantised=None
        if config.quantization is None
        else weight_bytes(
            replace(config, quantization=None), source.config, tp_size=machine.tp_size
        ),
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        fit=with_cache(kv_dtype, index_dtype),
        alternatives={pair: with_cache(*pair) for pair in pairs if pair != (kv_dtype, index_dtype)},
    )


def launch_commands(sizing: Sizing) -> dict[str, str]:
    """How to start each host with these numbers; none for caches the plugin cannot be told of."""
    machine, context = sizing.machine, sizing.fit.context
    on_cpu = machine.name == CPU
    if (sizing.kv_dtype, sizing.index_dtype) not in (_STORED_ON_CPU if on_cpu else _STORED):
        return {}
    variable = "M3_PLUGIN_INDEX_KEYS=int8 \\\n" if sizing.index_dtype == "int8" else ""
    cache = ""
    if sizing.kv_dtype == "fp8":
        # the kernels read e4m3 from this capability on
        e4m3 = machine.arch is None or machine.arch >= _FIRST_WITH_E4M3
        cache = f"--kv-cache-dtype {'fp8_e4m3' if e4m3 else 'fp8_e5m2'} "
    if on_cpu:
        space = math.floor(sizing.fit.budget / 2**30)
        return {
            "vLLM": f"{variable}VLLM_CPU_KVCACHE_SPACE={space} "
            "VLLM_CPU_OMP_THREADS_BIND=nobind \\\npython -m vllm.entrypoints.openai.api_server \\\n"
            f"    --model {sizing.model} --max-model-len {context} {_VLLM_PARSERS}",
            "SGLang": f"{variable}python -m sglang.launch_server --device cpu \\\n"
            f"    --model-path {sizing.model} --context-length {context} \\\n"
            f"    --max-total-tokens {sizing.fit.tokens} {_SGLANG_PARSERS}",
        }
    used = machine.memory * machine.utilization
    # SGLang's share is weights and cache alone
    static = math.floor(100 * (used - machine.reserve) / machine.memory) / 100
    return {
        "vLLM": f"{variable}vllm serve {sizing.model} --tensor-parallel-size {machine.tp_size} \\\n"
        f"    --max-model-len {context} --gpu-memory-utilization {machine.utilization:g}"
        f" \\\n    {cache}{_VLLM_PARSERS}",
        "SGLang": f"{variable}python -m sglang.launch_server --model-path {sizing.model} \\\n"
        f"    --tp {machine.tp_size} --context-length {context} "
        f"--mem-fraction-static {static:g} \\\n"
        f"    {cache}--attention-backend msa {_SGLANG_PARSERS}",
    }


_VLLM_PARSERS = (
    "--enable-auto-tool-choice --tool-call-parser minimax_m3 --reasoning-parser minimax_m3"
)
_SGLANG_PARSERS = "--tool-call-parser minimax-m3 --reasoning-parser minimax-m3"
# K and V, and index keys, as a server's options can ask for them; the numbers of others say what
# they would give.
_STORED = (("bf16", "bf16"), ("bf16", "int8"), ("fp8", "bf16"), ("fp8", "int8"))
_STORED_ON_CPU = _STORED[:2]
_FIRST_WITH_E4M3 = 89


def as_dict(sizing: Sizing) -> dict[str, Any]:
    """JSON form."""
    alternatives = [
        {"kv_dtype": kv, "index_dtype": index, **_fit_dict(fit)}
        for (kv, index), fit in sizing.alternatives.items()
    ]
    return {
        "model": sizing.model,
        "computed": True,
        "fits": sizing.fits,
        "machine": asdict(sizing.machine),
        "storage": sizing.storage,
        "weights": asdict(sizing.weights),
        "weights_run": sizing.weights_run,
        "dequantised": None if sizing.dequantised is None else asdict(sizing.dequantised),
        "kv_dtype": sizing.kv_dtype,
        "index_dtype": sizing.index_dtype,
        "fit": _fit_dict(sizing.fit),
        "alternatives": alternatives,
        "commands": launch_commands(sizing) if sizing.fits else {},
    }


def _fit_dict(fit: Fit) -> dict[str, Any]:
    return {**asdict(fit), "bytes_per_token": fit.cache.total}


def _machine(
    gpu: str, gpu_memory: float | None, *, tp_size: int, utilization: float, reserve: int
) -> Machine:
    from m3_plugin.model.released import find_gpu

    arch = None
    if gpu_memory is not None:
        name, memory = gpu, int(gpu_memory * 2**30)
    elif gpu.upper() == CPU:
        raise ValueError("--gpu CPU needs --gpu-memory: the GiB of main memory to be used")
    else:
        card = find_gpu(gpu)
        name, memory = card.name, card.memory_mib * 2**20
        arch = int(card.arch.removeprefix("sm_"))
    if gpu.upper() == CPU:
        name = CPU
        if tp_size != 1:
            raise ValueError(f"--gpu CPU is sized for one process: give --tp 1; got {tp_size}")
    return Machine(
        name=name,
        memory=memory,
        utilization=utilization,
        reserve=reserve,
        tp_size=tp_size,
        arch=arch,
    )


def _cache_dtype(value: str, option: str) -> CacheDType:
    from m3_plugin.sizing.cache_bytes import CacheDType

    aliases = {"auto": "bf16", "bfloat16": "bf16", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
    dtype = aliases.get(value, value)
    if dtype not in get_args(CacheDType):
        raise ValueError(
            f"{option} must be one of {', '.join(get_args(CacheDType))}; got {value!r}"
        )
    return cast("CacheDType", dtype)


def _print(sizing: Sizing) -> None:
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=110)
    machine, fit = sizing.machine, sizing.fit
    cards = f"{machine.tp_size} x {machine.name}" if machine.name != CPU else "CPU"
    table = Table(title=f"{sizing.model} on {cards} (computed)", show_header=False)
    rows = {
        "weights": f"{sizing.weights.total / 1e9:,.1f} GB in all, {sizing.storage}",
        **{f"- in {host}": how for host, how in sizing.weights_run.items()},
        "memory per rank": f"{_gib(machine.memory)}, of which {machine.utilization:.0%} used",
        "- weights": _gib(sizing.weights.per_rank),
        "- reserve": f"{_gib(machine.reserve)} (an allowance)",
        "= cache": _gib(fit.budget),
        "cache per token": f"{fit.cache.kv:,} B K and V + {fit.cache.index:,} B index keys "
        f"({fit.cache.index / fit.cache.total:.0%})",
        "tokens": f"{fit.tokens:,}",
        "longest context": f"{fit.longest_context:,}",
        f"requests of {fit.context:,}": f"{fit.requests:,}",
    }
    if sizing.dequantised is not None:
        wide = sizing.dequantised
        rows["weights in 16 bits"] = f"{wide.total / 1e9:,.1f} GB, {_gib(wide.per_rank)} per rank"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    others = Table(title="with other cache dtypes")
    for heading in ("K and V", "index keys", "bytes per token", "tokens", "longest", "requests"):
        others.add_column(heading, justify="right")
    for (kv, index), other in sizing.alternatives.items():
        others.add_row(
            kv,
            index,
            f"{other.cache.total:,}",
            f"{other.tokens:,}",
            f"{other.longest_context:,}",
            f"{other.requests:,} of {other.context:,}",
        )
    console.print(others)
    if not sizing.fits:
        console.print(_shortage(sizing), style="red", markup=False)
        return
    commands = launch_commands(sizing)
    if not commands:
        console.print(
            "no command: servers store K and V in bf16, on a GPU in fp8 too, and index keys in "
            "bf16 or int8"
        )
    for host, command in commands.items():
        console.print(f"\n[bold]{host}[/]")
        # as one line breaks it, so that it can be copied
        typer.echo(command)


def _shortage(sizing: Sizing) -> str:
    fit = sizing.fit
    if fit.budget <= 0:
        return (
            f"does not fit: {_gib(-fit.budget)} per rank too little for the weights alone. "
            "Use more ranks, larger cards, or a quantised checkpoint "
            "(MiniMaxAI/MiniMax-M3-MXFP8, nvidia/MiniMax-M3-NVFP4)"
        )
    return (
        f"does not fit: one request of {fit.context:,} tokens needs "
        f"{_gib(fit.cache.context(fit.context))} per rank, {_gib(fit.budget)} are left. "
        f"Lower --max-model-len to {fit.longest_context}, or store the cache in fewer bytes"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
