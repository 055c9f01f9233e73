"""`describe` and `check`: rows, byte figures, printers."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import torch
from torch import nn

import torchwrap as tw
from tests.unit.parts import Journal, Net
from torchwrap.core.swap import attach, detach, layers_of
from torchwrap.core.technique import Handle

X = torch.ones(2, 4)


def test_bytes_equal_a_walk_over_distinct_storages() -> None:
    model = Net()
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    model.register_buffer("view", model.blocks[2].linear.weight.detach()[:2])
    row = tw.describe(model).rows[0]
    assert (row.device, row.host, row.disk) == (2 * 64 + 3 * 16, 0, 0)


def test_meta_parameters_take_no_bytes() -> None:
    assert tw.describe(Net().to("meta")).rows[0].device == 0


def test_bytes_of_a_placement_come_from_its_handle(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = tw.trace(Net())
    monkeypatch.setattr(type(tw.handle_of(model, "trace")), "tiers", lambda self: {"device": 100, "host": 20, "disk": 3}, raising=False)
    monkeypatch.setattr(type(tw.handle_of(model, "trace")), "bytes_moved", lambda self: 7, raising=False)
    rows = tw.describe(model).rows
    assert [(row.device, row.host, row.disk) for row in rows] == [(100, 20, 3)] * 2 and rows[1].moved == 7
    assert Handle().tiers() is None


def test_row_of_a_technique_says_where_it_is() -> None:
    row = tw.describe(tw.trace(Net(), where="inside")).rows[1]
    assert (row.technique, row.modules, row.slot, row.phase) == ("trace", 4, "inside", "observe")
    assert row.first == ["(the model)", "blocks.0", "blocks.1"]
    assert row.exactness == "bit-identical" and row.graph_breaks == 0 and row.config["where"] == "inside"


def test_a_module_is_named_once_and_the_rest_are_counted() -> None:
    class Six(nn.Sequential):
        pass

    model = tw.offload(Six(*(nn.Linear(512, 512) for _ in range(6))), device_memory="3MiB")
    report = tw.describe(model)
    assert report.rows[1].slot == "inside+outside" and report.rows[1].first == ["(the model)", "0", "1"]
    assert "offload: stands on: (the model), 0, 1 and 4 more" in str(report).splitlines()


def test_flops_are_counted_with_and_without_and_change_nothing() -> None:
    model = tw.trace(Net()).train()
    for inputs in (X, (X,), {"x": X}):
        row = tw.describe(model, inputs=inputs).rows[1]
        assert row.flops_before == row.flops_after == 3 * 2 * 2 * 4 * 4
    assert model.training and all(module.training for module in model.modules())


def test_dormant_and_foreign_are_listed() -> None:
    model, layer = Net(), Journal([], "x")
    attach(model.blocks[0], layer)
    model.blocks[0].forward = model.blocks[0].forward
    detach(model.blocks[0], layer)
    object.__setattr__(model.blocks[1], "_hf_hook", object())
    report = tw.describe(model)
    assert report.dormant == ["blocks.0"] and "accelerate hook at blocks.1" in report.foreign[0]
    assert "dormant class: blocks.0" in str(report)


def test_check_touches_nothing_and_lists_refusals() -> None:
    model = Net()
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    report = tw.check(model, X, configs=[tw.Trace(), tw.Trace(where="inside")])
    assert [row.technique for row in report.rows] == ["Net", "trace"] and report.rows[1].modules == 4
    assert len(report.problems) == 1 and "there already" in report.problems[0]
    assert report.rows[0].flops_before == 192
    assert [(type(module), dict(module.__dict__)) for module in model.modules()] == before
    assert layers_of(model) == () and tw.check(model, configs=tw.Trace(modules=("x",))).problems[0].startswith("trace: ")


def test_printers_fit_and_escape() -> None:
    model = nn.Sequential()
    model.add_module("x<b>" * 40, nn.Linear(2, 2))
    model.add_module("y", nn.Linear(2, 2))
    report = tw.describe(tw.trace(model))
    report.foreign.append("<script>" + "word " * 60)
    assert max(map(len, str(report).splitlines())) <= 100 and str(report).isascii()
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(report._repr_html_())
    assert set(tags) == {"table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["technique"] == "trace"
