"""Fixtures of tests that measure back ends, or put something else in their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.tuning_cases import Timed
from torchwrap.attention import dispatch
from torchwrap.attention.prepared import forget
from torchwrap.attention.settings import Settings


@pytest.fixture(autouse=True)
def nothing_prepared() -> None:
    """What an earlier test has prepared does not serve what stands in the place of a back end."""
    forget()


@pytest.fixture
def measure(tmp_path: Path) -> Settings:
    return Settings(tune="measure", tune_dir=str(tmp_path / "attention"))


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Timed], list[tuple[str, ...]]]:
    """Measuring gives these figures; the names of every measurement are listed."""

    def of(seconds: Timed) -> list[tuple[str, ...]]:
        asked: list[tuple[str, ...]] = []

        def told(runs: Any, device: torch.device) -> tuple[Timed, dict[str, str]]:
            asked.append(tuple(runs))
            return {name: seconds[name] for name in runs}, {}

        monkeypatch.setattr(dispatch, "median_seconds", told)
        return asked

    return of
