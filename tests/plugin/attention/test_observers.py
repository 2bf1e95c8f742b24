"""What sessions report to the host's metrics, per phase."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from m3_plugin.attention.batch import MSABatch
from m3_plugin.cli.host_metrics import total
from tests.plugin.attention.released import released_session

prometheus_client = pytest.importorskip("prometheus_client")


def step(seq_len: int, num_rows: int) -> MSABatch:
    return MSABatch(
        cu_seqlens_q=torch.tensor([0, num_rows], dtype=torch.int32),
        seq_lens=torch.tensor([seq_len], dtype=torch.int32),
        page_table=torch.zeros(1, 8, dtype=torch.int32),
        slot_mapping=torch.zeros(num_rows, dtype=torch.int64),
        max_query_len=num_rows,
        max_seq_len=seq_len,
    )


def exported(name: str, phase: str) -> float:
    text = prometheus_client.generate_latest().decode()
    return total(text, f"m3_plugin:msa_{name}_total", label=f'phase="{phase}"')


def test_blocks_are_exported_by_phase() -> None:
    from m3_plugin.attention.observers import ExportedStatistics

    statistics = ExportedStatistics()
    ids = torch.tensor([[[0, 3, 7, -1]], [[1, 7, -1, -1]]], dtype=torch.int32)
    before = {p: exported("blocks_read", p) for p in ("prefill", "decode")}
    statistics.add(ids, batch=step(1000, 1), block_size=128)
    statistics.add(ids.repeat(1, 2, 1), batch=step(300, 2), block_size=128)
    assert exported("blocks_read", "decode") - before["decode"] == 5
    assert exported("blocks_read", "prefill") - before["prefill"] == 10
    assert statistics.phase("decode") == {"rows": 1, "blocks_read": 5, "blocks_visible": 16}
    assert statistics.phase("prefill") == {"rows": 2, "blocks_read": 10, "blocks_visible": 12}


def test_statistics_and_timings_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_plugin.attention.observers import ExportedStatistics, TimedSession
    from m3_plugin.attention.session import MSASession

    silent = released_session()
    assert type(silent) is MSASession
    assert silent.statistics is None
    assert silent.scale == 128**-0.5
    monkeypatch.setenv("M3_PLUGIN_STATISTICS", "1")
    counting = released_session()
    assert isinstance(counting.statistics, ExportedStatistics)
    monkeypatch.setenv("M3_PLUGIN_TIMINGS", "1")
    assert isinstance(released_session(), TimedSession)


@pytest.mark.parametrize("variable", ["M3_PLUGIN_STATISTICS", "M3_PLUGIN_TIMINGS"])
def test_what_a_gpu_would_have_to_wait_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    from m3_plugin.attention import assembly
    from m3_plugin.attention.backends import KernelChoice

    chosen = KernelChoice(family="triton", reason="asked for")
    monkeypatch.setattr(assembly, "choose_kernels", lambda *asked: chosen)
    monkeypatch.setattr(assembly, "require_served", lambda *asked, **dtypes: None)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=f"{variable}=1 .* unset it, or serve on a CPU"):
        released_session()


def test_layers_are_timed_by_part_and_steps_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and three decode steps through two layers, whose parts take 1, 2 and 4 seconds."""
    from m3_plugin.attention import observers
    from m3_plugin.attention.backends import choose_kernels
    from tests.plugin.attention.test_session import DIM, msa, run

    took = cycle((0, 1, 0, 2, 0, 4))
    monkeypatch.setattr(observers.time, "perf_counter", lambda: next(took))

    def counted() -> dict[tuple[str, str], float]:
        text = prometheus_client.generate_latest().decode()
        steps = {
            ("steps", phase): total(text, "m3_plugin:msa_steps_total", label=f'phase="{phase}"')
            for phase in observers.PHASES
        }
        return steps | {
            # as `bench serve` reads it
            (part, phase): total(
                text, "m3_plugin:msa_seconds_total", label=f'part="{part}",phase="{phase}"'
            )
            for part in ("store", "select", "attend")
            for phase in observers.PHASES
        }

    before = counted()
    timed = observers.TimedSession(msa(), kernels=choose_kernels("cpu"), scale=DIM**-0.5)
    out = run(msa(), 703, [700, 1, 1, 1], target=timed, layers=2)
    assert torch.equal(out, run(msa(), 703, [703]))
    assert {place: value - before[place] for place, value in counted().items()} == {
        ("steps", "prefill"): 1,
        ("steps", "decode"): 3,
        ("store", "prefill"): 2,
        ("store", "decode"): 6,
        ("select", "prefill"): 4,
        ("select", "decode"): 12,
        ("attend", "prefill"): 8,
        ("attend", "decode"): 24,
    }
