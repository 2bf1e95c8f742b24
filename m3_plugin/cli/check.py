"""`m3-plugin check`: are the kernels right on this device? Every case against the oracle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from m3_plugin.cli.bench.report import (
    gpu_facts,
    headline,
    machine_facts,
    progress_bar,
    table_of,
)
from m3_plugin.cli.exits import Exit, environment, fail
from m3_plugin.cli.options import Device, JsonOption, OutputOption
from m3_plugin.cli.outputs import deliver

if TYPE_CHECKING:
    import torch

    from m3_kernels.testing.cases import Case
    from m3_plugin.attention.backends import KernelChoice
    from m3_plugin.attention.self_test import Finding

# Contexts a CPU test has no time for: selection among hundreds of blocks, offsets beyond 2**31
# bytes, a ragged batch, and a chunk of a long prompt.
LONG_STEPS = {
    "long-decode": ((131_072 + 77, 1), (20_000, 1), (128, 1)),
    "long-verify": ((65_536 - 3, 4), (9_000, 2)),
    "long-prefill": ((30_000, 70),),
    "wide-decode": tuple((2_000 + 97 * request, 1) for request in range(48)),
}


@dataclass(frozen=True)
class CaseResult:
    """One case of one kernel family.

    Attributes
    ----------
    refused : why the family declines the case; None if it ran
    must_run : whether a refusal is wrong, as it is for what MiniMax-M3 is served with
    """

    family: str
    case: str
    phase: str
    dtype: str
    findings: tuple[Finding, ...] = ()
    refused: str | None = None
    must_run: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        if self.refused is not None:
            return not self.must_run
        return all(finding.ok for finding in self.findings)


@dataclass
class CheckReport:
    """What ran where, and what was found."""

    machine: dict[str, Any]
    device: str
    repeats: int
    graph: bool
    families: dict[str, str]
    results: list[CaseResult] = field(default_factory=list)
    ok: bool = False


def check(
    device: Annotated[
        Device | None, typer.Option(help="Default: cuda if there is a GPU, else cpu.")
    ] = None,
    only: Annotated[str, typer.Option(help="Run only cases whose name contains this text.")] = "",
    family: Annotated[
        str | None,
        typer.Option(help="Run one kernel family: triton, native, torch, flashinfer."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=0, help="Repetitions that must give the same bits; default: 200 on cuda, 3 on cpu."
        ),
    ] = None,
    as_json: JsonOption = False,
    output: OutputOption = None,
) -> None:
    """Are the kernels right on this machine? Compare each with a slow reference.

    Needs no host and no weights. Whether a running server is right is what `eval needle` asks.
    """
    import torch

    from m3_kernels.tuning import arch_of

    device_type = (device or (Device.cuda if torch.cuda.is_available() else Device.cpu)).value
    with environment(LookupError, RuntimeError):
        chosen = [] if family == "flashinfer" else _families(device_type, family)
    on_gpu = device_type == "cuda"
    arch = arch_of(torch.device(device_type)) if on_gpu else None
    flashinfer, refusal = flashinfer_choice(arch)
    if flashinfer is not None and family in (None, "flashinfer"):
        chosen.append(flashinfer)
    elif family == "flashinfer":
        fail(f"flashinfer refused: {refusal}", Exit.ENVIRONMENT)
    report = CheckReport(
        machine=machine_facts() | (gpu_facts() if on_gpu else {}),
        device=device_type,
        repeats=(200 if on_gpu else 3) if repeats is None else repeats,
        graph=on_gpu,
        families={choice.name: choice.reason for choice in chosen},
    )
    work = [
        (choice, case)
        for choice in chosen
        for case in (
            _cases(choice.family, only, arch=arch)
            if choice.prefill is None
            else (case for case in prefill_cases() if only in case.name)
        )
    ]
    if not work:
        raise typer.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
    with progress_bar() as progress:
        task = progress.add_task("", total=len(work))
        for choice, case in work:
            progress.update(task, description=f"{choice.name} {case.name}")
            report.results.append(
                _run(case, choice, torch.device(device_type), report.repeats, report.graph)
            )
            progress.advance(task)
    report.ok = all(result.ok for result in report.results)
    if not as_json:
        _print(report, Console())
    deliver("check", as_dict(report), as_json=as_json, output=output)
    raise typer.Exit(Exit.of(report.ok))


def as_dict(report: CheckReport) -> dict[str, Any]:
    """JSON form; a result's `id` is its family and case, the same in every run."""
    results = [
        {"id": f"{result.family}.{result.case}", "ok": result.ok, **asdict(result)}
        for result in report.results
    ]
    return asdict(report) | {"results": results}


def _families(device_type: str, requested: str | None) -> list[KernelChoice]:
    """Every family that can run here except the oracle, or the requested one.

    Raises
    ------
    NoKernelError, LookupError : nothing to check; all reasons are named.
    typer.BadParameter : no family has that name.
    """
    import torch

    from m3_kernels import kernel_families
    from m3_plugin.attention.backends import KernelChoice, NoKernelError

    if device_type == "cuda" and not torch.cuda.is_available():
        raise LookupError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device; check `nvidia-smi` and "
            "that this torch is a CUDA build, or use --device cpu"
        )
    families = kernel_families(device_type)
    if requested is not None:
        families = tuple(entry for entry in families if entry.name == requested)
        if not families:
            raise typer.BadParameter(
                f"{requested!r} does not exist on {device_type!r}", param_hint="--family"
            )
    able = [entry for entry in families if entry.refusal is None and entry.name != "reference"]
    if not able:
        reasons = "; ".join(f"{entry.name}: {entry.refusal or 'the oracle'}" for entry in families)
        raise NoKernelError(f"nothing to check on {device_type!r} ({reasons})")
    return [KernelChoice(entry.name, f"available on {device_type}") for entry in able]


def flashinfer_choice(arch: int | None) -> tuple[KernelChoice | None, str | None]:
    """Triton with FlashInfer for prefill attention of MiniMax-M3, or why that cannot be tried.

    Parameters
    ----------
    arch : compute capability as major * 10 + minor; None on a CPU
    """
    from m3_kernels.sparse_attention import flashinfer_refusal
    from m3_plugin.attention.backends import KernelChoice

    if arch is None:
        return None, "it needs a GPU"
    served = prefill_cases()[0]
    refusal = flashinfer_refusal(
        arch=arch,
        dtype=served.dtype,
        kv_dtype=served.dtype,
        num_q_heads=served.num_q_heads,
        num_kv_heads=served.num_kv_heads,
        head_dim=served.head_dim,
        page_size=served.page_size,
        topk=served.topk,
    )
    if refusal is not None:
        return None, refusal
    return KernelChoice("triton", "its limits fit", forced=True, prefill="flashinfer"), None


def prefill_cases() -> list[Case]:
    """Prefill and mixed steps of whole models and ranks, on every layout of pages it may meet."""
    import torch

    from m3_kernels.testing.cases import production_cases
    from m3_plugin.attention.self_test import PREFILL_PAGES

    steps = {
        "long-prefill": LONG_STEPS["long-prefill"],
        "mixed": ((5_000, 300), (3_000, 1), (0, 129), (2_047, 9), (700, 4)),
    }
    return [
        replace(
            case, name=f"{case.name}-{step}-{pages}", requests=requests, pages=pages
        ).with_dtype(dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for case in production_cases()
        for step, requests in steps.items()
        for pages in PREFILL_PAGES
    ]


def _cases(family: str, only: str, *, arch: int | None) -> Iterator[Case]:
    """The shared cases in every dtype the family can be judged in; long ones on a GPU.

    Parameters
    ----------
    only : a part of the cases' names
    arch : compute capability as major * 10 + minor; None on a CPU
    """
    import torch

    from m3_kernels.testing.cases import (
        DTYPES,
        corner_cases,
        production_cases,
        regular_cases,
    )

    interpreted = family == "triton" and arch is None
    # bfloat16 arithmetic is wrong in Triton's interpreter
    dtypes = [dtype for dtype in DTYPES if not (interpreted and dtype == torch.bfloat16)]
    cases = [*regular_cases(), *corner_cases(), *production_cases(), *int8_cases()]
    if family != "triton":
        cases += planes_cases()
    if arch is not None:
        served = production_cases()[0]
        cases += [replace(served, name=name, requests=steps) for name, steps in LONG_STEPS.items()]
        if family == "triton":
            cases += fp8_cases(arch)
    for dtype in dtypes:
        for case in cases:
            if only in case.name:
                yield case.with_dtype(dtype)


def _eight_bit_steps() -> list[Case]:
    """The steps on which caches of 8 bits are checked."""
    from m3_kernels.testing.cases import production_cases, regular_cases

    return [*production_cases(), *(case for case in regular_cases() if case.name == "mixed")]


def int8_cases() -> list[Case]:
    """Index keys in int8, which every family reads."""
    import torch

    return [
        replace(case, name=f"{case.name}-int8-index", index_dtype=torch.int8)
        for case in _eight_bit_steps()
    ]


def planes_cases() -> list[Case]:
    """Index keys in two planes, which the families of a CPU read."""
    from m3_kernels.index_pages import PLANES_DTYPE

    return [
        replace(case, name=f"{case.name}-planes-index", index_dtype=PLANES_DTYPE)
        for case in _eight_bit_steps()
    ]


def fp8_cases(arch: int) -> list[Case]:
    """fp8 caches that a chip reads: K and V alone, and with index keys of 8 bits."""
    import torch

    from m3_plugin.attention.backends import E4M3_ARCH

    e4m3 = torch.float8_e4m3fn
    caches = {
        "fp8-e5m2": (torch.float8_e5m2, None),
        "fp8-e5m2-int8-index": (torch.float8_e5m2, torch.int8),
    }
    if arch >= E4M3_ARCH:
        caches |= {"fp8-e4m3": (e4m3, None), "fp8-e4m3-index": (e4m3, e4m3)}
    return [
        replace(case, name=f"{case.name}-{name}", kv_dtype=kv, index_dtype=index)
        for name, (kv, index) in caches.items()
        for case in _eight_bit_steps()
    ]


def _run(
    case: Case, kernels: KernelChoice, device: torch.device, repeats: int, graph: bool
) -> CaseResult:
    import torch

    from m3_kernels.testing.interpreter import interpreted
    from m3_plugin.attention.self_test import Finding, phase_of, verify_case

    result = CaseResult(
        family=kernels.name,
        case=case.name,
        phase=phase_of(case),
        dtype=str(case.dtype).removeprefix("torch."),
        must_run=case.head_dim == case.page_size == 128 and case.dtype != torch.float32,
    )
    on_interpreter = kernels.family == "triton" and device.type == "cpu"
    try:
        with interpreted() if on_interpreter else nullcontext():
            findings = verify_case(
                case,
                kernels=kernels,
                device=device,
                repeats=repeats,
                # captured steps are Triton's alone, to rounding only the same
                graph=graph and kernels.prefill is None,
            )
    except (NotImplementedError, TypeError, ValueError) as refusal:
        return replace(result, refused=f"{type(refusal).__name__}: {refusal}")
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        return replace(result, findings=(Finding(case.name, result.phase, "run", faults=(fault,)),))
    return replace(result, findings=findings)


def _print(report: CheckReport, console: Console) -> None:
    console.print(
        f"{headline(report.machine)}; {report.repeats} repeats, "
        f"graphs {'replayed' if report.graph else 'not used'}",
        highlight=False,
    )
    table = table_of(
        f"kernels on {report.device} against the oracle",
        left=("family", "phase", "dtype"),
        right=("cases", "refused", "wrong", "error / allowed"),
    )
    groups: dict[tuple[str, str, str], list[CaseResult]] = defaultdict(list)
    for result in report.results:
        groups[result.family, result.phase, result.dtype].append(result)
    for (family, phase, dtype), results in groups.items():
        wrong = sum(not result.ok for result in results)
        table.add_row(
            family,
            phase,
            dtype,
            str(len(results)),
            str(sum(result.refused is not None for result in results)),
            str(wrong),
            _worst(results),
            style="red" if wrong else None,
        )
    console.print(table)
    for result in report.results:
        if result.refused is not None:
            line = f"{result.family} refuses {result.case}: {result.refused}"
            console.print(line, style="yellow", markup=False, highlight=False)
        for finding in result.findings:
            for fault in finding.faults[:3]:
                line = f"{result.family} {result.case} {finding.quantity}: {fault}"
                console.print(line, style="red", markup=False, highlight=False)
    console.print("all right" if report.ok else "WRONG", style="green" if report.ok else "bold red")


def _worst(results: list[CaseResult]) -> str:
    """The largest share of an allowed error that was used."""
    shares = [
        finding.error / finding.allowed
        for result in results
        for finding in result.findings
        if finding.error is not None and finding.allowed
    ]
    return f"{max(shares):.2f}" if shares else ""
