"""The plan file: round trip, what is refused, and what is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchwrap as tw
from tests.unit.parts import Net
from torchwrap.core.plan import MAX_BYTES, MAX_DEPTH

GOOD = {"format": 1, "torchwrap": "0.1.0", "model": {}, "techniques": [{"name": "trace", "version": 1, "config": {"where": "inside"}}]}


def test_plan_makes_another_model_what_this_one_is(tmp_path: Path) -> None:
    model = tw.trace(Net(), where="inside")
    tw.plan_of(model).save(tmp_path)
    other = tw.Plan.load(tmp_path).apply(Net())
    assert tw.wrappers_of(other) == tw.wrappers_of(model)
    assert tw.plan_of(other) == tw.Plan.load(tmp_path / "torchwrap.json") == tw.plan_of(model)


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    for config in (tw.Trace(), tw.Trace(where="inside")):
        tw.plan_of(tw.apply(Net(), config)).save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["torchwrap.json"]
    assert tw.Plan.load(tmp_path).configs == (tw.Trace(where="inside"),)


def test_plan_of_an_unwrapped_model_is_empty_and_applies() -> None:
    plan = tw.plan_of(Net())
    assert plan.configs == () and plan.model == {"class": "Net", "parameters": 60}
    assert tw.wrappers_of(tw.apply(Net(), plan)) == {}


def test_plan_for_another_model_warns() -> None:
    with pytest.warns(tw.TorchwrapWarning, match="made for Net with 60 parameters"):
        tw.plan_of(tw.trace(Net())).apply(nn.Linear(2, 2))


def _text(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def _technique(**changes: Any) -> str:
    return _text(techniques=[GOOD["techniques"][0] | changes])  # type: ignore[index]


HOSTILE = {
    "empty": "",
    "not json": "{'format': 1}",
    "not an object": "[]",
    "format missing": json.dumps({"techniques": []}),
    "format is true": _text(format=True),
    "format newer": _text(format=2),
    "unknown entry": _text(extra=1),
    "techniques no list": _text(techniques={}),
    "technique no object": _text(techniques=["trace"]),
    "unknown technique": _technique(name="no_such_technique"),
    "module as technique": _technique(name="os.path"),
    "path as technique": _technique(name="../../etc/passwd"),
    "name no string": _technique(name=[]),
    "version newer": _technique(version=99),
    "version float": _technique(version=1.0),
    "config no object": _technique(config=[]),
    "duplicate entry": '{"format": 1, "format": 1, "techniques": []}',
    "duplicate field": _technique().replace('"where": "inside"', '"where": "inside", "where": "outside"'),
    "nan": _technique().replace('"inside"', "NaN"),
    "infinity": _technique().replace('"inside"', "-Infinity"),
    "float overflow": _technique().replace('"inside"', "1e999"),
    "huge integer": _technique().replace('"inside"', "9" * 5000),
    "deep": "[" * 100_000,
    "deep and closed": _technique().replace('"inside"', "[" * MAX_DEPTH + "]" * MAX_DEPTH),
    "too large": " " * (MAX_BYTES + 1),
    "not utf-8": b"\xff\xfe{}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_plan_is_a_plan_error(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(tw.PlanError) as caught:
        tw.Plan.from_json(text)
    assert isinstance(caught.value, ValueError) and len(str(caught.value)) < 500
    file = tmp_path / "plan.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(tw.PlanError, match=r"plan\.json"):
        tw.Plan.load(file)


@pytest.mark.parametrize("config", [{"wehre": "inside"}, {"where": "nowhere"}, {"modules": [1]}, {"modules": [["a"]]}], ids=str)
def test_bad_settings_are_a_config_error_that_names_the_place(config: dict[str, Any]) -> None:
    with pytest.raises(tw.ConfigError, match=r"techniques\[0\]\.config"):
        tw.Plan.from_json(_technique(config=config))


def test_strings_with_brackets_and_quotes_do_not_count_as_depth() -> None:
    name = '[{"\\' * 50
    assert tw.Plan.from_json(_technique(config={"modules": [name]})).configs == (tw.Trace(modules=(name,)),)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)

_entry = st.fixed_dictionaries(
    {"name": st.sampled_from(["trace", "x"]) | st.text(max_size=5), "version": st.integers(-1, 3), "config": _json}
)


@settings(max_examples=200)
@given(st.one_of(_json, st.fixed_dictionaries({"format": st.just(1), "techniques": st.lists(_entry, max_size=2)})))
def test_any_json_is_read_or_refused_with_a_typed_error(value: Any) -> None:
    try:
        plan = tw.Plan.from_json(json.dumps(value))
    except (tw.PlanError, tw.ConfigError):
        return
    assert tw.Plan.from_json(plan.to_json()) == plan


def test_a_plan_never_imports_what_it_names() -> None:
    before = set(sys.modules)
    with pytest.raises(tw.PlanError, match="no_such_technique"):
        tw.Plan.from_json(_technique(name="no_such_technique"))
    assert not {name for name in set(sys.modules) - before if "no_such" in name}


def test_effective_order_and_version_are_written() -> None:
    content = json.loads(tw.plan_of(tw.trace(Net())).to_json())
    assert content["torchwrap"] == tw.__version__ and content["techniques"][0]["version"] == tw.Trace.version
    assert torch.is_tensor(Net()(torch.ones(1, 4)))
