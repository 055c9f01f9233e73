"""Fixtures of tests that measure back ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.tuning_cases import Timed
from torchwrap.attention import dispatch
from torchwrap.attention.settings import Settings


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
