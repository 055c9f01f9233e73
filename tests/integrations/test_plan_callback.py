"""`PlanCallback`: the plan lies beside every checkpoint, and a run that goes on is compared with it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import torchwrap as tw

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations.training import arguments, llama, offloaded, trainer_of
from torchwrap.integrations.transformers.callbacks import PlanCallback

SAVING: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def train(model: Any, folder: Path, *callbacks: Any, resumed: Any = None, **fields: Any) -> Any:
    trainer = trainer_of(model, arguments(folder, **{**SAVING, **fields}), *callbacks)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def traced(**fields: Any) -> Any:
    return tw.trace(llama(), **fields)


def test_the_plan_is_written_into_every_checkpoint_and_loads_as_what_is_applied(tmp_path: Path) -> None:
    model = traced()
    train(model, tmp_path, PlanCallback())
    for step in (2, 4):
        assert tw.Plan.load(tmp_path / f"checkpoint-{step}") == tw.plan_of(model)


def test_going_on_with_the_same_techniques_says_nothing(tmp_path: Path) -> None:
    train(traced(), tmp_path, PlanCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error", tw.TorchwrapWarning)
        train(traced(), tmp_path, PlanCallback(), resumed=str(tmp_path / "checkpoint-2"))


def test_a_missing_exact_technique_is_a_warning(tmp_path: Path) -> None:
    train(traced(), tmp_path, PlanCallback())
    with pytest.warns(tw.TorchwrapWarning, match="trace is not applied now"):
        train(llama(), tmp_path, PlanCallback(), resumed=True, max_steps=5)


def test_a_missing_technique_that_changes_results_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tw.trace), "exactness", "lossy")
    train(traced(), tmp_path, PlanCallback())
    trainer = trainer_of(llama(), arguments(tmp_path / "elsewhere", **SAVING), PlanCallback())
    with pytest.raises(tw.PlanError, match=r"trace is not applied now.*Plan.load\(folder\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 2


def test_every_difference_can_be_made_an_error_or_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(llama(), tmp_path, PlanCallback())
    with pytest.raises(tw.PlanError, match="trace was not applied"):
        train(traced(), tmp_path, PlanCallback("raise"), resumed=True, max_steps=5)
    monkeypatch.setattr(type(tw.trace), "exactness", "lossy")
    with pytest.warns(tw.TorchwrapWarning, match="trace was not applied"):
        train(traced(), tmp_path, PlanCallback("warn"), resumed=True, max_steps=5)
    with pytest.raises(tw.ConfigError, match="'no'"):
        PlanCallback("no")  # type: ignore[arg-type]


def test_another_model_is_an_error(tmp_path: Path) -> None:
    train(traced(), tmp_path, PlanCallback())
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    plan = json.loads(state["stateful_callbacks"]["PlanCallback"]["attributes"]["plan"])
    plan["model"]["parameters"] = 7
    state["stateful_callbacks"]["PlanCallback"]["attributes"]["plan"] = json.dumps(plan)
    path.write_text(json.dumps(state))
    with pytest.raises(tw.PlanError, match=r"'parameters': 7} is now"):
        train(traced(), tmp_path, PlanCallback(), resumed=str(tmp_path / "checkpoint-2"))


def test_a_plan_put_beside_a_checkpoint_by_hand_is_compared_too(tmp_path: Path) -> None:
    train(llama(), tmp_path)
    tw.plan_of(traced()).save(tmp_path / "checkpoint-4")
    with pytest.warns(tw.TorchwrapWarning, match="trace is not applied now"):
        train(llama(), tmp_path, PlanCallback(), resumed=True, max_steps=6)  # and saves, although it is new in this run
    assert (tmp_path / "checkpoint-6" / "torchwrap.json").is_file()


def test_a_checkpoint_without_a_plan_is_gone_on_from(tmp_path: Path) -> None:
    train(llama(), tmp_path)
    trainer = train(traced(), tmp_path, PlanCallback(), resumed=True, max_steps=6)
    assert trainer.state.global_step == 6


def test_a_checkpoint_with_a_plan_is_gone_on_from_without_the_callback(tmp_path: Path) -> None:
    train(traced(), tmp_path, PlanCallback())
    assert train(llama(), tmp_path, resumed=True, max_steps=5).state.global_step == 5


def test_restored_callbacks_keep_their_settings(tmp_path: Path) -> None:
    train(llama(), tmp_path, PlanCallback("raise"))
    with pytest.raises(tw.PlanError, match="trace was not applied"):
        train(traced(), tmp_path, PlanCallback(), resumed=True, max_steps=5, restore_callback_states_from_checkpoint=True)


def test_changed_settings_are_named(tmp_path: Path) -> None:
    def adapted(k: int) -> Any:
        model = offloaded(llama(), k=k)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "model.norm.weight")
        return model

    train(adapted(2), tmp_path, PlanCallback())
    with pytest.warns(tw.TorchwrapWarning, match="offload: k=2 is now 3"):
        train(adapted(3), tmp_path, PlanCallback(), resumed=True, max_steps=5)
