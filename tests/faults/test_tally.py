"""The counting itself: outcomes, the report of several processes, and a wrong number that must not pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.faults.tally import COUNTS, Faults, Tally, add_to_report, same, summary_line
from torchwrap.core.errors import StorageError


def test_each_outcome_is_counted_where_it_belongs(tmp_path: Path) -> None:
    tally = Tally()
    faults, one, other = Faults(tally), torch.ones(3), torch.zeros(3)

    def broken() -> None:
        raise StorageError("gone", where="here")

    faults.survived(lambda: one, one)
    faults.detected(broken, StorageError, says=["gone", "here"])
    with pytest.raises(AssertionError, match="wrong result"):
        faults.survived(lambda: other, one)
    with pytest.raises(AssertionError, match="no error"):
        faults.detected(lambda: one, StorageError)
    with pytest.raises(ZeroDivisionError):
        faults.survived(lambda: 1 / 0, one)
    with pytest.raises(AssertionError, match="not in the message"):
        faults.detected(broken, StorageError, says=["elsewhere"])
    path = tmp_path / "mine"
    path.write_text("bytes")
    with pytest.raises(AssertionError, match="mine"), faults.intact(path):
        path.write_text("other")
    assert tally == {"injected": 6, "survived": 1, "detected": 2, "silent_wrong": 2, "untyped": 1, "data_lost": 1}


def test_outputs_are_the_same_only_bit_by_bit() -> None:
    assert same(torch.ones(2), torch.ones(2)) and same((torch.ones(2), [torch.zeros(1)]), [torch.ones(2), torch.zeros(1)])
    assert not same(torch.ones(2), torch.ones(2).double()) and not same(torch.tensor([1.0]), torch.tensor([1.0000001]))
    assert not same([], []) and not same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_processes_of_one_run_add_up_and_a_new_run_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "faults.json"
    add_to_report(path, {"injected": 2, "survived": 2}, "first run")
    assert add_to_report(path, {"injected": 3, "detected": 3}, "first run")["injected"] == 5
    assert json.loads(path.read_text()) == {"run": "first run", **dict.fromkeys(COUNTS, 0), "injected": 5, "survived": 2, "detected": 3}
    assert add_to_report(path, {"injected": 1}, "second run") == {**dict.fromkeys(COUNTS, 0), "injected": 1}


def test_the_summary_names_every_count() -> None:
    assert summary_line({"injected": 3, "survived": 1, "detected": 2}) == (
        "faults: 3 injected, 1 survived, 2 detected, 0 untyped, 0 silent wrong, 0 data lost"
    )
