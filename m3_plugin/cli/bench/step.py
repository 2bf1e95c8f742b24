"""What a whole decode step of a real server consists of, with our dense layers and the host's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from m3_plugin.cli.bench.serve import Load, Server, measure
from m3_plugin.cli.bench.serve import Row as ServeRow
from m3_plugin.cli.hosts import HOSTS, MODEL_NAME, Host
from m3_plugin.host.serving import ServerProcess, free_port

OUTPUT_TOKENS = 32
# More than MiniMax-M3's 2,304 bytes per token and layer in bf16, index keys among them.
CACHE_BYTES_PER_TOKEN_AND_LAYER = 2560

Kernel = Literal["ours", "host"]
MODEL = "1 dense and 3 sparse layers, 64 heads, hidden size 1,024, bf16"


@dataclass(frozen=True)
class StepRow:
    """One context on one server; decode times are means over the tokens of an answer.

    Attributes
    ----------
    dense : whose kernel attended in the dense layer: "ours" or "host"
    first_token_ms : reading the prompt
    step_ms : per further token, as the server counted it
    msa_ms : of it all MSA layers
    dense_ms : of it the dense layer's attention; of the host's own kernel, what its step takes
        beyond its MSA layers and the rest of the step with ours
    rest_ms : projections, experts, norms and the host; the same for both
    """

    dense: Kernel
    context: int
    first_token_ms: float
    step_ms: float
    msa_ms: float
    dense_ms: float
    rest_ms: float


def measure_steps(contexts: list[int], *, host: Host, console: Console) -> list[StepRow]:
    """Serve a random checkpoint of MiniMax-M3's heads twice and measure answers.

    One dense and three sparse layers in bf16, hidden size 1,024: the shape at which a step's parts
    can be told apart on a small machine.

    Raises
    ------
    ServerFailed : a server did not start.
    ClientFailed : the host's client gave no result, or the server did not count its layers' times.
    """
    loads = [Load(context, OUTPUT_TOKENS, requests=1, concurrency=1) for context in contexts]
    with (
        tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder,
        console.status("writing a random checkpoint"),
    ):
        checkpoint = write_step_checkpoint(Path(folder) / "checkpoint")
        longest = max(load.context + load.output_tokens for load in loads)
        kernels: tuple[Kernel, ...] = ("ours", "host")
        rows = {}
        for dense in kernels:
            with served(checkpoint, dense, longest=longest, host=host) as server:
                rows[dense] = measure(server, loads, host=host)
    return [
        row
        for ours, hosts in zip(rows["ours"], rows["host"], strict=True)
        for row in parts_of(ours, hosts)
    ]


def parts_of(ours: ServeRow, hosts: ServeRow) -> tuple[StepRow, StepRow]:
    """The parts of a step from the same load on both servers.

    Raises
    ------
    LookupError : a server did not count the times of its layers.
    """
    if ours.dense_ms is None or ours.step_ms is None or hosts.step_ms is None:
        raise LookupError(
            f"the servers at {ours.context:,} tokens did not count the times of their layers; "
            "their kernels must be those of a CPU (m3-plugin doctor says which can run)"
        )
    rest = ours.step_ms - _msa(ours) - ours.dense_ms
    dense_of_host = hosts.step_ms - _msa(hosts) - rest
    return (
        _step(ours, "ours", dense_ms=ours.dense_ms, rest_ms=rest),
        _step(hosts, "host", dense_ms=dense_of_host, rest_ms=rest),
    )


def _step(row: ServeRow, dense: Kernel, *, dense_ms: float, rest_ms: float) -> StepRow:
    assert row.step_ms is not None
    return StepRow(
        dense=dense,
        context=row.context,
        first_token_ms=row.ttft_ms,
        step_ms=row.step_ms,
        msa_ms=_msa(row),
        dense_ms=dense_ms,
        rest_ms=rest_ms,
    )


def _msa(row: ServeRow) -> float:
    return sum(part or 0.0 for part in (row.store_ms, row.select_ms, row.attend_ms))


def write_step_checkpoint(folder: Path) -> Path:
    """A random checkpoint of `MODEL`; returns the folder."""
    import torch

    from m3_plugin.testing.random_checkpoint import PRESETS, write_random_checkpoint

    shape = replace(
        PRESETS["kernel"],
        hidden_size=1024,
        num_attention_heads=64,
        dense_intermediate_size=2048,
        intermediate_size=512,
        shared_intermediate_size=512,
        num_local_experts=16,
    )
    return write_random_checkpoint(folder, preset=shape, dtype=torch.bfloat16)


@contextmanager
def served(
    checkpoint: Path, dense: Kernel, *, longest: int, host: Host, threads: int | None = None
) -> Iterator[Server]:
    """A server of the checkpoint, with room for one request at a time.

    Parameters
    ----------
    dense : whose kernel attends in the dense layer
    longest : tokens of a request, answer included
    threads : None for the host's own choice
    """
    with tempfile.TemporaryDirectory(prefix="m3-plugin-bench-") as folder:
        scratch = Path(folder)
        port = free_port()
        environment = dict(host.environment(scratch)) | {
            "M3_PLUGIN_STATISTICS": "0",
            "M3_PLUGIN_TIMINGS": "1",
            "M3_PLUGIN_DENSE": "auto" if dense == "ours" else "host",
        }
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with ServerProcess(
            host.command(checkpoint, port, (*host.options, *_room(host, longest + 64))),
            port=port,
            log=scratch / "server.log",
            environment=environment,
        ) as server:
            server.wait_until_ready()
            name = f"dense layers: {dense}"
            yield Server(name, server.url, MODEL_NAME, str(checkpoint))


def _room(host: Host, tokens: int) -> tuple[str, ...]:
    """Options, after those of every small server, for contexts of so many tokens."""
    # a prompt beside the one before, which stays in the prefix cache
    cached = 2 * (-(-tokens // 128) + 1) * 128
    if host is HOSTS["vllm"]:
        layers = 4
        cache = str(cached * layers * CACHE_BYTES_PER_TOKEN_AND_LAYER)
        return "--max-model-len", str(tokens), "--kv-cache-memory-bytes", cache
    return "--context-length", str(tokens), "--max-total-tokens", str(cached)
