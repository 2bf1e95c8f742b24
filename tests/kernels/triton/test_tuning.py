"""Configurations: families of chips, rows that fit, and files that say what they should."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from m3_kernels import tuning
from m3_kernels.tuning import FAMILIES, arch_of, family_of, kernel_config


@pytest.mark.parametrize(
    ("arch", "family"),
    [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 100), (103, 100), (121, 120)],
)
def test_families(arch: int, family: int) -> None:
    assert family_of(arch) == family


def test_old_chips_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be at least 80 \(Ampere\); got 75"):
        family_of(75)


def test_the_first_fitting_row_counts_and_the_family_overrides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "default": {
            "kernel": [
                {"when": {"size": {"max": 64}}, "config": {"A": 1, "B": 1}},
                {"when": {"kind": ["x", "y"]}, "config": {"A": 2, "B": 2}},
                {"when": {"kind": "z"}, "config": {"A": 3, "B": 3}},
            ]
        },
        "sm90": {"kernel": [{"when": {"size": {"min": 64, "max": 65}}, "config": {"B": 9}}]},
        "sm80": {},
    }
    monkeypatch.setattr(tuning, "_rows", files.__getitem__)
    assert kernel_config("kernel", arch=80, size=64, kind="z") == {"A": 1, "B": 1}
    assert kernel_config("kernel", arch=80, size=65, kind="y") == {"A": 2, "B": 2}
    assert kernel_config("kernel", arch=90, size=65, kind="z") == {"A": 3, "B": 9}
    assert kernel_config("kernel", arch=90, size=63, kind="z") == {"A": 1, "B": 1}
    with pytest.raises(ValueError, match="no row of 'kernel'"):
        kernel_config("kernel", arch=90, size=65, kind="q")


def test_the_release_of_triton_is_part_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "default": {"kernel": [{"config": {"A": 1}}]},
        "sm90": {"kernel": [{"when": {"triton": {"max": 306}}, "config": {"A": 2}}]},
    }
    monkeypatch.setattr(tuning, "_rows", files.__getitem__)
    asked = {release: kernel_config("kernel", arch=90, triton=release) for release in (306, 307)}
    assert asked == {306: {"A": 2}, 307: {"A": 1}}
    monkeypatch.setattr(tuning, "triton_release", lambda: 306)
    assert kernel_config("kernel", arch=90) == {"A": 2}
    monkeypatch.setattr(tuning, "triton_release", lambda: 309)
    assert kernel_config("kernel", arch=90) == {"A": 1}


@pytest.mark.parametrize(
    ("version", "release"), [("3.6.0", 306), ("3.10.1", 310), ("3.7.0+git1a2b3c4d", 307)]
)
def test_numbers_of_releases(monkeypatch: pytest.MonkeyPatch, version: str, release: int) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    assert tuning.triton_release.__wrapped__() == release


def test_older_triton_loads_by_pointers_where_its_descriptors_cost_registers() -> None:
    shapes = {
        "index_topk_decode_scores": {"dot": "bfloat16", "keys": "bfloat16"},
        "sparse_attention_decode": {"dot": "bfloat16", "kv": "bfloat16", "rows": 1},
        "sparse_attention_prefill": {"dot": "bfloat16", "kv": "bfloat16", "rows": 8},
    }
    for kernel, shape in shapes.items():
        for arch, release, wanted in (
            (120, 306, False),
            (120, 307, True),
            (90, 306, True),
            (90, 309, True),
        ):
            config = kernel_config(kernel, arch=arch, triton=release, **shape)
            assert config["USE_DESCRIPTORS"] is wanted, (kernel, arch, release)


def test_a_call_cannot_change_the_data() -> None:
    first = kernel_config("work_plan", arch=90)
    first.clear()
    assert kernel_config("work_plan", arch=90)["num_warps"] == 4


def test_families_override_nothing_unknown() -> None:
    """A misspelt kernel or parameter in a family's file would be silently without effect."""
    folder = resources.files(tuning)
    default = json.loads(folder.joinpath("default.json").read_text())
    for family in FAMILIES:
        rows = json.loads(folder.joinpath(f"sm{family}.json").read_text())
        assert set(rows) <= set(default)
        for kernel, own in rows.items():
            known = set().union(*(row["config"] for row in default[kernel]))
            assert all(set(row["config"]) <= known for row in own), kernel


def test_the_interpreter_stands_for_a_chip() -> None:
    assert arch_of(torch.device("cpu")) in FAMILIES
