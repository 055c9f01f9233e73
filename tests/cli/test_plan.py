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
