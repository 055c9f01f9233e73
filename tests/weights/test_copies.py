"""A wide weight is counted twice in predictions only where products copy it, and whoever cannot tell says that they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import torchwrap as tw
from torchwrap.weights import copies

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_known", {})


def pages(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """What the counter of pages says, one time after another."""
    said: Iterator[int] = iter(counts)
    monkeypatch.setattr(copies, "_faults", lambda: next(said))
    monkeypatch.setattr(copies, "refusal", lambda: "")
    monkeypatch.setattr(copies, "_TRIED", 1 * MIB)


@pytest.mark.parametrize(("taken", "copied"), [(0, False), (2000, False), (2999, True), (9000, True)])
def test_a_copy_is_known_by_its_pages(monkeypatch: pytest.MonkeyPatch, taken: int, copied: bool) -> None:
    """Of 8704 pages that a whole copy takes, a third is that of a copy in a type of half the width, or in one of fewer blocks."""
    pages(monkeypatch, 0, 8704, 8704 + taken)
    assert copies.copies_weight(torch.float32, 16) is copied
    assert copies.copies_weight(torch.float32, 9) is copied  # known: the counter has nothing more to say


@pytest.mark.parametrize("whole", [17, 499])
def test_huge_pages_hide_a_copy_so_it_is_taken_to_be_made(monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    pages(monkeypatch, 0, whole, whole, 0, 8704, 8704)
    assert copies.copies_weight(torch.float32, 16) is True
    assert copies.copies_weight(torch.float32, 16) is False  # tried again, as nothing was learnt


def test_memory_that_somebody_keeps_hides_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "refusal", lambda: "another allocator")
    assert copies.copies_weight(torch.float32, 16) is True
    assert not copies._known


def wide() -> nn.Sequential:
    """Four rows through a matrix of 64 MiB and two small ones."""
    return nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 64)).eval()


def test_predictions_count_the_copy_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tw.offload(wide(), params="disk", goal="train", activations="recompute")
    handle = tw.handle_of(model, "offload")

    def predicted(made: bool, rows: int) -> tuple[int, int]:
        monkeypatch.setattr(copies, "copies_weight", lambda dtype, rows: made)
        return handle.predict(batch=rows).peak_process, handle.predict_training(batch=rows, tokens=1).peak_process

    with_copy, without = predicted(True, 4), predicted(False, 4)
    assert with_copy[0] - without[0] >= 56 * MIB
    assert with_copy[1] - without[1] >= 56 * MIB


def test_the_room_that_is_left_does_not_hang_on_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for made in (True, False):
        monkeypatch.setattr(copies, "copies_weight", lambda dtype, rows, made=made: made)
        model = tw.offload(wide(), device_memory="140MiB", params="disk")
        plans.append(tw.handle_of(model, "offload").plan)
        tw.unwrap(model)
    assert plans[0] == plans[1]
