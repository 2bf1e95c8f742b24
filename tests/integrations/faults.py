"""What ends a server, or would: each fault, and what must be seen of it. One server start for each.

A host's `test_faults.py` derives `FaultCases`.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import torch
from openai import APIConnectionError, APIError, OpenAI
from safetensors.torch import load_file, save_file

from m3_kernels import native_build
from m3_plugin.attention.checks import StepChecker
from m3_plugin.cli.soak import counters
from m3_plugin.host.children import LOOPBACK
from m3_plugin.host.serving import ServerFailed, ServerProcess, free_port
from m3_plugin.soak import judging
from m3_plugin.soak.driver import Driver
from m3_plugin.soak.judging import Model
from m3_plugin.soak.mixture import ROUND, Mixture
from m3_plugin.soak.needles import ConstructedNeedles
from m3_plugin.soak.processes import processes_of_session
from m3_plugin.testing.prompts import needle_prompt
from tests.integrations.bad_machine import Disks, JumpingClock
from tests.integrations.server import MODEL, ask
from tests.integrations.soak import asked_meanwhile, processes_named
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
STARTS_WITHIN_S = 1200
# How long a server may take to end by itself.
ENDS_WITHIN_S = 240
# Names the folder of `Spoilers` in the server.
SPOILED_FOLDER = "M3_TEST_SPOILED"
# Where hosts, torch, Triton and the C++ kernels keep what they compile.
CACHES = (
    "VLLM_CACHE_ROOT",
    "SGLANG_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME",
)


def client_of(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


def answers_right(server: ServerProcess, seed: int) -> bool:
    prompt = needle_prompt(seed, num_tokens=2000)
    reply = ask(client_of(server), prompt.messages(), prompt.max_tokens)
    return reply.choices[0].message.content == prompt.expected_text


def require_nothing_left(server: ServerProcess) -> None:
    """The server has ended by itself, with all its processes, and its port is free."""
    ended = wait_until(lambda: server.process.poll() is not None, ENDS_WITHIN_S)
    assert ended, "the first process still runs"
    session = server.process.pid
    gone = wait_until(lambda: not processes_of_session(session), ENDS_WITHIN_S)
    assert gone, processes_of_session(session)
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, server.port))


def with_bad_value(checkpoint: Path, folder: Path, *, tensor: str, value: float) -> Path:
    """A copy of a checkpoint with one number of one tensor replaced."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
            continue
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor].view(-1)[7] = value
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Spoilers:
    """The test's hand on a server that loads a plugin of it.

    Parameters
    ----------
    folder : of the plugin, new
    group : of entry points that the host loads
    module : with a function `register`, whose hooks spoil what `asked_to_spoil` says
    """

    folder: Path
    group: str
    module: str

    def __post_init__(self) -> None:
        info = self.folder / "m3_test_faults-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3-test-faults\nVersion: 0\n")
        entry = f"[{self.group}]\nm3_test_faults = {self.module}:register\n"
        (info / "entry_points.txt").write_text(entry)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the server."""
        path = f"{self.folder}{os.pathsep}{ROOT}"
        return {"PYTHONPATH": path, SPOILED_FOLDER: str(self.folder)}

    def spoil(self, what: str) -> None:
        """From now on: "page" or "result"."""
        (self.folder / what).touch()


def asked_to_spoil(what: str) -> bool:
    """In the server: whether the test wants that spoiled now."""
    return Path(os.environ[SPOILED_FOLDER], what).exists()


def spoil_page(page_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """What a bad connector does: the second page of a long request becomes its third."""
    if not asked_to_spoil("page"):
        return
    for request in torch.nonzero(seq_lens > 512).flatten().tolist():
        page_table[request, 1] = page_table[request, 2]


def spoil_results() -> None:
    """What a bad kernel behind the last attention does: NaN in the last row of a long step."""
    looked_at = StepChecker.end

    def spoiled(self: StepChecker, hidden: torch.Tensor) -> None:
        if len(hidden) > 512 and asked_to_spoil("result"):
            hidden[-1, 3] = torch.nan
        looked_at(self, hidden)

    StepChecker.end = spoiled


class FaultCases:
    """Derive, and say how the host is started and what its processes are called.

    Attributes
    ----------
    parts : names of processes that are killed one after the other, and what those that are left
        say of it; "" where nobody is left to say it
    plugins : (group of entry points, module of the tests that registers hooks of `Spoilers`)
    crowded : options of a server whose cache holds one request of 8192 tokens, and takes many
    crowds : variables of the same server
    """

    # a start takes a minute, on a busy machine ten
    pytestmark: ClassVar = [pytest.mark.extended, pytest.mark.timeout(2400)]

    parts: ClassVar[Mapping[str, str]]
    worker: ClassVar[str]
    plugins: ClassVar[tuple[str, str]]
    crowded: ClassVar[tuple[str, ...]]
    crowds: ClassVar[Mapping[str, str]] = {}

    def command(
        self, model: Path, port: int, *, ranks: int = 1, options: Sequence[str] = ()
    ) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        raise NotImplementedError

    def spoilers(self, folder: Path) -> Spoilers:
        """For servers that are to go wrong when the test says so."""
        group, module = self.plugins
        return Spoilers(folder, group, module)

    @contextmanager
    def started(
        self,
        model: Path,
        folder: Path,
        *,
        port: int | None = None,
        environment: dict[str, str] | None = None,
        ready: bool = True,
        ranks: int = 1,
        options: Sequence[str] = (),
        wrapped: Callable[[Sequence[str]], list[str]] = list,
    ) -> Iterator[ServerProcess]:
        """A server while the context lasts; `wrapped` makes of its command what is started."""
        port = port or free_port()
        folder.mkdir(exist_ok=True)
        with ServerProcess(
            wrapped(self.command(model, port, ranks=ranks, options=options)),
            port=port,
            log=folder / "server.log",
            environment=self.environment() | (environment or {}),
        ) as server:
            if ready:
                server.wait_until_ready(timeout_s=STARTS_WITHIN_S)
            yield server

    def test_whatever_is_killed_the_server_ends_and_starts_again(
        self, constructed_checkpoint: Path, tmp_path: Path
    ) -> None:
        """On one port: each start is the restart after the kill before."""
        port = free_port()
        for number, (part, reason) in enumerate(self.parts.items()):
            with self.started(constructed_checkpoint, tmp_path / str(number), port=port) as server:
                assert answers_right(server, 800 + number)
                (victim,) = processes_named(server, part)
                os.kill(victim.pid, signal.SIGKILL)
                require_nothing_left(server)
                assert reason in server.log.read_text()
                with pytest.raises(APIConnectionError):
                    answers_right(server, 800)

    def test_one_of_two_ranks_is_killed(self, constructed_checkpoint: Path, tmp_path: Path) -> None:
        # neither host places two ranks on one NUMA node by itself
        cores = {f"{host}_CPU_OMP_THREADS_BIND": "0|1" for host in ("VLLM", "SGLANG")}
        with self.started(constructed_checkpoint, tmp_path, ranks=2, environment=cores) as server:
            assert answers_right(server, 806)
            victim = processes_named(server, self.worker)[1]
            os.kill(victim.pid, signal.SIGKILL)
            require_nothing_left(server)
            assert self.parts[self.worker] in server.log.read_text()

    def test_what_a_server_outlives_and_how_it_ends(
        self, constructed_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Preemption, a clock that jumps, no descriptors, then SIGTERM: all with one start."""
        clock = JumpingClock(tmp_path / "clock")
        with self.started(
            constructed_checkpoint,
            tmp_path,
            environment={**clock.environment, **self.crowds},
            options=self.crowded,
        ) as server:
            assert answers_right(server, 810)
            require_right_while_preempted(server, monkeypatch)
            # an hour ahead and two back, as on a machine whose clock is set while it serves
            for seed, offset in ((840, 3600), (850, -3600)):
                require_right_while_the_clock_jumps(server, clock, offset, seed=seed)
            require_recovery_from_no_descriptors(server)
            assert answers_right(server, 811)
            require_order_after_sigterm(server)

    def test_a_wrong_page_is_named(self, constructed_checkpoint: Path, tmp_path: Path) -> None:
        spoiled = self.spoilers(tmp_path / "plugin")
        with self.started(
            constructed_checkpoint, tmp_path / "server", environment=spoiled.environment
        ) as server:
            spoiled.spoil("page")
            text = require_checked_end(server, seed=820)
        assert "is its block" in text

    @pytest.mark.parametrize(
        ("tensor", "value", "said"),
        [
            ("model.layers.2.block_sparse_moe.experts.5.w2.weight", torch.nan, "w2_weight holds 1"),
            ("model.layers.1.self_attn.index_k_proj.weight", torch.inf, "holds 1 values"),
        ],
        ids=["expert", "index projection"],
    )
    def test_weights_that_are_no_numbers_end_the_start(
        self, constructed_checkpoint: Path, tmp_path: Path, tensor: str, value: float, said: str
    ) -> None:
        names = [f"language_model.{tensor}", tensor]
        stored = {
            name
            for file in constructed_checkpoint.glob("*.safetensors")
            for name in load_file(file)
        }
        (name,) = (name for name in names if name in stored)
        bad = with_bad_value(constructed_checkpoint, tmp_path / "bad", tensor=name, value=value)
        with (
            self.started(bad, tmp_path / "server", ready=False) as server,
            pytest.raises(ServerFailed),
        ):
            server.wait_until_ready(timeout_s=STARTS_WITHIN_S)
        text = server.log.read_text()
        assert said in text
        assert "NaN or infinite" in text

    def test_disks_that_take_nothing_and_then_a_result_that_is_no_number(
        self, constructed_checkpoint: Path, tmp_path: Path
    ) -> None:
        """Full under recordings, compile caches and C++ kernels, a read-only home: it serves.

        Then the last layer's kernels go bad, and the server must not.
        """
        disks = Disks.below(tmp_path)
        spoiled = self.spoilers(tmp_path / "plugin")
        full = str(disks.full)
        environment = {
            "HOME": str(disks.readonly),
            "M3_PLUGIN_RECORD_BLOCKS": f"{full}/recorded",
            **dict.fromkeys(CACHES, full),
            **spoiled.environment,
        }
        with self.started(
            constructed_checkpoint, tmp_path, environment=environment, wrapped=disks.seen_by
        ) as server:
            assert answers_right(server, 830)
            seen = disks.full_as_seen(server.process.pid)
            sizes = [file.stat().st_size for file in (seen / "recorded").iterdir()]
            kept = list((seen / "m3-plugin" / "native").glob("*.so"))
            spoiled.spoil("result")
            text = require_checked_end(server, seed=831)
        # it was tried, and there was no room
        assert sizes == [0]
        assert not kept
        assert "chosen blocks are no longer recorded: [Errno 28]" in text
        assert "the C++ kernels are not used" in text
        assert "behind the last layer: request '" in text

    def test_two_servers_find_a_build_that_was_cut_short(
        self, constructed_checkpoint: Path, tmp_path: Path
    ) -> None:
        """Both at the same moment: one builds it again, the other waits for that."""
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        begin = partial(self.started, constructed_checkpoint, environment=environment)
        whole = Path(native_build.library()._name)
        folder = tmp_path / "cache" / "m3-plugin" / "native"
        folder.mkdir(mode=0o700, parents=True)
        cut = folder / whole.name
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        cut.chmod(0o700)
        with (
            begin(tmp_path / "first", ready=False) as first,
            begin(tmp_path / "second", ready=False) as second,
        ):
            for seed, server in enumerate((first, second)):
                server.wait_until_ready(timeout_s=STARTS_WITHIN_S)
                assert answers_right(server, 831 + seed)
        logs = first.log.read_text() + second.log.read_text()
        # who waited found the whole one
        assert logs.count("is cut short") == 1
        assert cut.stat().st_size == whole.stat().st_size
        assert sorted(file.suffix for file in folder.iterdir()) == [".lock", ".so"]


def require_checked_end(server: ServerProcess, *, seed: int) -> str:
    """A request is refused by a checked step, which names it; the server's log."""
    with pytest.raises(APIError):
        answers_right(server, seed)
    require_nothing_left(server)
    text = server.log.read_text()
    assert "M3_PLUGIN_CHECK: step " in text
    assert "request '" in text
    return text


def require_right_while_preempted(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests lose their pages all the time, begin again, and answer right."""
    # answers long enough to outgrow what was free when their requests were let in
    monkeypatch.setattr(judging, "LONG_ANSWER", 400)
    mixture = Mixture(11, 2048)
    long = [r for r in mixture.first(20 * ROUND) if r.kind == "long" and r.tokens > 500]
    driver = Driver(
        server.url,
        Model(MODEL, 8192),
        mixture=mixture,
        needles=ConstructedNeedles(),
        concurrency=8,
        timeout_s=900,
    )
    numbers = tuple(request.number for request in long[:16])
    assert len(numbers) == 16
    outcomes = asyncio.run(driver.all_at_once(numbers))
    assert [(o.verdict, o.detail) for o in outcomes] == [("right", "")] * 16
    assert counters(httpx.get(f"{server.url}/metrics").text, server.url).preemptions


def require_right_while_the_clock_jumps(
    server: ServerProcess, clock: JumpingClock, offset: int, *, seed: int
) -> None:
    """Requests under way, and those after, are answered; the server tells the clock's time.

    Parameters
    ----------
    offset : of the clock from now on, in seconds
    """
    client = client_of(server)
    right, wait = asked_meanwhile(client, range(seed, seed + 3), tokens=3000)
    streamed = needle_prompt(seed + 4, num_tokens=2000)
    stream = ask(client, streamed.messages(), streamed.max_tokens, stream=True)
    clock.jump(offset)
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    wait()
    assert right == [True] * 3
    assert text == streamed.expected_text
    prompt = needle_prompt(seed + 5, num_tokens=1400)
    reply = ask(client, prompt.messages(), prompt.max_tokens)
    assert reply.choices[0].message.content == prompt.expected_text
    assert abs(reply.created - time.time() - offset) < 600


def require_recovery_from_no_descriptors(server: ServerProcess) -> None:
    """The API process cannot open a file or take a connection for a while."""
    pid = server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files + 8, limits[1]))
    idle = []
    try:
        for _ in range(40):
            idle.append(socket.create_connection((LOOPBACK, server.port), timeout=5))
        with pytest.raises((httpx.HTTPError, OSError)):
            httpx.get(f"{server.url}/health", timeout=3).raise_for_status()
    finally:
        for connection in idle:
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert wait_until(lambda: is_well(server), ENDS_WITHIN_S)


def require_order_after_sigterm(server: ServerProcess) -> None:
    """It ends while requests run: no wrong answer, and nothing is left."""
    right, wait = asked_meanwhile(client_of(server), range(812, 818), tokens=2500, forgiving=True)
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    require_nothing_left(server)
    wait()
    assert all(right), right


def is_well(server: ServerProcess) -> bool:
    """Whether `/health` says so."""
    try:
        return httpx.get(f"{server.url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False
