"""Every argument of SGLang is served, refused by name, or judged to be none of our business."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.integrations.sglang.judged_arguments import HOSTS_OWN, SERVED, WITHOUT_EFFECT


def fields() -> dict[str, Any]:
    """Name and default of every argument of the installed SGLang."""
    from sglang.srt.server_args import ServerArgs

    record: Any = ServerArgs
    if dataclasses.is_dataclass(record):
        found: Any = dataclasses.fields(record)
    else:
        found = msgspec.structs.fields(record)
    return {field.name: field.default for field in found}


def refused() -> dict[str, Any]:
    from m3_sglang import options

    return options._SERVED


def test_every_argument_is_judged() -> None:
    """Of the releases from 0.5.22 on; older ones are described by other classes."""
    judged = SERVED | WITHOUT_EFFECT | HOSTS_OWN | refused().keys()
    assert not fields().keys() - judged, "read what these do, and put them on a list"


def test_no_argument_is_judged_twice() -> None:
    lists = [SERVED, WITHOUT_EFFECT, HOSTS_OWN, frozenset(refused())]
    assert sum(map(len, lists)) == len(frozenset().union(*lists))


@pytest.mark.every_release
def test_defaults_pass() -> None:
    from m3_sglang.options import require_served

    defaults = {name: value for name, value in fields().items() if name in refused()}
    given = SimpleNamespace(**(defaults | {"device": "cuda", "disable_cuda_graph": False}))
    require_served(given)


OTHER: dict[str, Any] = {
    "page_size": 64,
    "speculative_algorithm": "NGRAM",
    "kv_cache_dtype": "fp4_e2m1",
    "cuda_graph_backend_prefill": "full",
    "lora_backend": "triton_v2",
}


@pytest.mark.parametrize("name", sorted(refused()))
def test_anything_else_is_refused_by_name(name: str) -> None:
    from m3_sglang.options import require_served

    served, _ = refused()[name]
    value = OTHER.get(name, True if False in served else 7)
    plain = {"device": "cuda", "speculative_algorithm": None, "disable_cuda_graph": False}
    with pytest.raises(
        ValueError, match=f"--{name.replace('_', '-')} must be .* got {value!r}".replace("[", r"\[")
    ):
        require_served(SimpleNamespace(**(plain | {name: value})))


def test_a_decision_of_sglang_counts_as_much_as_an_option() -> None:
    """As the old name of an option, which resolves to the new one."""
    from m3_sglang.options import require_served

    given = SimpleNamespace(
        device="cuda",
        speculative_algorithm=None,
        attn_cp_size=1,
        _resolved_overrides=[("handle_context_parallelism", {"attn_cp_size": 2})],
    )
    with pytest.raises(ValueError, match="--attn-cp-size must be 1"):
        require_served(given)


@pytest.mark.parametrize("backend", ["full", "breakable"])
def test_graphs_of_prompts_are_refused_in_the_common_option_too(backend: str) -> None:
    from m3_sglang.options import require_served

    given = SimpleNamespace(
        device="cuda",
        speculative_algorithm=None,
        cuda_graph_config={"prefill": {"backend": backend}},
    )
    with pytest.raises(ValueError, match=rf"prefill\.backend must be disabled.*{backend}"):
        require_served(given)


def test_memory_of_weights_is_given_back_with_a_copy_alone() -> None:
    from m3_sglang.options import require_served

    given = {"device": "cuda", "speculative_algorithm": None, "enable_memory_saver": True}
    require_served(SimpleNamespace(**given, enable_weights_cpu_backup=True))
    with pytest.raises(ValueError, match="--enable-weights-cpu-backup must be True"):
        require_served(SimpleNamespace(**given, enable_weights_cpu_backup=False))


ADAPTERS = {
    "device": "cuda",
    "speculative_algorithm": None,
    "enable_lora": True,
    "lora_target_modules": None,
}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"speculative_algorithm": "NEXTN"}, "--enable-lora beside --speculative-algorithm NEXTN"),
        ({"device": "cpu", "lora_backend": "triton"}, "--lora-backend must be torch_native"),
        ({"lora_target_modules": {"q_proj", "embed_tokens"}}, "embed_tokens: adapters are taken"),
        ({"enable_lora": None, "lora_paths": ["a"], "lora_target_modules": ["qkvr"]}, "qkvr"),
    ],
)
def test_adapters_are_refused_where_they_were_never_run(
    other: dict[str, Any], message: str
) -> None:
    from m3_sglang.options import require_served

    require_served(SimpleNamespace(**ADAPTERS))
    with pytest.raises(ValueError, match=message):
        require_served(SimpleNamespace(**(ADAPTERS | other)))


def test_adapters_need_the_release_that_they_were_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from m3_sglang import options

    monkeypatch.setattr(options, "adapters_are_tested", lambda: False)
    with pytest.raises(ValueError, match="--enable-lora needs SGLang"):
        options.require_served(SimpleNamespace(**ADAPTERS))


ALONE: dict[str, Any] = {"device": "cuda", "speculative_algorithm": None}
DECODE = {
    "device": "cpu",
    "speculative_algorithm": None,
    "disaggregation_mode": "decode",
    "disaggregation_transfer_backend": "nixl",
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pp_size": 2, "ep_size": 2}, "--pp-size 2 beside --ep-size 2"),
        ({"attn_dp_size": 2, "speculative_algorithm": "EAGLE3"}, "--attn-dp-size 2 beside --spec"),
        ({"ep_size": 2, "enable_lora": True}, "--ep-size 2 beside --enable-lora"),
        ({"attn_dp_size": 2, "mm_enable_dp_encoder": True}, "beside --mm-enable-dp-encoder"),
        ({"disaggregation_mode": "prefill", "pp_size": 2}, "prefill beside --pp-size 2"),
    ],
)
def test_what_was_run_alone_is_refused_in_company(given: dict[str, Any], message: str) -> None:
    from m3_sglang.options import require_served

    with pytest.raises(ValueError, match=message):
        require_served(SimpleNamespace(**(ALONE | given)))


def test_attention_is_apart_in_groups_of_one_rank_alone() -> None:
    from m3_sglang.options import require_served

    require_served(SimpleNamespace(**ALONE, attn_dp_size=2, tp_size=2))
    with pytest.raises(ValueError, match="groups of several ranks"):
        require_served(SimpleNamespace(**ALONE, attn_dp_size=2, tp_size=4))


def test_ways_to_spread_a_model_need_the_release_they_were_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from m3_sglang import options

    for given in ({"pp_size": 2}, {"ep_size": 2}, {"attn_dp_size": 2}, DECODE):
        options.require_served(SimpleNamespace(**(ALONE | given)))
    monkeypatch.setattr(options, "fleets_are_tested", lambda: False)
    options.require_served(SimpleNamespace(**ALONE, pp_size=1, disaggregation_mode="null"))
    for given in ({"pp_size": 2}, {"ep_size": 2}, {"attn_dp_size": 2}, DECODE):
        with pytest.raises(ValueError, match=r"needs SGLang 0\.5\.23"):
            options.require_served(SimpleNamespace(**(ALONE | given)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"disaggregation_transfer_backend": "mooncake"}, "transfer-backend must be nixl"),
        ({"disaggregation_enable_kv_checksum": True}, "kv-checksum must be False"),
        ({"disaggregation_decode_retraction_backup": "cpu_tensor"}, "backup must be None or none"),
        ({"disaggregation_decode_retraction_backup": "host_pool"}, "answered 503"),
    ],
)
def test_transfers_that_a_cpu_cannot_make_are_refused(given: dict[str, Any], message: str) -> None:
    from m3_sglang.options import require_served

    with pytest.raises(ValueError, match=message):
        require_served(SimpleNamespace(**(DECODE | given)))
