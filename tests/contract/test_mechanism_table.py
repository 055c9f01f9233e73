"""One test per row of the comparison that chose the mechanism (architecture, section 3): `test_row_NN_...` in the order of the rows.

The set-up is that of the comparison: a llama with the technique and two neutral layers, one in each slot, on every decoder block and
on the root. `test_foreign_facts_...` at the end hold what these rows rely on in transformers; they fail when transformers changes.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_technique
from tests.contract.compare import equal, model_difference
from tests.contract.distributed import one_process_group
from tests.contract.neutral import Inner, Outer, Scaled, note_layers, notes
from tests.models import SHORT_LLAMA, ModelFixture, by_name, run

LLAMA: ModelFixture = by_name("llama")
BLOCKS = 4


def _wrap(case: Case, model: nn.Module) -> nn.Module:
    return tw.apply(model, [Outer(), case.config(model), Inner()])


@every_technique
def test_row_01_class_name_in_saved_architectures_is_kept(case: Case, tmp_path: Path) -> None:
    _wrap(case, LLAMA.build()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@every_technique
def test_row_02_forward_signature_is_kept(case: Case) -> None:
    model, twin = _wrap(case, LLAMA.build()), LLAMA.build()
    for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        assert inspect.signature(ours.__call__) == inspect.signature(theirs.__call__)


@every_technique
def test_row_03_hidden_states_and_attentions_are_captured_by_transformers(case: Case) -> None:
    model = LLAMA.build()
    model.set_attn_implementation("eager")
    output = run(_wrap(case, model), LLAMA.inputs(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == BLOCKS + 1
    assert len(output.attentions) == BLOCKS


@every_technique
def test_row_04_generate_is_equal(case: Case) -> None:
    model, twin = _wrap(case, LLAMA.build()), LLAMA.build()
    equal(model.generate(**LLAMA.prompt(), max_new_tokens=8), twin.generate(**LLAMA.prompt(), max_new_tokens=8))
    assert len(note_layers(model, "test_outer")) == BLOCKS + 1
    assert all(layer.journal.count("before") == 8 for layer in note_layers(model, "test_outer"))


@every_technique
def test_row_05_deepcopy_uses_its_own_weights_and_its_own_layers(case: Case) -> None:
    model = _wrap(case, LLAMA.build())
    twin = copy.deepcopy(model)
    expected = run(twin, LLAMA.inputs())
    assert notes(model, "test_inner") == []
    assert len(notes(twin, "test_inner")) == 2 * (BLOCKS + 1)
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    equal(run(twin, LLAMA.inputs()), expected)


@every_technique
def test_row_06_pickle_and_torch_save_of_the_module(case: Case) -> None:
    model = _wrap(case, LLAMA.build())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = run(LLAMA.build(), LLAMA.inputs())
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        equal(run(twin, LLAMA.inputs()), expected)
        assert list(tw.wrappers_of(twin)) == list(tw.wrappers_of(model))
        tw.unwrap(twin)
        assert {type(module) for module in twin.modules()} == {type(module) for module in LLAMA.build().modules()}


@every_technique
@pytest.mark.slow
def test_row_07_fullgraph_has_no_break_and_one_graph(case: Case, fresh_dynamo: None) -> None:
    from torch._dynamo.testing import CompileCounter

    model, twin = _wrap(case, SHORT_LLAMA.build()), SHORT_LLAMA.build()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    expected = run(twin, SHORT_LLAMA.inputs(), use_cache=False)
    with case.expects("fullgraph"):
        for _ in range(3):
            equal(run(compiled, SHORT_LLAMA.inputs(), use_cache=False), expected)
        assert graphs.frame_count == 1


@every_technique
@pytest.mark.slow
def test_row_08_layer_added_after_module_compile_takes_effect(case: Case, fresh_dynamo: None) -> None:
    model = SHORT_LLAMA.build()
    for module in (model, *model.model.layers):
        module.compile(backend="eager")
    plain = run(model, SHORT_LLAMA.inputs(), use_cache=False)
    tw.apply(model, [case.config(model), Scaled(factor=2.0)])
    expected = run(tw.apply(SHORT_LLAMA.build(), Scaled(factor=2.0)), SHORT_LLAMA.inputs(), use_cache=False)
    equal(run(model, SHORT_LLAMA.inputs(), use_cache=False).logits, expected.logits)
    tw.unwrap(model)
    equal(run(model, SHORT_LLAMA.inputs(), use_cache=False).logits, plain.logits)


@every_technique
@pytest.mark.parametrize("first", ["technique", "test_outer", "test_inner"])
def test_row_09_undo_in_any_order(case: Case, first: str) -> None:
    model = LLAMA.build()
    expected = run(model, LLAMA.inputs())
    _wrap(case, model)
    tw.unwrap(model, case.technique if first == "technique" else first)
    equal(run(model, LLAMA.inputs()), expected)
    for name in reversed(tw.wrappers_of(model)):
        tw.unwrap(model, name)
        equal(run(model, LLAMA.inputs()), expected)
    assert tw.wrappers_of(model) == {}


@every_technique
def test_row_10_undo_leaves_dict_and_class_as_before(case: Case) -> None:
    model, twin = LLAMA.build(), LLAMA.build()
    keys, classes = [list(module.__dict__) for module in model.modules()], [type(module) for module in model.modules()]
    _wrap(case, model)
    assert [type(module) for module in model.modules()] != classes
    tw.unwrap(model)
    assert [list(module.__dict__) for module in model.modules()] == keys
    assert [type(module) for module in model.modules()] == classes
    assert model_difference(model, twin) is None


@every_technique
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # transformers 5.23 renames it; 4.56 has this name only
def test_row_11_inside_layers_run_again_in_checkpoint_recompute(case: Case, reentrant: bool) -> None:
    model = _wrap(case, LLAMA.build().train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with case.expects("training"):
        model(**LLAMA.inputs(), use_cache=False).logits.sum().backward()
        for inside, outside in zip(note_layers(model, "test_inner"), note_layers(model, "test_outer"), strict=True):
            block = inside is not note_layers(model, "test_inner")[0]
            assert inside.journal.count("before") == (2 if block else 1)
            assert inside.journal.count("after") + inside.journal.count("failed") == inside.journal.count("before")
            assert outside.journal == ["before", "after"]


# --- row 12: FSDP2 before and after, DDP, parametrize, accelerate hooks on top, torch.export -----------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    with one_process_group():
        yield


def _shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


@every_technique
@pytest.mark.parametrize("when", ["before", "after"])
def test_row_12_fsdp2_before_and_after(case: Case, when: str, process_group: None) -> None:
    model, twin = LLAMA.build(), LLAMA.build()
    _shard(twin)
    expected = run(twin, LLAMA.inputs())
    with case.expects(f"sharded-{when}"):
        if when == "before":
            _shard(model)
            _wrap(case, model)
        else:
            _wrap(case, model)
            _shard(model)
        equal(run(model, LLAMA.inputs()), expected)
        assert len(notes(model, "test_inner")) == 2 * (BLOCKS + 1)
    tw.unwrap(model)
    if case.passes(f"sharded-{when}"):
        assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
        equal(run(model, LLAMA.inputs()), expected)
    elif when == "before":
        equal(run(model, LLAMA.inputs()), expected)


@every_technique
@pytest.mark.parametrize("when", ["before", "after"])
def test_row_12_distributed_data_parallel_before_and_after(case: Case, when: str, process_group: None) -> None:
    from torch.nn.parallel import DistributedDataParallel

    expected = run(LLAMA.build(), LLAMA.inputs())
    with case.expects(f"replicated-{when}"):
        if when == "before":
            outer = DistributedDataParallel(LLAMA.build())
            assert _wrap(case, outer) is outer
        else:
            outer = DistributedDataParallel(_wrap(case, LLAMA.build()))
        equal(run(outer, LLAMA.inputs()), expected)
        assert list(tw.wrappers_of(outer)) == list(tw.wrappers_of(outer.module)) != []
        tw.unwrap(outer)
        equal(run(outer, LLAMA.inputs()), expected)
        assert model_difference(outer.module, LLAMA.build()) is None


class _Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _linears() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).eval()


@every_technique
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("build", "place"), [(_linears, "1"), (by_name("mlp").build, "1.0.up")], ids=["on-a-block", "in-a-block"])
def test_row_12_parametrize_before_and_after(case: Case, when: str, build: Callable[[], nn.Module], place: str) -> None:
    from torch.nn.utils import parametrize

    model, twin, inputs = build(), build(), {"input": torch.randn(3, 8)}
    parametrize.register_parametrization(twin.get_submodule(place), "weight", _Double())
    expected = run(twin, inputs)
    if when == "after":
        _wrap(case, model)
    parametrize.register_parametrization(model.get_submodule(place), "weight", _Double())
    if when == "before":
        try:
            _wrap(case, model)
        except tw.UnsupportedModelError as error:
            pytest.skip(f"a parametrized Linear is of another class than its neighbours, so no repeated blocks are left: {error}")
    equal(run(model, inputs), expected)
    tw.unwrap(model)
    equal(run(model, inputs), expected)
    for each in (model, twin):
        parametrize.remove_parametrizations(each.get_submodule(place), "weight")
    equal(run(model, inputs), run(twin, inputs))


@every_technique
@pytest.mark.parametrize("first", ["technique", "accelerate"])
def test_row_12_accelerate_hooks_on_top_come_off_in_either_order(case: Case, first: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = LLAMA.build()
    expected = run(model, LLAMA.inputs())
    _wrap(case, model)
    for module in (model, *model.model.layers):
        add_hook_to_module(module, ModelHook())
    equal(run(model, LLAMA.inputs()), expected)
    steps: list[Callable[[], Any]] = [lambda: tw.unwrap(model), lambda: remove_hook_from_module(model, recurse=True)]
    for step in steps if first == "technique" else reversed(steps):
        step()
        equal(run(model, LLAMA.inputs()), expected)
    assert tw.wrappers_of(model) == {}


@every_technique
@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_row_12_torch_export(case: Case, strict: bool, fresh_dynamo: None) -> None:
    model = _wrap(case, LLAMA.build())
    inputs = LLAMA.inputs() | {"use_cache": False}
    with case.expects("fullgraph"):
        exported = torch.export.export(model, args=(), kwargs=inputs, strict=strict)
        equal(run(exported.module(), inputs).logits, run(LLAMA.build(), inputs).logits)


# --- facts about transformers 5.23 that the mechanism relies on ---------------------------------------------------------------------------


def test_foreign_fact_the_output_recorder_is_keyed_by_the_string_of_the_class() -> None:
    model = LLAMA.build()
    inner = model.model
    inner.__class__ = type("Renamed", (type(inner),), {})  # what a subclass per technique would do
    assert not run(model, LLAMA.inputs(), output_hidden_states=True).hidden_states


def test_foreign_fact_checkpointing_wraps_forward_and_only_the_outermost_class_checkpoints() -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    assert issubclass(type(LLAMA.build().model.layers[0]), GradientCheckpointingLayer)
    assert "__call__" not in vars(GradientCheckpointingLayer)
