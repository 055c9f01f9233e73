"""What a user found by trying: each of these was broken once."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import by_name, run
from tests.weights.budgets import streamed


def test_saving_into_the_folder_it_came_from(tmp_path: Path) -> None:
    fixture = by_name("llama-tied")
    fixture.build().save_pretrained(tmp_path)
    model = tw.offload.from_pretrained(tmp_path, params="disk")
    expected = run(model, fixture.inputs()).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(run(model, fixture.inputs()).logits, expected)
    again = tw.offload.from_pretrained(tmp_path, params="disk")
    assert torch.equal(run(again, fixture.inputs()).logits, expected)
    tw.unwrap(model)
    assert torch.equal(run(model, fixture.inputs()).logits, expected)


def test_forwards_with_gradients_on_leave_nothing_behind() -> None:
    def anonymous() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

    fixture = by_name("llama")
    model = streamed(fixture.build())
    ids = torch.randint(0, 96, (4, 256))
    for _ in range(3):
        model(ids)
    gc.collect()
    before, files = anonymous(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        model(ids)
    gc.collect()
    assert anonymous() - before < 32 << 10  # KiB; each leaked graph held about 20 MiB
    assert len(os.listdir("/proc/self/fd")) == files


def test_writing_to_a_state_dict_is_an_error_and_not_lost() -> None:
    fixture = by_name("llama")
    model = streamed(fixture.build())
    expected = run(model, fixture.inputs()).logits
    state = model.state_dict()
    with torch.no_grad():
        state["model.layers.1.mlp.up_proj.weight"].mul_(0.5)
    with pytest.raises(tw.ConflictError, match=r"layers\.1\.mlp\.up_proj"):
        run(model, fixture.inputs())
    assert torch.equal(run(model, fixture.inputs()).logits, expected)


def test_integers_stay_because_they_have_no_nan() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.randint(-100, 100, (64, 64), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(x) @ (self.q.float() / 100)

    model = streamed(nn.Sequential(*(Quantised() for _ in range(4))).eval())
    assert all(int(part.q.min()) > -101 and len(part.q.unique()) > 1 for part in model)


def test_a_wider_type_above_the_budget_is_refused_beforehand() -> None:
    fixture = by_name("llama")
    model = streamed(fixture.build().to(torch.bfloat16))
    inputs = fixture.inputs()
    expected = run(model, inputs).logits
    with pytest.raises(tw.BudgetError):
        model.float()
    assert torch.equal(run(model, inputs).logits, expected)


def test_a_move_to_meta_is_refused_and_changes_nothing() -> None:
    fixture = by_name("llama")
    model = streamed(fixture.build())
    expected = run(model, fixture.inputs()).logits
    with pytest.raises(tw.UnsupportedModelError):
        model.to("meta")
    assert torch.equal(run(model, fixture.inputs()).logits, expected)


def test_slots_beyond_the_units_are_not_made() -> None:
    model = by_name("llama").build()
    tw.offload(model, params="disk", k=1000)
    handle = tw.handle_of(model, "offload")
    assert handle.plan.slots <= len(handle.units)


def test_unwrapped_weights_take_no_more_room_than_before() -> None:
    model = by_name("llama").build()
    before = sum(p.untyped_storage().nbytes() for p in model.parameters())
    tw.unwrap(streamed(model))
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == before


@pytest.mark.parametrize("fields", [{"io_chunk": 1}, {"io_timeout_s": float("inf")}, {"path": ""}], ids=str)
def test_settings_that_could_not_work_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(tw.ConfigError):
        tw.Offload(**fields)
