"""The released model as each rank and stage of a GPU server builds it, and its share of the cache.

`building.py` does it on the meta device, with vLLM's own loader, groups and cache manager.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from m3_plugin.model.released import released_config
from tests.integrations.vllm.building import AUX_LAYERS, CACHE_BYTES, SERVERS
from tests.integrations.vllm.drafting import METHODS, STEPS
from tests.integrations.vllm.stages import DROPPED, LOADS, UNKNOWN
from tests.interpreters import Forking

GIB = 2**30


@pytest.fixture(scope="module")
def built(gpus: Forking, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `building.py`."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "config.json").write_text(json.dumps(released_config()))
    return gpus.report("tests.integrations.vllm.building", folder)


@pytest.fixture(scope="module")
def found(built: dict[str, Any]) -> dict[str, Any]:
    """Server -> what its stages are and what they would cache."""
    servers: dict[str, Any] = built["servers"]
    assert len(servers) == len(SERVERS)
    assert {name: each["error"] for name, each in servers.items() if "error" in each} == {}
    return servers


def test_every_server_has_one_group_of_pages(found: dict[str, Any]) -> None:
    """60 layers with K and V, 57 of them with index keys, and one page table for all."""
    for name, server in found.items():
        assert set(server["groups"]) == {1}, name
        assert server["block_size"] == [128], name
        assert server["cached_layers"] == 60 + 57, name


def test_stages_have_all_layers_and_one_number_of_blocks(found: dict[str, Any]) -> None:
    for name, server in found.items():
        bounds = [stage["layers"] for stage in server["stages"]]
        assert bounds == ([[0, 60]] if "pp 1" in name else [[0, 30], [30, 60]]), name
        assert len(set(server["blocks"])) == 1, name


@pytest.mark.parametrize(
    ("server", "kv_heads", "item"),
    [
        ("H100: tp 1, pp 1", 4, 2),
        ("H100: tp 2, pp 1", 2, 2),
        ("H100: tp 4, pp 1", 1, 2),
        ("H100: tp 8, pp 1", 1, 2),
        ("H100: tp 8, pp 1 --kv-cache-dtype fp8", 1, 1),
    ],
)
def test_blocks_of_a_rank(found: dict[str, Any], server: str, kv_heads: int, item: int) -> None:
    """K and V of this rank's heads in all layers, and the one index key of each MSA layer."""
    block = 128 * (60 * 2 * kv_heads * 128 * item + 57 * 128 * 2)
    assert found[server]["blocks"] == [CACHE_BYTES // block]


def test_all_stages_report_the_same_layouts(found: dict[str, Any]) -> None:
    for name, server in found.items():
        assert all(each == server["layouts"][0] for each in server["layouts"]), name
        assert server["layout"] in server["layouts"][0], name


def test_weights_are_shared_out(found: dict[str, Any]) -> None:
    """428 B parameters in bf16; what every rank holds whole is the tower and the routers."""
    whole = found["H100: tp 1, pp 1"]["stages"][0]["weights"]
    assert 790 < whole / GIB < 800
    for ranks in (2, 4, 8):
        part = found[f"H100: tp {ranks}, pp 1"]["stages"][0]["weights"]
        assert whole / ranks < part < whole / ranks + 3 * GIB


def test_streams_of_an_eagle3_head_cross_stages(found: dict[str, Any]) -> None:
    """vLLM makes room for those of earlier stages, as wide as the model."""
    for name in ("H100: tp 4, pp 2", "B200: tp 4, pp 2"):
        first, last = (stage["passed"] for stage in found[name]["stages"])
        assert first.keys() == {"hidden_states", "residual"}
        earlier = sum(layer <= 30 for layer in AUX_LAYERS)
        assert len(last) == 2 + earlier
        assert all(shape == [3, 6144] for shape in last.values())


def test_scratch_of_every_rank(found: dict[str, Any]) -> None:
    for name, server in found.items():
        assert all(stage["workspace"] < GIB for stage in server["stages"]), name


@pytest.fixture(scope="module", params=METHODS)
def drafts(request: pytest.FixtureRequest, built: dict[str, Any]) -> dict[int, Any]:
    """Drafted tokens -> the draft worker of one method (`drafting.py`)."""
    return {steps: built["drafts"][f"{request.param} {steps}"] for steps in STEPS}


def test_draft_workers(drafts: dict[int, Any]) -> None:
    """On GPUs runner V2 drafts: its own workers, with our module or the head that was named."""
    kinds = {(each["worker"], each["draft"]) for each in drafts.values()}
    assert kinds in (
        {("MTPSpeculator", "M3MTP")},
        {("EagleSpeculator", "Eagle3LlamaForCausalLM")},
    )
    for steps, each in drafts.items():
        assert each["runner_v2"]
        assert each["steps"] == steps
        assert each["decode_rows"] == steps + 1
        assert each["scratch_shared"]


def test_what_drafts_share_with_the_target(drafts: dict[int, Any]) -> None:
    """One page table; the module draws on the target's embedding, head and pictures as well."""
    for each in drafts.values():
        ours = each["draft"] == "M3MTP"
        assert each["cache_groups"] == 1
        assert each["embedding_shared"]
        # a head's own is known when its weights are read, and there are none
        assert each["head_shared"]
        assert each["pictures"] is ours
        modules = 7
        assert len(each["layers"]) == (2 * modules if ours else 1)
        assert each["backends"] == (["M3_MSA", "M3_MSA_INDEX"] if ours else ["FLASH_ATTN"])


def test_drafts_are_captured(drafts: dict[int, Any]) -> None:
    """Whole graphs of verified chains and of single drafts, whose metadata is updated in them."""
    for steps, each in drafts.items():
        chains, single = each["first_pass"]["FULL"], each["drafts"]["FULL"]
        assert chains
        assert all(tokens == requests * (steps + 1) for tokens, requests in chains)
        assert single
        assert all(tokens == requests for tokens, requests in single)
        # vLLM 0.31 has no such update; one draft has nothing to update
        assert each["in_place"] in (None, steps > 1)


@pytest.fixture(scope="module")
def loads(built: dict[str, Any]) -> dict[str, Any]:
    """Server, stage and rank -> what became of its weights (`stages.py`)."""
    found: dict[str, Any] = built["loads"]
    assert len(found) == sum(len(places) for *_, places in LOADS)
    return found


def test_stages_and_expert_ranks_load_all_of_their_weights(loads: dict[str, Any]) -> None:
    """Every rank accounts for every tensor of the checkpoint, its own and those of other stages."""
    for name, each in loads.items():
        assert each["empty"] == [], name
        for dropped, said in zip(DROPPED, each["missing"], strict=True):
            assert f"missing 1 tensor(s): {dropped.removesuffix('.weight')}" in said, name
        assert f"left over 1 tensor(s): {UNKNOWN}" in each["left_over"], name


def test_experts_of_other_ranks_may_stay_in_the_files(loads: dict[str, Any]) -> None:
    layers, matrices = 5, 3
    for name, each in loads.items():
        here, all_of_them = each["experts"]
        assert all_of_them == 128
        assert here == (32 if "expert" in name else 128), name
        left = each["tensors"] - each["read"]
        assert left == ((128 - 32) * layers * matrices if "filter" in name else 0), name
        # a filter that leaves an expert of this rank there is noticed
        assert ".experts." in each["placed_otherwise"], name
