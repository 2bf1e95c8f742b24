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
