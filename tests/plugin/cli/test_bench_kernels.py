"""`m3-plugin bench kernels` as far as it goes without a GPU: model, gate, report, peers."""

from __future__ import annotations

import ast
import inspect
import io
import json
import subprocess
import sys
import types
import typing
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from m3_kernels.sparse_attention import pages_refusal
from m3_plugin.attention.backends import choose_kernels
from m3_plugin.cli import app
from m3_plugin.cli.bench import kernels as bench
from m3_plugin.cli.bench import peers as peers_module
from m3_plugin.cli.bench.clocks import WallClock, copy_bandwidth, matmul_throughput, time_in_turn
from m3_plugin.cli.bench.layer import (
    DenseMethod,
    Layer,
    OurInt8Method,
    OurMethod,
    check_output,
    check_selection,
    selection,
)
from m3_plugin.cli.bench.peers import FLASHINFER_FUNCTIONS, FlashinferLayer
from m3_plugin.cli.bench.report import GateError
from m3_plugin.cli.bench.roofline import (
    Geometry,
    Work,
    Workload,
    copies_beyond_cache,
    dense_work,
    floor_seconds,
    sparse_work,
)
from m3_plugin.cli.outputs import envelope
from tests.kernels.flashinfer_wheel import WHEEL
from tests.plugin.cli.schemas import checked

runner = CliRunner()
CPU = torch.device("cpu")
M3 = Geometry()
SMALL = Geometry(num_q_heads=4, num_kv_heads=2, head_dim=32, index_dim=32, topk=4)
H200 = {"bytes_per_second": 4.3e12, "operations_per_second": 790e12}
STEPS = (
    Workload("decode", 2, 1024),
    Workload("decode", 2, 2048),
    Workload("verify", 2, 1024, rows=4, pattern="shared"),
    Workload("prefill", 1, 1024, rows=64),
)


@pytest.mark.parametrize(
    ("batch", "context", "sparse_us", "dense_us"),
    # by hand: (context * 256 B + 2048 keys * 2 KiB + 32 KiB of activations) * batch / 4.3 TB/s
    [(1, 8192, 1.47, 3.91), (1, 2**20, 63.4, 499.4), (64, 2**17, 562.3, 3995.8)],
)
def test_decode_roofline(batch: int, context: int, sparse_us: float, dense_us: float) -> None:
    workload = Workload("decode", batch, context)
    sparse = floor_seconds(sparse_work(workload, M3, bytes_per_value=2), **H200)
    dense = floor_seconds(dense_work(workload, M3, bytes_per_value=2), **H200)
    assert sparse * 1e6 == pytest.approx(sparse_us, rel=2e-3)
    assert dense * 1e6 == pytest.approx(dense_us, rel=2e-3)


def test_prefill_roofline_is_arithmetic() -> None:
    """8,192 rows at the end of 128K: index 1.065, attention 0.550, dense 34.08 TFLOP."""
    workload = Workload("prefill", 1, 2**17, rows=8192)
    sparse = sparse_work(workload, M3, bytes_per_value=2)
    assert sparse.operations == pytest.approx(1.065e12 + 0.5498e12, rel=1e-3)
    assert dense_work(workload, M3, bytes_per_value=2).operations == pytest.approx(
        34.08e12, rel=1e-3
    )
    assert floor_seconds(sparse, **H200) == sparse.operations / 790e12


def test_shared_blocks_are_read_once() -> None:
    shared = sparse_work(Workload("verify", 1, 2**17, 4, "shared"), M3, bytes_per_value=2)
    apart = sparse_work(Workload("verify", 1, 2**17, 4, "independent"), M3, bytes_per_value=2)
    assert apart.bytes_moved - shared.bytes_moved == 3 * 2048 * 2048
    assert apart.operations == shared.operations


def test_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    assert floor_seconds(Work(100, 10), bytes_per_second=10, operations_per_second=10) == 10
    assert floor_seconds(Work(10, 100), bytes_per_second=10, operations_per_second=5) == 20


def test_copies_push_twice_the_cache_between_two_uses() -> None:
    for touched in (1, 3_000_000, 60_000_000, 200_000_000, 10**10):
        copies = copies_beyond_cache(touched, cache_bytes=60_000_000)
        assert (copies - 1) * touched >= 120_000_000
        assert copies == 2 or (copies - 2) * touched < 120_000_000


def test_graphs_hold_every_copy_equally_often() -> None:
    assert bench.calls_in_graph(1.0, 3) == 3
    assert bench.calls_in_graph(1e-4, 3) == 21
    assert bench.calls_in_graph(1e-9, 50) == 100


def layer(workload: Workload, **changes: Any) -> Layer:
    geometry = replace(SMALL, **changes)
    return Layer(workload, geometry, device=CPU, dtype=torch.bfloat16, seed=0)


@pytest.mark.parametrize("pattern", ["shared", "independent"])
def test_selection_patterns(pattern: str) -> None:
    workload = Workload("prefill", 2, 40 * 128, rows=300, pattern=pattern)
    ids = selection(workload, SMALL, random=torch.Generator().manual_seed(0))
    assert ids.shape == (2, 600, 4)
    own = (torch.arange(300) + 40 * 128 - 300) // 128
    assert (ids.diff(dim=-1) > 0).all()
    assert torch.equal(ids[:, :300, -1], own.int().expand(2, -1))
    # rows of one block, which see the same blocks
    distinct = len({tuple(row) for row in ids[0, :40].tolist()})
    assert distinct == 1 if pattern == "shared" else distinct > 35


def test_a_selection_of_few_blocks_has_a_tail() -> None:
    workload = Workload("prefill", 1, 256, rows=256)
    ids = selection(workload, SMALL, random=torch.Generator().manual_seed(0))
    assert ids[0, 0].tolist() == [0, -1, -1, -1]
    assert ids[0, 255].tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("workload", STEPS, ids=lambda workload: workload.label)
def test_the_gate_lets_right_methods_through(workload: Workload) -> None:
    data = layer(workload)
    OurMethod(data, choose_kernels("cpu")).check()
    OurInt8Method(data, choose_kernels("cpu")).check()
    DenseMethod(data).check()


def test_the_gate_stops_wrong_methods() -> None:
    data = layer(STEPS[1])
    ours = OurMethod(data, choose_kernels("cpu"))
    good_ids, good_out = ours.select(), ours.attend().clone()
    other = good_ids.clone()
    free = next(b for b in range(16) if b not in other[0, 0].tolist())
    other[0, 0, 0] = free
    with pytest.raises(GateError, match=r"row 0 head 0: chose .* their scores differ by"):
        check_selection(data, other, index_keys=data.index_keys)
    with pytest.raises(GateError, match="of 16 blocks"):
        check_selection(data, good_ids[..., :3], index_keys=data.index_keys)
    int8 = OurInt8Method(data, choose_kernels("cpu"))
    assert int8.caches.index_k_scales is not None
    int8.caches.index_k_scales.copy_(int8.caches.index_k_scales.roll(1, 1))
    with pytest.raises(GateError, match="their scores differ by"):
        check_selection(data, int8.select(), index_keys=data.index_keys)
    for wrong in (good_out * 1.02, good_out.roll(1, 0), torch.full_like(good_out, torch.nan)):
        with pytest.raises(GateError, match=r"error .*, allowed"):
            check_output(data, wrong, sparse=True)
    with pytest.raises(GateError, match="error"):
        check_output(data, good_out, sparse=False)


class WrongPeer:
    """Right selection, attention of another scale."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def select(self) -> Tensor:
        from m3_kernels.index_topk import index_topk

        i = self.inputs
        step = {name: getattr(i, name) for name in ("page_table", "cu_seqlens_q", "seq_lens")}
        return index_topk(i.index_q, i.index_k_pages, **step, topk=i.topk)

    def attend(self) -> Tensor:
        return torch.zeros_like(self.inputs.q)


class BrokenPeer(WrongPeer):
    def attend(self) -> Tensor:
        raise TypeError("unexpected keyword argument")


@pytest.fixture(scope="module")
def report() -> bench.Report:
    """Measured on this CPU, where the code is the same but for clock and kernels."""
    found = bench.Report(
        machine=bench.machine_facts(),
        geometry=SMALL,
        dtype="bfloat16",
        limits=bench.Limits(1e10, 1e11),
        peers={"vllm": "loaded", "sglang": "not installed"},
        skipped={"decode B64 128K": "needs 54 GiB, 40 GiB are free"},
    )
    for workload in STEPS:
        found.rows += bench.measure(
            workload,
            SMALL,
            kernels=choose_kernels("cpu"),
            peers={"vllm": WrongPeer, "sglang": BrokenPeer},
            device=CPU,
            dtype=torch.bfloat16,
            clock=WallClock(),
            limits=found.limits,
            cache_bytes=10_000,
            rounds=2,
        )
    return found


def test_report(report: bench.Report) -> None:
    body = envelope("bench-kernels", asdict(report))
    restored = checked("bench-kernels", json.dumps(body))
    assert {row["method"] for row in restored["rows"]} == {
        "m3-plugin",
        "m3-plugin int8 index",
        "vllm",
        "sglang",
        "dense sdpa",
    }
    for workload in STEPS:
        int8 = report.row(workload, "m3-plugin int8 index")
        assert int8 is not None
        assert int8.median_us
        whole = report.row(workload, "m3-plugin")
        parts = [
            report.row(workload, "m3-plugin", part) for part in ("index_topk", "sparse_attention")
        ]
        assert whole is not None
        assert whole.median_us
        assert whole.first_quartile_us
        assert whole.first_quartile_us <= whole.median_us
        assert whole.rounds == 2
        assert all(part is not None and part.median_us for part in parts)
        assert whole.floor_us == pytest.approx(
            1e6
            * floor_seconds(
                sparse_work(workload, SMALL, bytes_per_value=2),
                bytes_per_second=1e10,
                operations_per_second=1e11,
            )
        )


def test_no_time_and_no_speedup_of_a_wrong_method(report: bench.Report) -> None:
    for workload in STEPS:
        wrong, broken = report.row(workload, "vllm"), report.row(workload, "sglang")
        assert wrong is not None
        assert broken is not None
        assert "allowed" in str(wrong.fault)
        assert broken.fault == "TypeError: unexpected keyword argument"
        assert wrong.median_us is None
        assert not any(row.method == "vllm" and row.median_us for row in report.rows)
        assert report.speedup(workload, "vllm") is None
        dense, ours = report.row(workload, "dense sdpa"), report.row(workload, "m3-plugin")
        assert dense is not None
        assert ours is not None
        assert dense.median_us
        assert ours.median_us
        assert report.speedup(workload, "dense sdpa") == dense.median_us / ours.median_us


def test_no_speedup_when_we_are_wrong(report: bench.Report) -> None:
    ours_wrong = replace(
        report,
        rows=[
            replace(row, fault="error 1") if row.method == "m3-plugin" else row
            for row in report.rows
        ],
    )
    assert ours_wrong.speedup(STEPS[0], "dense sdpa") is None


def test_table(report: bench.Report) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    bench.print_report(report, console)
    text = console.export_text()
    assert "decode B2 2K" in text
    assert "vllm: not timed: error" in text
    assert "decode B64 128K: skipped, needs 54 GiB" in text
    assert "sglang takes no part: not installed" in text
    dense = report.speedup(STEPS[1], "dense sdpa")
    assert f"{dense:.2f}x" in text


def test_plot(report: bench.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "kernels.png"
    bench.plot_report(report, file)
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_clocks() -> None:
    order: list[str] = []

    def prepared(name: str) -> Any:
        return WallClock().prepare([lambda: order.append(name)])

    timings = time_in_turn({"a": prepared("a"), "b": prepared("b")}, rounds=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}
    assert 1e8 < copy_bandwidth(WallClock(), CPU, num_bytes=2**22) < 1e13
    assert matmul_throughput(WallClock(), CPU, size=64, dtype=torch.float32) > 1e6
    with pytest.raises(ValueError, match="at least 1"):
        time_in_turn({}, rounds=0)


# In a process of its own: a peer's stand-ins take the host's name. Its functions are those of
# the wheel; a call binds the arguments to their signatures and goes no further, because nothing of
# them runs without a GPU in useful time.
ASK = """
import inspect, json, sys, types
from pathlib import Path
import torch
from m3_plugin.cli.bench.kernels import load_peers
from m3_plugin.cli.bench.layer import Layer
from m3_plugin.cli.bench.roofline import Geometry, Workload

def recorded(function, calls):
    signature = inspect.signature(function)
    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        calls.append(function.__name__)
        return None, None, None
    return call

found = {}
hollow = Path(sys.argv[1])
for name, folder in json.loads(sys.argv[2]).items():
    (hollow / name).mkdir()
    found[name] = {"hollow": load_peers([name], hollow)[1][name], "calls": []}
    found[name]["left"] = [m for m in sys.modules if m.split(".")[0] == name]
    if folder is None:
        continue
    loaded, status = load_peers([name], Path(folder))
    found[name]["status"] = status[name]
    peer = loaded[name]
    peer.functions = types.SimpleNamespace(**{
        n: recorded(f, found[name]["calls"])
        for n, f in vars(peer.functions).items() if inspect.isfunction(f)
    })
    small = Geometry(num_q_heads=4, num_kv_heads=2, head_dim=32, index_dim=32, topk=4)
    for rows in (1, 4, 64):
        data = Layer(
            Workload("", 2, 512, rows), small,
            device=torch.device("cpu"), dtype=torch.float16, seed=0,
        )
        layer = peer(data.peer_inputs())
        layer.select(), layer.attend()
print(json.dumps(found))
"""
EXPECTED = {
    "vllm": {
        "minimax_m3_index_decode",
        "minimax_m3_sparse_attn_decode",
        "minimax_m3_index_score",
        "minimax_m3_index_topk",
        "minimax_m3_sparse_attn",
    },
    "sglang": {
        "flash_decode_with_topk_idx",
        "flash_decode_with_gqa_share_sparse",
        "flash_prefill_with_topk_index",
        "flash_prefill_with_gqa_share_sparse",
    },
}


def wheel_folder(name: str) -> str | None:
    """Where a peer's package lies: in the environment of its host."""
    environments = Path(__file__).parents[3] / ".venv"
    found = sorted(environments.glob(f"{name}/lib/python3*/site-packages/{name}"))
    return str(found[0].parent) if found else None


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = {name: wheel_folder(name) for name in EXPECTED}
    hollow = tmp_path_factory.mktemp("hollow")
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(hollow), json.dumps(folders)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_peers_are_called_as_they_are_written(name: str, peers: dict[str, Any]) -> None:
    if wheel_folder(name) is None:
        pytest.skip(f"{name} is not installed")
    assert peers[name]["status"] == "loaded"
    assert set(peers[name]["calls"]) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_peer_without_its_kernels_says_so_and_leaves_nothing(
    name: str, peers: dict[str, Any]
) -> None:
    assert "not what this version knows" in peers[name]["hollow"]
    assert peers[name]["left"] == []


@pytest.mark.parametrize("name", EXPECTED)
def test_an_absent_peer_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    loaded, status = bench.load_peers([name], tmp_path)
    assert not loaded
    assert f"{tmp_path} holds no folder {name!r}" in status[name]


def written(file: str, name: str) -> inspect.Signature:
    """The signature of a function in FlashInfer's wheel, which cannot be imported without a GPU."""
    if WHEEL is None:
        pytest.skip("no wheel in .venv/flashinfer: run make test")
    source = zipfile.ZipFile(WHEEL).read(f"flashinfer/msa_ops/{file}.py").decode()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    node = next(node for node in functions if node.name == name)
    namespace: dict[str, Any] = {}
    exec(f"def function({ast.unparse(node.args)}): ...", vars(typing) | {"torch": torch}, namespace)
    return inspect.signature(namespace["function"])


def test_flashinfer_is_called_as_it_is_written() -> None:
    files = dict.fromkeys(FLASHINFER_FUNCTIONS, "proxy_score") | {
        "msa_topk_select": "sparse_topk_select",
        "msa_sparse_attention": "sparse_prefill",
        "msa_sparse_decode_attention": "sparse_decode",
    }
    calls: dict[str, dict[str, Any]] = {}

    def recorded(name: str) -> Any:
        signature = written(files[name], name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] = signature.bind(*args, **kwargs).arguments
            return torch.empty(0)

        return call

    class Peer(FlashinferLayer):
        functions = types.SimpleNamespace(**{name: recorded(name) for name in files})

    small = Geometry(num_q_heads=32, num_kv_heads=2)
    for rows in (1, 4, 64):
        calls.clear()
        data = Layer(Workload("", 2, 700, rows), small, device=CPU, dtype=torch.bfloat16, seed=0)
        inputs = data.peer_inputs()
        peer = Peer(inputs)
        assert peer.select().shape == inputs.block_ids.shape
        peer.attend()
        attention = "msa_sparse_attention" if rows > 8 else "msa_sparse_decode_attention"
        assert set(calls) == {"msa_proxy_score", "msa_topk_select", attention}
        assert pages_refusal(calls[attention]["k"], calls[attention]["v"]) is None
        scores = calls["msa_proxy_score"]
        assert scores["k"].shape == (data.index_k_pages.shape[0], 1, 128, 128)
        assert scores["k"].is_contiguous()
        assert scores["output"].shape == (2, 6, 2 * rows)
        assert calls["msa_topk_select"]["force_end_blocks"] == 1
        assert calls[attention].get("seqlen_q", 64) == rows
        # 700 keys: the last row of each request stands in the sixth block
        assert calls["msa_topk_select"]["num_valid_pages"][rows - 1 :: rows].tolist() == [6, 6]
        assert calls["msa_topk_select"]["num_valid_pages"][0] == (700 - rows) // 128 + 1


@pytest.mark.parametrize(
    ("capability", "release", "reason"),
    [
        ((9, 0), "0.7.2", "its kernels for compute capability 9.0 do not exist"),
        ((10, 0), "0.7.2", "for compute capability 10.0 can be captured once per workspace"),
        ((12, 0), None, "flashinfer-python is not installed"),
        ((12, 1), "0.7.2", "not what this version knows on SM121: ModuleNotFoundError"),
    ],
)
def test_flashinfer_says_why_it_takes_no_part(
    capability: tuple[int, int],
    release: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(peers_module, "_capability", lambda: capability)
    monkeypatch.setattr(peers_module, "installed_release", lambda: release)
    loaded, status = bench.load_peers(["flashinfer"], tmp_path)
    assert not loaded
    assert reason in status["flashinfer"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    result = runner.invoke(app, ["bench", "kernels"])
    assert result.exit_code == 3
    assert "needs a CUDA device" in result.output
    assert "bench cpu" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "8192"], "not batch x context"),
        (["--decode", "1x8k"], "not numbers"),
        (["--peers", "aiter"], "unknown: aiter"),
        (["--prefill", "512"], "shorter than its rows"),
    ],
)
def test_refused_options(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_gpu(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    arguments = ["--decode", "1x8192", "--verify", "2x8192", "--prefill", "8192", "--peers", ""]
    result = runner.invoke(
        app, ["bench", "kernels", *arguments, "--rounds", "4", "--output", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert all(row["median_us"] for row in json.loads(file.read_text())["rows"])
