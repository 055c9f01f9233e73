"""Settings, refusals, figures and pictures."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.models import by_name, run
from tests.superpipeline.device import handle_of
from torchwrap.superpipeline.picture import draw, grid


def blocks(depth: int = 6, width: int = 32) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).eval()


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"k": 0}, "k"),
        ({"k": -1}, "k"),
        ({"k": True}, "k"),
        ({"k": 2.5}, "k"),
        ({"k": "two"}, "k"),
        ({"k_prime": 0}, "k_prime"),
        ({"k": 2, "k_prime": 3}, "k_prime"),
        ({"store": "nvme"}, "store"),
        ({"max_slowdown": 0.9}, "max_slowdown"),
        ({"path": ""}, "path"),
    ],
    ids=str,
)
def test_values_that_are_none(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(tw.ConfigError) as caught:
        tw.Superpipeline(**fields)
    assert caught.value.where is not None and caught.value.where.endswith(where)


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"k": 7}, "k"), ({"k": "auto", "k_prime": 7}, "k_prime"), ({"store": "host"}, "store"), ({"units": ("nothing",)}, "units")],
    ids=str,
)
def test_values_that_do_not_fit_the_model(fields: dict[str, Any], where: str) -> None:
    model = blocks()
    with pytest.raises(tw.ConfigError) as caught:
        tw.superpipeline(model, **fields)
    assert caught.value.where == where
    assert tw.wrappers_of(model) == {}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(tw.UnsupportedModelError, match="no blocks"):
        tw.superpipeline(nn.Linear(4, 4), k=1)


def test_parameters_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = blocks()
    with pytest.raises(tw.UnsupportedModelError, match="meta"):
        tw.superpipeline(model, k=1)


def test_memory_for_less_than_k_blocks_is_refused_with_what_is_needed() -> None:
    model = blocks()
    with pytest.raises(tw.BudgetError) as caught:
        tw.superpipeline(model, k=3, device_memory=20_000)
    tw.superpipeline(model, k=3, device_memory=caught.value.needed)
    assert handle_of(model).predict().device_bytes == caught.value.needed
    with pytest.raises(tw.BudgetError, match="k=4 blocks need"):
        handle_of(model).turn(4, 1)


def test_twice_and_beside_offload_on_one_module_are_conflicts() -> None:
    model = tw.superpipeline(blocks(), k=2)
    with pytest.raises(tw.ConflictError):
        tw.superpipeline(model, k=3)
    with pytest.raises(tw.ConflictError, match="both decide where"):
        tw.offload(model, params="disk")
    tw.unwrap(model)
    tw.offload(model, params="disk")
    with pytest.raises(tw.ConflictError, match="both decide where"):
        tw.superpipeline(model, k=2)


def test_settings_survive_a_plan(tmp_path: Any) -> None:
    model = tw.superpipeline(blocks(), k=3, k_prime=2, max_slowdown=1.5)
    tw.plan_of(model).save(tmp_path)
    other = tw.Plan.load(tmp_path).apply(blocks())
    assert tw.wrappers_of(other)["superpipeline"] == tw.Superpipeline(k=3, k_prime=2, max_slowdown=1.5)


def test_units_and_pin_by_name() -> None:
    fixture = by_name("llama")
    model = fixture.build()
    expected = run(model, fixture.inputs()).logits
    tw.superpipeline(model, k=2, units=("LlamaMLP",), pin=("model.layers.3.mlp",))
    assert handle_of(model).knobs.units == 3
    assert torch.equal(run(model, fixture.inputs()).logits, expected)


def test_turning_the_knobs_between_passes() -> None:
    model = blocks()
    x = torch.randn(3, 32)
    expected = model(x)
    tw.superpipeline(model, k=1)
    handle = handle_of(model)
    for k, k_prime in ((3, 2), (2, 2), (5, 1), (1, 1), (6, 1)):
        handle.turn(k, k_prime)
        assert (handle.stats()["k"], handle.stats()["k_prime"]) == (k, k_prime)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    with pytest.raises(tw.ConfigError):
        handle.turn(7, 1)


def test_figures_before_and_after_a_measured_pass() -> None:
    model = tw.superpipeline(blocks(), k=2, k_prime=1)
    handle, x = handle_of(model), torch.randn(3, 32)
    before = handle.predict()
    assert (before.seconds_per_pass, before.slowdown, before.stall_free) == (None, None, None)
    assert before.moved_per_pass == 6 and before.streamed_bytes == 6 * 32 * 32 * 4 == handle.bytes_moved()
    assert "tune()" in handle.explain()
    model(x)
    handle.tune()
    model(x)
    after = handle.predict()
    assert after.slowdown is not None and after.slowdown >= 1.0 and after.resident_seconds is not None
    assert handle.predict(k=6).slowdown == 1.0 and handle.predict(k=6).device_bytes == 6 * 32 * 32 * 4
    assert json.loads(json.dumps(after.to_dict()))["k"] == 2
    assert "predicted slow-down" in handle.explain()
    with pytest.raises(tw.ConfigError):
        handle.predict(k=2, k_prime=3)


def test_describe_shows_where_the_weights_are() -> None:
    model = tw.superpipeline(blocks(), k=2)
    model(torch.zeros(1, 32))
    row = next(row for row in tw.describe(model).rows if row.technique.startswith("superpipeline"))
    assert row.moved == row.disk == 6 * 32 * 32 * 4
    assert row.device == handle_of(model).predict().device_bytes
    assert "superpipeline" in str(tw.describe(model))


def test_trim_frees_the_slots_until_the_next_pass() -> None:
    model = blocks()
    x = torch.randn(1, 32)
    expected = model(x)
    tw.superpipeline(model, k=3)
    model(x)
    handle = handle_of(model)
    handle.trim()
    assert handle.engine is not None and handle.engine._slots == []
    assert torch.equal(model(x), expected)


def test_the_timeline_never_shows_more_than_the_window() -> None:
    model = tw.superpipeline(blocks(), k=2, record=True)
    for _ in range(3):
        model(torch.zeros(1, 32))
    timeline = handle_of(model).timeline
    assert timeline is not None
    assert max(present for _, present in timeline.samples) == 2 * 32 * 32 * 4
    assert {event.lane for event in timeline.events} >= {"compute", "read"}


@pytest.mark.parametrize("form", ["class", "factory"])
def test_decorators(form: str) -> None:
    if form == "class":

        @tw.superpipeline(k=2)
        class Net(nn.Sequential):
            def __init__(self) -> None:
                super().__init__(*(nn.Linear(8, 8) for _ in range(4)))

        model: nn.Module = Net()
    else:
        model = tw.superpipeline(k=2)(lambda: blocks(4))()
    assert handle_of(model).knobs.k == 2


def test_to_another_dtype_keeps_the_window() -> None:
    model = blocks()
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    expected = blocks().bfloat16()(x)
    tw.superpipeline(model, k=2)
    model(x.float())
    model.bfloat16()
    assert torch.equal(model(x), expected)
    handle = handle_of(model)
    assert handle.predict().device_bytes == handle.plan.held_bytes
    assert handle.bytes_moved() == 6 * 32 * 32 * 2


def test_picture_of_the_knobs() -> None:
    pytest.importorskip("matplotlib")
    model = tw.superpipeline(blocks(), k=2)
    handle = handle_of(model)
    assert handle.picture().startswith(b"\x89PNG")
    handle.tune()
    model(torch.zeros(1, 32))
    guesses = [handle.predict(k=k, k_prime=k_prime) for k, k_prime in grid(6)]
    drawn = draw(guesses, title="six", runs={(2, 1): (20_000, 0.001)})
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 10_000


def test_the_drawn_grid_is_bounded() -> None:
    assert grid(3) == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert len(grid(200)) < 300 and grid(200)[-1][0] == 200


def test_every_field_is_on_the_page() -> None:
    from tests.docs.test_complete import HOOK, ROOT

    page = HOOK.fill((ROOT / "docs" / "superpipeline.md").read_text())
    assert [field.name for field in dataclasses.fields(tw.Superpipeline) if f"| `{field.name}` |" not in page] == []
