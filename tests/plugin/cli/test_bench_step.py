"""The parts of a server's decode step, from what two servers counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from m3_plugin.cli.bench.serve import Row
from m3_plugin.cli.bench.step import parts_of

OURS = Row(
    server="ours",
    context=8192,
    output_tokens=32,
    requests=1,
    concurrency=1,
    ttft_ms=5000,
    tpot_ms=41,
    p99_tpot_ms=41,
    output_tokens_per_s=20,
    step_ms=40,
    store_ms=1,
    select_ms=2,
    attend_ms=3,
    dense_ms=10,
)
HOSTS = replace(OURS, server="host", ttft_ms=9000, step_ms=75, attend_ms=4, dense_ms=None)


def test_the_hosts_dense_layer_is_what_remains() -> None:
    ours, hosts = parts_of(OURS, HOSTS)
    assert (ours.dense, ours.msa_ms, ours.dense_ms, ours.rest_ms) == ("ours", 6, 10, 24)
    assert (hosts.dense, hosts.msa_ms, hosts.dense_ms, hosts.rest_ms) == ("host", 7, 44, 24)
    for row in (ours, hosts):
        assert row.msa_ms + row.dense_ms + row.rest_ms == row.step_ms
    assert (ours.first_token_ms, hosts.first_token_ms) == (5000, 9000)


def test_without_times_of_layers_there_is_no_share() -> None:
    with pytest.raises(LookupError, match=r"at 8,192 tokens did not count"):
        parts_of(replace(OURS, dense_ms=None), HOSTS)
