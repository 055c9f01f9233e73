"""Nothing grows: forwards, wrap/unwrap cycles and training steps leave memory, descriptors, threads and objects where they were."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set and descriptors are read from /proc")

MEGABYTE = 10**6


@pytest.mark.parametrize("repeated", ["forwards", "cycles"])
def test_repetition_grows_nothing_and_stays_exact(repeated: str, child: Any, tmp_path: Path) -> None:
    growth = child(repeated, tmp_path).check().data
    assert growth["equal"]
    assert growth["slope_bytes_per_100"] < MEGABYTE, growth
    assert growth["after"]["descriptors"] <= growth["before"]["descriptors"], growth
    assert growth["after"]["threads"] <= growth["before"]["threads"], growth
    # A few objects come and go with caches of torch; one leaked object per repetition would be 200.
    assert growth["after"]["objects"] - growth["before"]["objects"] < 100, growth
    assert growth.get("streamed_bytes", 1) > 0, "the model was resident, so nothing was tested"
    assert not growth.get("left_over"), "files stayed behind after unwrap"


def test_training_grows_nothing(child: Any, tmp_path: Path) -> None:
    growth = child("steps", tmp_path).check().data
    assert growth["last"] < growth["first"]
    assert growth["slope_bytes_per_100"] < MEGABYTE, growth
    assert growth["after"]["descriptors"] <= growth["before"]["descriptors"], growth
    assert growth["after"]["threads"] <= growth["before"]["threads"], growth
    assert growth["after"]["objects"] - growth["before"]["objects"] < 100, growth
    assert len(set(growth["sizes"][1:])) == 1, growth["sizes"]
    assert growth["streamed_bytes"] > 0, "the model was resident, so nothing was tested"
