"""The loading guard is active exactly while transformers constructs a model, and importing torchwrap's part loads no framework."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.tiny import case
from torchwrap.core.integration import LoadingState, integration_for, integration_for_folder
from torchwrap.integrations.transformers import integration


def state() -> LoadingState:
    with integration.loading() as now:
        return now


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[LoadingState]:
    """The guard's answers at the end of every construction of a Llama."""
    from transformers import LlamaForCausalLM

    seen: list[LoadingState] = []
    original = LlamaForCausalLM.__init__

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        seen.append(state())

    monkeypatch.setattr(LlamaForCausalLM, "__init__", record)
    return seen


def test_inactive_outside_a_loader_and_in_plain_construction(spy: list[LoadingState]) -> None:
    case("LlamaForCausalLM").build()
    assert [*spy, state()] == [LoadingState(), LoadingState()]


def test_active_inside_from_pretrained(spy: list[LoadingState], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    case("LlamaForCausalLM").build().save_pretrained(tmp_path)  # type: ignore[operator]
    spy.clear()
    LlamaForCausalLM.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert spy == [LoadingState(True, "from_pretrained")] * 2
    assert state() == LoadingState()


def test_active_inside_from_config(spy: list[LoadingState]) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(case("LlamaForCausalLM").build().config)
    assert spy[-1] == LoadingState(True, "from_config")


def test_a_loader_in_another_thread_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    case("LlamaForCausalLM").build().save_pretrained(tmp_path)  # type: ignore[operator]
    seen: list[LoadingState] = []
    original = LlamaForCausalLM.__init__

    def elsewhere(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        thread = threading.Thread(target=lambda: seen.append(state()))
        thread.start()
        thread.join()

    monkeypatch.setattr(LlamaForCausalLM, "__init__", elsewhere)
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert seen == [LoadingState()]


def test_the_core_finds_the_integration_for_models_and_folders(tmp_path: Path) -> None:
    model = case("LlamaModel").build()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert integration_for(model) is integration
    assert integration_for_folder(tmp_path) is integration
    assert integration_for(torch.nn.Linear(2, 2)).name == "generic"


def test_questions_about_foreign_models_and_folders_import_no_framework(tmp_path: Path) -> None:
    script = f"""
import sys, pathlib, torch
from torchwrap.integrations.transformers import integration as hf
from torchwrap.integrations.torchvision import integration as tv
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
assert not hf.matches(model) and not tv.matches(model)
assert not hf.opens(pathlib.Path({str(tmp_path)!r}))
with hf.loading() as state:
    assert not state.active
assert not {{name.partition('.')[0] for name in sys.modules}} & {{'transformers', 'torchvision', 'accelerate', 'timm'}}
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
