"""`m3-plugin fit`: how much context fits on these cards, and the command that serves it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from m3_plugin.cli.exits import Exit, call, environment
from m3_plugin.cli.options import JsonOption, OutputOption
from m3_plugin.cli.outputs import deliver
from m3_plugin.quantization.chips import DEQUANTISED, LEFT_TO_SGLANG
from m3_plugin.sizing.fit import GIB, RESERVE, UTILIZATION

if TYPE_CHECKING:
    from m3_plugin.model.released import ModelSource
    from m3_plugin.sizing.cache_bytes import CacheDType
    from m3_plugin.sizing.decode_speed import DecodeSpeed
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
    served : the model as a host's command line must name it
    downloaded : whether its files are on this machine
    text_only : whether the servers take no images and videos
    weights_run : host -> how it holds them on this machine; empty for a card not in the table
    dequantised : bytes of the same weights in 16 bits; None of an unquantised checkpoint
    dequantised_fit : what fits beside those
    alternatives : (K/V dtype, index dtype) to what would fit with these
    draft : bytes of a draft model beside the weights, which is not served; 0 without one
    decode : the most that one request can decode at its longest, if a bandwidth was given
    """

    model: str
    served: str
    downloaded: bool
    text_only: bool
    machine: Machine
    storage: str
    weights: Weights
    weights_run: dict[str, str]
    dequantised: Weights | None
    dequantised_fit: Fit | None
    kv_dtype: CacheDType
    index_dtype: CacheDType
    fit: Fit
    alternatives: dict[tuple[str, str], Fit]
    draft: int = 0
    decode: DecodeSpeed | None = None

    @property
    def fits(self) -> bool:
        """Whether at least one request of the wanted length has room."""
        return self.fit.requests > 0


def fit_command(
    model: Annotated[
        str, typer.Option(help="A checkpoint folder, a config.json, or a repository id.")
    ],
    gpu: Annotated[
        str, typer.Option(help="The GPU: H100, H200, A100-80GB, B200, ...; CPU for none.")
    ],
    tp: Annotated[int, typer.Option(min=1, help="How many GPUs share the model.")] = 8,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=1, help="GiB of one GPU that is not in our table, or of the CPU."),
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="How K and V are cached: bf16, fp8.")] = (
        "bf16"
    ),
    index_cache_dtype: Annotated[
        str, typer.Option(help="How the index keys are cached: bf16, int8, planes.")
    ] = "bf16",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one request, answer included. Default: all that fit."),
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Serve no images and videos.")
    ] = False,
    utilization: Annotated[
        float, typer.Option(min=0.1, max=1, help="Share of the memory that the server may use.")
    ] = UTILIZATION,
    reserve: Annotated[
        float, typer.Option(min=0, help="GiB of each GPU for everything but weights and cache.")
    ] = RESERVE / GIB,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1, help="With --gpu CPU: GB/s of its memory, for a bound on decoding."),
    ] = None,
    as_json: JsonOption = False,
    output: OutputOption = None,
) -> None:
    """Does MiniMax-M3 fit on these GPUs, with how much context, and which command serves it?

    Computed from the checkpoint's config, not measured: --reserve and --utilization are allowances.
    Needs no GPU, no weights and no network.
    """
    with call("", LookupError, ValueError):
        machine = _machine(
            gpu, gpu_memory, tp_size=tp, utilization=utilization, reserve=int(reserve * 2**30)
        )
        sizing = size(
            model,
            machine,
            kv_dtype=_cache_dtype(kv_cache_dtype, "--kv-cache-dtype"),
            index_dtype=_cache_dtype(index_cache_dtype, "--index-cache-dtype"),
            context=max_model_len,
            text_only=text_only,
            bandwidth=bandwidth,
        )
    if not as_json:
        _print(sizing)
    deliver("fit", as_dict(sizing), as_json=as_json, output=output)
    raise typer.Exit(Exit.of(sizing.fits))


def size(
    model: str,
    machine: Machine,
    *,
    kv_dtype: CacheDType,
    index_dtype: CacheDType,
    context: int | None,
    text_only: bool = False,
    bandwidth: float | None = None,
) -> Sizing:
    """Work everything out.

    Parameters
    ----------
    bandwidth : GB/s of a CPU's memory, if decoding is to be bounded

    Raises
    ------
    typer.Exit : no such model, or a config.json that cannot be read or served.
    ValueError : it cannot be split over so many ranks, or has no such context.
    """
    from m3_plugin.model.config import M3Config
    from m3_plugin.model.released import ModelNotFound, find_model
    from m3_plugin.quantization.chips import how_weights_run
    from m3_plugin.sizing.decode_speed import decode_speed
    from m3_plugin.sizing.fit import fit, weight_bytes

    with environment(ModelNotFound, ValueError):
        source = find_model(model)
        config = M3Config.from_hf(source.config)
    if context is not None and context > config.max_position_embeddings:
        raise ValueError(
            f"--max-model-len must be at most the model's {config.max_position_embeddings:,} "
            f"positions; got {context:,}"
        )
    if bandwidth is not None and machine.name != CPU:
        raise ValueError(f"--bandwidth is for --gpu CPU alone; got {machine.name}")
    loaded = weight_bytes(config, source.config, tp_size=machine.tp_size)

    wide = (
        None
        if config.quantization is None
        else weight_bytes(
            replace(config, quantization=None), source.config, tp_size=machine.tp_size
        )
    )

    def with_cache(kv: CacheDType, index: CacheDType, weights: Weights = loaded) -> Fit:
        return fit(
            config,
            weights,
            memory=machine.memory,
            utilization=machine.utilization,
            reserve=machine.reserve,
            tp_size=machine.tp_size,
            kv_dtype=kv,
            index_dtype=index,
            context=context,
        )

    fitted = with_cache(kv_dtype, index_dtype)
    weights_run = (
        how_weights_run(config.quantization, arch=machine.arch)
        if machine.arch is not None or machine.name == CPU
        else {}
    )
    pairs = cast("list[tuple[CacheDType, CacheDType]]", list(_ALTERNATIVES))
    return Sizing(
        model=model,
        # a config.json names its folder
        served=str(source.folder) if Path(model).expanduser().is_file() else model,
        downloaded=source.folder is not None,
        text_only=text_only,
        machine=machine,
        storage=str(config.quantization or "bf16"),
        weights=loaded,
        weights_run=weights_run,
        dequantised=wide,
        dequantised_fit=None if wide is None else with_cache(kv_dtype, index_dtype, wide),
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        fit=fitted,
        alternatives={pair: with_cache(*pair) for pair in pairs if pair != (kv_dtype, index_dtype)},
        draft=_draft_bytes(source),
        decode=None
        if bandwidth is None
        else decode_speed(
            replace(config, quantization=None) if DEQUANTISED in weights_run.values() else config,
            fitted.cache,
            context=fitted.context,
            bandwidth=bandwidth * 1e9,
        ),
    )


def _draft_bytes(source: ModelSource) -> int:
    """What a DSpark model takes on the disk, or of the download."""
    from m3_plugin.checkpoint.headers import read_draft
    from m3_plugin.model.released import published_draft_bytes

    if source.folder is None:
        return published_draft_bytes(source.name)
    try:
        return sum(header.num_bytes for header in read_draft(source.folder))
    except (OSError, ValueError):
        # not served, so that its faults are nothing to end with
        return 0


def download_command(sizing: Sizing) -> str | None:
    """How to fetch the files first; None if they are here."""
    return None if sizing.downloaded else f"hf download {sizing.served}"


def launch_commands(sizing: Sizing) -> dict[str, str]:
    """How to start each host with these numbers, once the files are downloaded.

    Returns
    -------
    dict : host -> command; empty for caches that no server can be told to keep
    """
    if not _is_stored(sizing):
        return {}
    makers = {"vLLM": _vllm_command, "SGLang": _sglang_command}
    return {
        host: make(sizing, _fit_on(sizing, host), _variables(sizing, host))
        for host, make in makers.items()
        if _fit_on(sizing, host).requests > 0
    }


def _is_stored(sizing: Sizing) -> bool:
    """Whether a server can be told to keep such caches."""
    known = _STORED_ON_CPU if sizing.machine.name == CPU else _STORED
    return (sizing.kv_dtype, sizing.index_dtype) in known


def _is_widened(sizing: Sizing, host: str) -> bool:
    """Whether this host can hold the weights in 16 bits only."""
    return sizing.weights_run.get(host) == DEQUANTISED


def _fit_on(sizing: Sizing, host: str) -> Fit:
    widened = sizing.dequantised_fit if _is_widened(sizing, host) else None
    return sizing.fit if widened is None else widened


def _variables(sizing: Sizing, host: str) -> list[str]:
    found: list[str] = list(_VARIABLES)
    if _is_widened(sizing, host):
        found.append("M3_PLUGIN_DEQUANTIZE=1")
    if sizing.index_dtype in ("int8", "planes"):
        found.append(f"M3_PLUGIN_INDEX_KEYS={sizing.index_dtype}")
    return found


def _cache_option(sizing: Sizing) -> list[str]:
    if sizing.kv_dtype != "fp8":
        return []
    # the kernels read e4m3 from this capability on
    e4m3 = sizing.machine.arch is None or sizing.machine.arch >= _FIRST_WITH_E4M3
    return [f"    --kv-cache-dtype {'fp8_e4m3' if e4m3 else 'fp8_e5m2'}"]


def _vllm_command(sizing: Sizing, fit: Fit, variables: list[str]) -> str:
    machine = sizing.machine
    if machine.name == CPU:
        space = math.floor(fit.budget / GIB)
        start = [
            f"VLLM_CPU_KVCACHE_SPACE={space} VLLM_CPU_OMP_THREADS_BIND=nobind",
            f"python -P -m vllm.entrypoints.openai.api_server --model {sizing.served}",
            f"    --max-model-len {fit.context}",
        ]
    else:
        start = [
            f"vllm serve {sizing.served} --tensor-parallel-size {machine.tp_size}",
            f"    --max-model-len {fit.context} --gpu-memory-utilization {machine.utilization:g}",
        ]
    media = []
    if sizing.text_only:
        media = ["    --language-model-only"]
    elif fit.context > _PROFILED_CONTEXT:
        media = ["    --skip-mm-profiling"]
    return _lines(
        *(*variables, _VLLM_METRICS), *start, *_cache_option(sizing), *media, _VLLM_PARSERS
    )


def _sglang_command(sizing: Sizing, fit: Fit, variables: list[str]) -> str:
    machine = sizing.machine
    program = f"python -P -m sglang.launch_server --model-path {sizing.served}"
    if machine.name == CPU:
        start = [
            f"{program} --device cpu",
            f"    --context-length {fit.context} --max-total-tokens {fit.tokens}",
        ]
    else:
        used = machine.memory * machine.utilization
        # SGLang's share is weights and cache alone
        static = math.floor(100 * (used - machine.reserve) / machine.memory) / 100
        start = [
            f"{program} --tp {machine.tp_size}",
            f"    --context-length {fit.context} --mem-fraction-static {static:g}",
        ]
        if sizing.weights_run.get("SGLang") == LEFT_TO_SGLANG:
            # its experts there have room for chunks of so many tokens, its cache one dtype
            start.append("    --chunked-prefill-size 8192 --kv-cache-dtype fp8_e4m3")
            own = [variable for variable in variables if not variable.startswith("M3_PLUGIN_")]
            return _lines(*own, *start, _SGLANG_PARSERS)
        start.append("    --attention-backend msa")
    return _lines(*variables, *start, *_cache_option(sizing), _SGLANG_PARSERS)


def _lines(*parts: str) -> str:
    """Variables on lines of their own, the options below the program."""
    return " \\\n".join(parts)


def remarks(sizing: Sizing) -> list[str]:
    """What to know about options in the commands, or about some that are not in them."""
    if not _is_stored(sizing):
        return [
            "no command: servers store K and V in bf16, on a GPU in fp8 too, and index keys in "
            "bf16 or int8, on a CPU in two planes too"
        ]
    found = []
    commands = launch_commands(sizing)
    for host in sizing.weights_run:
        if host not in commands and sizing.dequantised is not None:
            found.append(
                f"no command for {host}: there the weights are held in 16 bits, "
                f"{_gib(sizing.dequantised.per_rank)} per rank, which leaves too little for "
                "requests of this length"
            )
    if sizing.text_only:
        found.append(
            "--language-model-only: vLLM loads no vision tower and refuses images and videos. "
            "SGLang has the option too and refuses it for MiniMax-M3: there the tower is loaded"
        )
    elif "--skip-mm-profiling" in commands.get("vLLM", ""):
        found.append(
            "--skip-mm-profiling: vLLM would set memory aside for one video as long as the whole "
            "context. Without that, very long videos may run out of memory. If you serve text "
            "alone, give --text-only here"
        )
    return found


def commands_for(model: str, gpu: str, *, tp_size: int, context: int) -> dict[str, str]:
    """The commands for a card in the table, as `fit` prints them."""
    machine = _machine(gpu, None, tp_size=tp_size, utilization=UTILIZATION, reserve=RESERVE)
    return launch_commands(
        size(model, machine, kv_dtype="bf16", index_dtype="bf16", context=context)
    )


# A server that is not ours, or asks the network for files it has, is noticed at its start.
_VARIABLES: tuple[str, ...] = ("M3_PLUGIN_REQUIRED=1", "HF_HUB_OFFLINE=1")
# an empty folder, by which vLLM collects the metrics of its workers, ours among them
_VLLM_METRICS = 'PROMETHEUS_MULTIPROC_DIR="$(mktemp -d)"'
# beyond this, vLLM's recipe for MiniMax-M3 leaves the profile of a video of that length out
_PROFILED_CONTEXT = 32_768
_VLLM_PARSERS = (
    "    --enable-auto-tool-choice --tool-call-parser minimax_m3 --reasoning-parser minimax_m3"
)
_SGLANG_PARSERS = "    --tool-call-parser minimax-m3 --reasoning-parser minimax-m3 --enable-metrics"
# K and V, and index keys, as a server's options can ask for them; the numbers of others say what
# they would give.
_STORED = (("bf16", "bf16"), ("bf16", "int8"), ("fp8", "bf16"), ("fp8", "int8"))
_STORED_ON_CPU = (*_STORED[:2], ("bf16", "planes"))
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
        "draft_bytes": sizing.draft,
        "kv_dtype": sizing.kv_dtype,
        "index_dtype": sizing.index_dtype,
        "fit": _fit_dict(sizing.fit),
        "alternatives": alternatives,
        "decode": None
        if sizing.decode is None
        else {**asdict(sizing.decode), "tokens_per_second": sizing.decode.tokens_per_second},
        "download": download_command(sizing),
        "commands": launch_commands(sizing) if sizing.fits else {},
        "remarks": remarks(sizing) if sizing.fits else [],
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
        "tokens of all requests together": f"{fit.tokens:,}",
        "longest single request": f"{fit.longest_context:,} tokens, prompt and answer",
        f"requests of {fit.context:,} tokens at once": f"{fit.requests:,}",
    }
    if sizing.dequantised is not None:
        wide = sizing.dequantised
        rows["weights in 16 bits"] = f"{wide.total / 1e9:,.1f} GB, {_gib(wide.per_rank)} per rank"
    if sizing.draft:
        rows["draft model"] = f"{sizing.draft / 1e9:,.1f} GB in dspark/, not served and not loaded"
    if (decode := sizing.decode) is not None:
        rows[f"decoding at {decode.context:,} tokens (a model)"] = (
            f"at most {decode.tokens_per_second:,.1f} tokens per second: "
            f"{decode.weights / 1e9:,.1f} GB of weights and {decode.cache / 1e9:,.2f} GB of cache "
            f"per token at {decode.bandwidth / 1e9:,.0f} GB/s"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    others = Table(title="with other cache dtypes")
    for heading in (
        *("K and V", "index keys", "bytes per token"),
        *("tokens of all\nrequests", "longest single\nrequest", "requests at once"),
    ):
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
    if commands and not sizing.downloaded:
        console.print("\n[bold]first[/], once per machine")
        typer.echo(download_command(sizing))
    for host, command in commands.items():
        console.print(f"\n[bold]{host}[/]")
        # as one line breaks it, so that it can be copied
        typer.echo(command)
    for remark in remarks(sizing):
        console.print(f"\n{remark}", markup=False, highlight=False)


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
