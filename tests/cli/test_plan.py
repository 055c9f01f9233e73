"""plan answers from headers alone, and a budget that is too small is a finding with the smallest that works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_plan_for_training_tells_what_inputs_and_activations_cost(cli: Callable[..., Done], pristine: Path) -> None:
    def step(*more: object) -> dict[str, Any]:
        done = cli("plan", pristine, "--device-memory", "2MiB", "--goal", "train", *more, "--json")
        assert done.status == 0, done.err
        return done.data["plan"]["training"]

    small, large, twice = (step("--batch", batch, "--tokens", tokens) for batch, tokens in ((1, 64), (4, 512), (8, 512)))
    assert large["peak_process"] > small["peak_process"]
    # Besides what the first call takes once, it goes by the tokens.
    grown, more = large["working_bytes"] - small["working_bytes"], twice["working_bytes"] - large["working_bytes"]
    assert grown == pytest.approx(more * (4 * 512 - 64) / (4 * 512), rel=0.05)
    keep, again, disk = (step("--batch", 4, "--activations", mode) for mode in ("keep", "recompute", "disk"))
    assert keep["working_bytes"] > disk["working_bytes"] > again["working_bytes"]
    assert (keep["swapped_bytes"], again["swapped_bytes"]) == (0, 0) and disk["swapped_bytes"] > 0
    for name in ("read_bytes", "written_bytes"):
        assert disk[name] == again[name] + disk["swapped_bytes"]
    assert [word in each["activations"] for word, each in (("kept", keep), ("recomputed", again), ("disk", disk))] == [True] * 3
    assert disk["computing_s"] is None and disk["seconds_per_step"] == disk["moving_s"] > again["moving_s"] / 2


def test_plan_in_words_says_that_computing_is_not_known_and_what_to_reserve(cli: Callable[..., Done], pristine: Path) -> None:
    done = cli("plan", pristine, "--device-memory", "2MiB", "--goal", "train", "--batch", 64)
    assert done.status == 0, done.err
    for words in ("process at its highest", "read per step", "written per step", "computing is not known yet", "activations", "reserve="):
        assert words in done.out
    assert "reserve=" not in cli("plan", pristine, "--device-memory", "2MiB", "--goal", "train").out


def test_plan_for_training_takes_the_optimizer(cli: Callable[..., Done], pristine: Path) -> None:
    def moved(*more: object) -> int:
        done = cli("plan", pristine, "--device-memory", "2MiB", "--goal", "train", *more, "--json")
        assert done.status == 0, done.err
        return int(done.data["plan"]["training"]["written_bytes"])

    assert moved() == moved("--optimizer", "AdamW") > moved("--optimizer", 4) > moved("--optimizer", "SGD") == moved("--optimizer", 0)


@pytest.mark.parametrize("given", [("--batch", 0), ("--tokens", "many"), ("--activations", "lost"), ("--optimizer", "Best")], ids=str)
def test_plan_refuses_inputs_that_are_none(cli: Callable[..., Done], pristine: Path, given: tuple[object, ...]) -> None:
    assert cli("plan", pristine, *given).status == 2


def test_plan_with_tiles_needs_less(cli: Callable[..., Done], pristine: Path) -> None:
    whole = cli("plan", pristine, "--device-memory", "1KiB", "--json").data["needed"]
    tiled = cli("plan", pristine, "--device-memory", "1KiB", "--tile-above", "16KiB", "--json").data["needed"]
    assert tiled < whole
    assert cli("plan", pristine, "--device-memory", tiled, "--tile-above", "16KiB").status == 0
    assert cli("plan", pristine, "--device-memory", tiled).status == 1
