"""How the command line starts a small M3 on each host, and where it finds the host's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from m3_plugin.diagnosis import Report
from m3_plugin.diagnosis.hosts import HOSTS as ENTRIES
from m3_plugin.diagnosis.hosts import examine_allow_list, examine_settings, installed_version
from m3_plugin.host.serving import sglang_command, vllm_command
from m3_plugin.model.config import PAGED_BLOCK_SIZE

MODEL_NAME = "minimax-m3-constructed"
MAX_MODEL_LEN = 32768


@dataclass(frozen=True)
class DraftCounters:
    """What the host itself counts of speculative decoding, and where.

    Attributes
    ----------
    steps : counter in its metrics: verified chains of drafts, per request
    drafted, accepted : draft tokens: counters in its metrics or, with `details`, fields of those
    details : object in an answer's last chunk, by the keys that lead there; empty: no such object
    asked_by : addition to the body of a request, whose answer then has `details`
    """

    steps: str
    drafted: str
    accepted: str
    details: tuple[str, ...] = ()
    asked_by: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Host:
    """One serving framework as the demo uses it.

    Attributes
    ----------
    title : its name for people
    command : (model, port, options) to a command line
    options : for a small model on a CPU
    environment : (scratch folder) to variables of the server's process
    metrics : prefix of its Prometheus metrics
    speculative_options : (model) to options which draft 3 tokens with the model's MTP module
    draft_counters : how it counts drafts
    load_options : (tokens of a request, tokens of the cache, requests at a time) to options; they
        win over `options`
    reset_path : empties its prefix cache when posted to
    """

    title: str
    command: Callable[[Path, int, Sequence[str]], list[str]]
    options: tuple[str, ...]
    environment: Callable[[Path], Mapping[str, str]]
    metrics: str
    speculative_options: Callable[[Path], tuple[str, ...]]
    draft_counters: DraftCounters
    load_options: Callable[[int, int, int], tuple[str, ...]]
    reset_path: str


_COMMON_ENVIRONMENT = {
    "M3_PLUGIN_REQUIRED": "1",
    "M3_PLUGIN_STATISTICS": "1",
    "HF_HUB_OFFLINE": "1",
    # spinning worker threads starve each other on machines with few cores
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN keeps a compiled product for each number of rows it has met, 1,024 of them if it may:
    # memory that grows with every length of prompt and looks like a leak
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def _vllm_environment(scratch: Path) -> Mapping[str, str]:
    counters = scratch / "prometheus"
    counters.mkdir()
    return {
        **_COMMON_ENVIRONMENT,
        "PROMETHEUS_MULTIPROC_DIR": str(counters),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # every core, instead of leaving one to the API server
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_RPC_BASE_PATH": str(scratch),
    }


HOSTS: Mapping[str, Host] = {
    "vllm": Host(
        title="vLLM",
        command=lambda model, port, options: vllm_command(model, port=port, options=options),
        options=(
            *("--served-model-name", MODEL_NAME),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--max-num-batched-tokens", "2048"),
            *("--max-num-seqs", "4"),
            *("--kv-cache-memory-bytes", str(512 << 20)),
            *("--limit-mm-per-prompt", '{"image": 2, "video": 1}'),
            "--enforce-eager",
            "--enable-prompt-tokens-details",
            *("--tool-call-parser", "minimax_m3", "--enable-auto-tool-choice"),
            *("--reasoning-parser", "minimax_m3"),
        ),
        environment=_vllm_environment,
        metrics="vllm",
        speculative_options=lambda model: (
            "--speculative-config",
            '{"method": "mtp", "num_speculative_tokens": 3}',
        ),
        draft_counters=DraftCounters(
            steps="vllm:spec_decode_num_drafts_total",
            drafted="vllm:spec_decode_num_draft_tokens_total",
            accepted="vllm:spec_decode_num_accepted_tokens_total",
        ),
        load_options=lambda longest, cached, requests: (
            *("--max-model-len", str(longest)),
            *("--num-gpu-blocks-override", str(-(-cached // PAGED_BLOCK_SIZE))),
            *("--max-num-seqs", str(requests)),
        ),
        # with VLLM_SERVER_DEV_MODE=1
        reset_path="/reset_prefix_cache",
    ),
    "sglang": Host(
        title="SGLang",
        command=lambda model, port, options: sglang_command(model, port=port, options=options),
        options=(
            *("--served-model-name", MODEL_NAME),
            *("--device", "cpu"),
            *("--context-length", str(MAX_MODEL_LEN)),
            *("--max-total-tokens", str(2 * MAX_MODEL_LEN)),
            *("--max-running-requests", "4"),
            *("--mem-fraction-static", "0.1"),
            *("--chunked-prefill-size", "2048"),
            "--sleep-on-idle",
            "--enable-metrics",
            "--enable-cache-report",
            *("--tool-call-parser", "minimax-m3"),
            *("--reasoning-parser", "minimax-m3"),
        ),
        environment=lambda scratch: _COMMON_ENVIRONMENT,
        metrics="sglang",
        speculative_options=lambda model: (
            *("--speculative-algorithm", "NEXTN"),
            *("--speculative-draft-model-path", str(model)),
            *("--speculative-num-steps", "3"),
            *("--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", "4"),
            "--disable-cuda-graph",
        ),
        draft_counters=DraftCounters(
            steps="sglang:spec_verify_calls_total",
            drafted="spec_num_proposed_drafts",
            accepted="spec_num_correct_drafts",
            details=("sglext", "spec_tokens_details"),
            asked_by={"return_spec_tokens_details": True},
        ),
        load_options=lambda longest, cached, requests: (
            *("--context-length", str(longest)),
            *("--max-total-tokens", str(-(-cached // PAGED_BLOCK_SIZE) * PAGED_BLOCK_SIZE)),
            *("--max-running-requests", str(requests)),
            *("--limit-mm-data-per-request", '{"image": 2, "video": 1}'),
        ),
        reset_path="/flush_cache",
    ),
}


def installed_host(name: str | None) -> Host:
    """The named host, or the one that is installed.

    Raises
    ------
    LookupError : no host (or not that one) in this environment.
    """
    return HOSTS[_installed_name(name)]


def host_to_start(name: str | None) -> Host:
    """As `installed_host`, where the plugin would serve in a server that is started here.

    Raises
    ------
    LookupError : also where a variable would keep the plugin out of it.
    """
    found = _installed_name(name)
    report = Report()
    examine_settings(report)
    examine_allow_list(report, ENTRIES[found])
    for finding in report.findings:
        if finding.status == "failure":
            raise LookupError(f"{finding.value}; {finding.advice}")
    return HOSTS[found]


def _installed_name(name: str | None) -> str:
    for candidate in [name] if name else HOSTS:
        if installed_version(ENTRIES[candidate]) is not None:
            return candidate
    wanted = HOSTS[name].title if name else " or ".join(host.title for host in HOSTS.values())
    raise LookupError(
        f"{wanted} is not installed beside m3-plugin: pip install 'm3-plugin[{name or 'vllm'}]' "
        "here; in a clone, `make demo` sets up an environment of its own"
    )


def require_libraries(*modules: str) -> None:
    """Refuse to begin without libraries that come with both hosts.

    Raises
    ------
    LookupError : names those that are missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise LookupError(
            f"{', '.join(missing)} cannot be imported; vLLM and SGLang bring it along, without "
            f"them: pip install {' '.join(missing)}"
        )
