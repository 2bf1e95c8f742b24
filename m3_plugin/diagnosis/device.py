"""Device, Triton, kernels, their self-test; `python -P -m m3_plugin.diagnosis.device` answers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3_plugin.diagnosis.child import ChildFailed, answer, ask
from m3_plugin.diagnosis.findings import Report

MODULE = "m3_plugin.diagnosis.device"
SECTION = "device"

# What processors have beside the vectors of our C++ kernels, by torch's names.
_NOT_USED = {
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "bf16 products",
    "amx_tile": "AMX",
    "bf16": "bf16 products",
    "sve": "SVE",
}


def facts(device_type: str | None = None) -> dict[str, Any]:
    """What torch, Triton and the kernels say about this machine. Initialises CUDA if there is any.

    Run it in a process of its own.

    Parameters
    ----------
    device_type : the one that is meant to serve; by default "cuda" if there is a GPU, else "cpu"
    """
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda_build": torch.version.cuda}
    found["rocm_build"] = torch.version.hip
    found["driver"] = _driver()
    found["triton"] = _triton()
    found["gpus"] = []
    if torch.version.cuda is not None:
        try:
            for index in range(torch.cuda.device_count()):
                gpu = torch.cuda.get_device_properties(index)
                found["gpus"].append(
                    {
                        "name": gpu.name,
                        "arch": f"sm_{gpu.major}{gpu.minor}",
                        "gib": round(gpu.total_memory / 2**30, 1),
                    }
                )
        except RuntimeError as error:
            found["cuda_error"] = str(error).splitlines()[0]
    has_gpus = bool(found["gpus"]) or torch.version.hip is not None
    serving = device_type or ("cuda" if has_gpus else "cpu")
    return found | _kernels(serving, is_there=serving == "cpu" or bool(found["gpus"]))


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    version = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return version.group(1) if version else None


def _triton() -> dict[str, Any]:
    try:
        import triton
        import triton.language
        from triton.runtime import driver
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        target = str(driver.active.get_current_target())
    except Exception as error:
        target = f"no active driver ({type(error).__name__}: {str(error).splitlines()[0]})"
    return {"version": triton.__version__, "target": target}


def _kernels(device_type: str, *, is_there: bool) -> dict[str, Any]:
    import torch

    from m3_kernels import kernel_families
    from m3_plugin.attention.backends import NoKernelError, choose_kernels
    from m3_plugin.attention.dense import choose_dense
    from m3_plugin.settings import Settings

    found: dict[str, Any] = {
        "device_type": device_type,
        "families": {family.name: family.refusal for family in kernel_families(device_type)},
    }
    try:
        choice = choose_kernels(device_type, Settings.from_environment().kernels)
    except (NoKernelError, ValueError) as error:
        return found | {"kernel_error": str(error)}
    found["kernels"] = choice.describe()
    if device_type == "cpu":
        dense = choose_dense(
            device_type, cache_dtype=torch.bfloat16, settings=Settings.from_environment()
        )
        found["dense"] = dense.describe("the host's own kernels")
        found |= _products()
    if not is_there:
        return found
    try:
        found["self_test"] = self_test(device_type)
    except Exception as error:
        found["self_test_error"] = f"{type(error).__name__}: {error}"
    return found


def _products() -> dict[str, Any]:
    """Who multiplies with bf16 weights on this CPU, at what cost; vectors of the C++ kernels."""
    import torch

    from m3_kernels import native_build
    from m3_plugin.model.products import choose_products
    from m3_plugin.settings import Settings

    choice = choose_products("cpu", torch.bfloat16, settings=Settings.from_environment())
    found: dict[str, Any] = {
        "products": f"{choice.describe()}; {choice.cost}",
        "products_are_slow": choice.slow,
    }
    if native_build.refusal() is None:
        # torch before 2.10 does not tell
        has = getattr(torch.cpu, "get_capabilities", dict)()
        family = native_build.vector_family()
        beyond = [words for name, words in _NOT_USED.items() if has.get(name)]
        unused = [words for words in dict.fromkeys(beyond) if words not in family]
        more = f"; the processor also has {', '.join(unused)}, not used" if unused else ""
        found["vectors"] = f"{family}{more}"
    return found


def examine(
    report: Report, wanted: str | None = None, *, timeout_s: float = 300
) -> dict[str, Any] | None:
    """Add what the child found, and return it; None if it could not answer.

    Parameters
    ----------
    wanted : the device type that is meant to serve, if any
    """
    try:
        found, _ = ask(MODULE, *filter(None, [wanted]), timeout_s=timeout_s)
    except ChildFailed as failure:
        report.add(
            SECTION,
            "torch",
            str(failure),
            status="failure",
            advice="torch or the kernels cannot even be loaded here: run "
            f"`python -P -m {MODULE}` to see the whole message, then reinstall the host",
        )
        return None
    _examine_gpus(report, found)
    _examine_triton(report, found)
    _examine_kernels(report, found)
    return found


def _examine_gpus(report: Report, found: Mapping[str, Any]) -> None:
    build = f"CUDA {found['cuda_build']}" if found["cuda_build"] else "CPU build"
    if found["rocm_build"]:
        report.add(
            SECTION,
            "torch",
            f"{found['torch']} (ROCm, HIP {found['rocm_build']})",
            status="failure",
            advice="AMD GPUs are not served by the plugin: use the host's own MiniMax-M3 there",
        )
        return
    report.add(SECTION, "torch", f"{found['torch']} ({build})")
    report.add(SECTION, "NVIDIA driver", found["driver"] or "none", status="note")
    if "cuda_error" in found:
        report.add(
            SECTION,
            "GPU",
            found["cuda_error"],
            status="failure",
            advice="torch was built for CUDA and cannot start it: compare the driver with "
            "torch's CUDA release, and look at CUDA_VISIBLE_DEVICES",
        )
    elif found["gpus"]:
        for number, gpu in enumerate(found["gpus"]):
            value = f"{gpu['name']}, {gpu['arch']}, {gpu['gib']} GiB"
            report.add(SECTION, f"GPU {number}", value, id=f"gpu.{number}")
    elif found["device_type"] == "cuda":
        report.add(
            SECTION,
            "GPU",
            "none is visible",
            status="failure",
            advice="the host would not start on a GPU: look at nvidia-smi, at "
            "CUDA_VISIBLE_DEVICES, and whether the container was given GPUs (--gpus all)",
        )
    elif found["driver"]:
        report.add(
            SECTION,
            "GPU",
            "there is a driver, but torch sees no GPU",
            status="warning",
            advice="install the host's CUDA build of torch, or look at CUDA_VISIBLE_DEVICES",
        )
    else:
        report.add(SECTION, "GPU", "none: a server would run on the CPU", status="note")


def _examine_triton(report: Report, found: Mapping[str, Any]) -> None:
    triton = found["triton"]
    needed = found["device_type"] == "cuda"
    if "error" in triton:
        report.add(
            SECTION,
            "Triton",
            f"cannot be imported: {triton['error']}",
            status="failure" if needed else "warning",
            advice="GPU kernels need it and hosts may too: reinstall the release the host pins "
            "(`pip install --force-reinstall triton==...`)",
        )
    else:
        report.add(SECTION, "Triton", f"{triton['version']}, target: {triton['target']}")


def _examine_kernels(report: Report, found: Mapping[str, Any]) -> None:
    for name, refusal in found["families"].items():
        value = "can run" if refusal is None else f"refused: {refusal}"
        report.add("kernels", name, value, status="ok" if refusal is None else "note")
    if "kernel_error" in found:
        report.add(
            "kernels",
            "choice",
            found["kernel_error"],
            status="failure",
            advice="the host's own M3 would serve: remove the cause above, or unset "
            "M3_PLUGIN_KERNELS to let the plugin choose",
        )
        return
    report.add("kernels", "choice", found["kernels"])
    if "dense" in found:
        report.add("kernels", "dense layers", found["dense"])
    if "vectors" in found:
        report.add("kernels", "vectors", found["vectors"])
    if "products" in found:
        slow = found["products_are_slow"]
        report.add(
            "kernels",
            "products of bf16 weights",
            found["products"],
            id="kernels.products",
            status="warning" if slow else "ok",
            advice="let our product have them: unset M3_PLUGIN_PRODUCTS, see that the C++ kernels "
            "can run, or serve with --dtype float32 where memory suffices"
            if slow
            else "",
        )
    if "self_test_error" in found:
        report.add(
            "kernels",
            "self-test",
            found["self_test_error"],
            status="failure",
            advice=_when_wrong(found["device_type"]),
        )
    elif "self_test" in found:
        report.add("kernels", "self-test", found["self_test"])


def _when_wrong(device_type: str) -> str:
    """What to do about kernels that do not give the reference's numbers."""
    # on a GPU there is one family of kernels, on a CPU there are several
    way_out = (
        "M3_PLUGIN_DISABLE=1 serves with the host's own MiniMax-M3"
        if device_type == "cuda"
        else "M3_PLUGIN_KERNELS=torch takes slower ones, M3_PLUGIN_DISABLE=1 the host's own M3"
    )
    return (
        "these kernels do not give the reference's numbers on this machine: do not serve with "
        f"them. {way_out}. Please report what m3-plugin check --json prints"
    )


def self_test(device_type: str) -> str:
    """Run one group of a released layer on the chosen kernels and compare it with the oracle.

    Raises
    ------
    KernelsAreWrongError : they disagree; the message says where and by how much.
    """
    import torch

    from m3_plugin.attention import self_test
    from m3_plugin.attention.backends import choose_kernels
    from m3_plugin.model.config import M3Config
    from m3_plugin.model.released import released_config
    from m3_plugin.settings import Settings

    config = M3Config.from_hf(released_config())
    assert config.msa is not None
    kernels = choose_kernels(device_type, Settings.from_environment().kernels)
    findings = self_test.self_test(
        config.msa,
        kernels=kernels,
        num_q_heads=config.num_attention_heads // config.num_key_value_heads,
        num_kv_heads=1,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        dtype=torch.bfloat16,
        device=torch.device(device_type),
    )
    self_test.require_right(findings, kernels=kernels, device=device_type)
    worst = max((f.error or 0.0) / f.allowed for f in findings if f.allowed)
    return f"{len(findings)} comparisons with the oracle, largest error {worst:.0%} of the allowed"


if __name__ == "__main__":
    answer(facts(*sys.argv[1:2]))
