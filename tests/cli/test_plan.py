"""plan answers from headers alone, and a budget that is too small is a finding with the smallest that works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Done


def test_plan_of_a_budget_that_fits(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("plan", pristine, "--device-memory", "2MiB", "--json")
    assert done.status == 0, done.err
    assert done.data["fits"] is True
    assert done.data["plan"]


def test_plan_names_the_smallest_budget_and_that_one_fits(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("plan", pristine, "--device-memory", "1KiB", "--json")
    assert done.status == 1
    assert done.data["fits"] is False
    needed = done.data["needed"]
    assert needed > done.data["available"]
    assert cli("plan", pristine, "--device-memory", needed).status == 0


def test_plan_takes_budgets_in_one_word(cli: Callable[..., Done], pristine: Path) -> None:
    one = cli("plan", pristine, "--budget", "device=2MiB", "--json").data["plan"]
    other = cli("plan", pristine, "--device-memory", "2MiB", "--json").data["plan"]
    timed = {"seconds_per_pass", "bandwidth", "seconds_per_token"}
    assert {key: value for key, value in one.items() if key not in timed} == {
        key: value for key, value in other.items() if key not in timed
    }


def test_plan_for_training_tells_a_step(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("plan", pristine, "--device-memory", "2MiB", "--goal", "train", "--json")
    assert done.status == 0, done.err
    step = done.data["plan"]["training"]
    assert step["peak_process"] > step["ring_bytes"] + step["gradient_bytes"] + step["slot_bytes"]
    # Weights are read for forward, backward and update; two states are read, and both with the weights are written.
    assert step["read_bytes"] > step["written_bytes"] >= 2 * done.data["plan"]["streamed_bytes"]
    assert step["seconds_per_step"] is None or step["seconds_per_step"] > 0
    assert cli("plan", pristine, "--device-memory", "2MiB", "--json").data["plan"]["training"] is None


def test_plan_with_tiles_needs_less(cli: Callable[..., Done], pristine: Path) -> None:
    whole = cli("plan", pristine, "--device-memory", "1KiB", "--json").data["needed"]
    tiled = cli("plan", pristine, "--device-memory", "1KiB", "--tile-above", "16KiB", "--json").data["needed"]
    assert tiled < whole
    assert cli("plan", pristine, "--device-memory", tiled, "--tile-above", "16KiB").status == 0
    assert cli("plan", pristine, "--device-memory", tiled).status == 1
