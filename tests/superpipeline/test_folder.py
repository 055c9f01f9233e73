"""From a checkpoint folder: the loaded model's bits, with no more weights in memory than the window promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import torchwrap as tw
from tests.integrations.tiny import Case, case
from tests.models import run
from tests.stream.fake_arena import FakeArena, Machine
from tests.superpipeline.device import counted_slots, handle_of, separate, weights_present
from torchwrap.core.tensors import data_of, is_placeholder
from torchwrap.stream.planner import PAGE
from torchwrap.superpipeline.handle import SuperpipelineHandle

KINDS = ["LlamaForCausalLM", "LlamaForCausalLM-tied", "MixtralForCausalLM", "T5ForConditionalGeneration-tied", "BertModel"]
every_kind = pytest.mark.parametrize("row", [case(name) for name in KINDS], ids=KINDS)


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output.to_tuple()) if torch.is_tensor(leaf)]


def same(got: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def loaded(row: Case, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Writes the folder, and loads it as transformers does."""
    row.build().save_pretrained(folder)
    model: nn.Module = type(row.build()).from_pretrained(folder, **({} if dtype is None else {"dtype": dtype})).eval()
    return model


def padding(handle: SuperpipelineHandle) -> int:
    """Weights that stay are read into one buffer, each in pages of its own: at most three pages more for each."""
    return 3 * PAGE * sum(piece.resident for piece in handle.pieces)


def saved(folder: Path, name: str = "LlamaForCausalLM") -> Path:
    case(name).build().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"k": 1}, None), ({"k": 2, "k_prime": 2}, None), ({"k": "auto"}, None), ({"k": 1}, torch.bfloat16)],
    ids=["k1", "k2-2", "auto", "k1-bf16"],
)
@every_kind
def test_outputs_are_those_of_the_loaded_model(row: Case, fields: dict[str, Any], dtype: torch.dtype | None, tmp_path: Path) -> None:
    plain = loaded(row, tmp_path, dtype)
    expected = run(plain, row.inputs())
    model = tw.superpipeline.from_pretrained(tmp_path, dtype=dtype, **fields)
    assert type(plain) in type(model).__mro__ and not model.training
    assert handle_of(model).knobs.units == row.blocks
    for _ in range(4):  # "auto" measures the second and chooses after it
        assert same(run(model, row.inputs()), expected)
    assert (handle_of(model).chosen is not None) == ("auto" in fields.values())
    assert tw.unwrap(model) is model
    assert same(run(model, row.inputs()), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@every_kind
def test_only_what_stays_is_read_before_the_first_pass(row: Case, tmp_path: Path) -> None:
    """Parameters outside the blocks are in memory, those of blocks are one element each, and there is no slot yet."""
    total = sum(p.nbytes for p in loaded(row, tmp_path).parameters())
    model = tw.superpipeline.from_pretrained(tmp_path, k=2, k_prime=1)
    handle = handle_of(model)
    assert handle.engine is not None and handle.engine._slots == [] and handle.engine.counters["bytes_read"] == 0
    away = [data_of(piece.parameter) for piece in handle.pieces if not piece.resident]
    assert away and all(is_placeholder(data) and data.untyped_storage().nbytes() == data.element_size() for data in away)
    stays = sum(piece.nbytes for piece in handle.pieces if piece.resident)
    assert handle.reader.stats.bytes == stays < total / 2
    assert handle.plan.fixed_bytes <= weights_present(model) <= handle.plan.fixed_bytes + padding(handle)


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (2, 1), (2, 2)])
@every_kind
def test_never_more_than_the_window(row: Case, k: int, k_prime: int, tmp_path: Path) -> None:
    loaded(row, tmp_path)
    model = tw.superpipeline.from_pretrained(tmp_path, k=k, k_prime=k_prime, record=True)
    handle = handle_of(model)
    for _ in range(3):
        run(model, row.inputs())
    assert handle.engine is not None and len(handle.engine._slots) == k
    predicted = handle.predict().device_bytes
    assert predicted == handle.stats()["held_bytes"]
    assert predicted <= weights_present(model) <= predicted + padding(handle)
    assert handle.timeline is not None
    assert max(held for _, held in handle.timeline.samples) <= predicted
    before = handle.stats()
    for _ in range(k_prime):
        run(model, row.inputs())
    now = handle.stats()
    assert now["transfers"] - before["transfers"] == handle.knobs.moved_per_pass * k_prime
    assert now["bytes_read"] > before["bytes_read"]


def test_the_folder_is_only_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
    model = tw.superpipeline.from_pretrained(folder, k=1)
    run(model, case("LlamaForCausalLM").inputs())
    assert handle_of(model).store is None  # nothing was written anywhere else either
    tw.unwrap(model)
    assert {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_too_little_memory_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    folder = saved(tmp_path, "T5ForConditionalGeneration-tied")
    with pytest.raises(tw.BudgetError, match=r"^superpipeline: 2 block") as caught:
        tw.superpipeline.from_pretrained(folder, k=2, device_memory=10_000)
    assert caught.value.where == "k" and caught.value.available == 10_000 < caught.value.needed
    model = tw.superpipeline.from_pretrained(folder, k=2, device_memory=caught.value.needed)
    assert handle_of(model).predict().device_bytes == caught.value.needed
    with pytest.raises(tw.BudgetError, match=r"^superpipeline: k=3"):
        handle_of(model).turn(3, 1)


def test_memory_that_is_reserved_is_not_taken(tmp_path: Path) -> None:
    """What is reserved for activations comes off the machine's memory, whatever `device_memory` says."""
    with pytest.raises(tw.BudgetError, match=r"^superpipeline: 1 block") as caught:
        tw.superpipeline.from_pretrained(saved(tmp_path), k=1, reserve=1 << 50, device_memory="1GiB")
    assert caught.value.available == 0


def test_settings_that_do_not_go_together_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for fields, where in (
        ({"keep": True}, "keep"),
        ({"io_chunk": 100}, "io_chunk"),
        ({"activation_memory": 1000}, "activation_memory"),
        ({"device": "abacus"}, "device"),
        ({"store": "host"}, "store"),
        ({"units": ("nothing",)}, "units"),
    ):
        with pytest.raises(tw.ConfigError, match="superpipeline") as caught:
            tw.superpipeline.from_pretrained(folder, k=1, **fields)
        assert caught.value.where is not None and caught.value.where.endswith(where)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tw.TorchwrapError) as caught:
        tw.superpipeline.from_pretrained(tmp_path / "nowhere", k=1)
    assert "offload" not in str(caught.value)


@pytest.mark.parametrize("backend", ["buffered", "direct"])
def test_reading_settings(backend: str, tmp_path: Path) -> None:
    row = case("LlamaForCausalLM")
    expected = run(loaded(row, tmp_path), row.inputs())
    model = tw.superpipeline.from_pretrained(
        tmp_path, k=2, k_prime=2, io_backend=backend, io_threads=1, io_chunk="4KiB", verify="always", io_timeout_s=5
    )
    for _ in range(2):
        assert same(run(model, row.inputs()), expected)


def test_converted_weights_lie_where_asked_and_stay_if_asked(tmp_path: Path) -> None:
    row, folder = case("LlamaForCausalLM"), tmp_path / "model"
    expected = run(loaded(row, folder, torch.bfloat16), row.inputs())
    model = tw.superpipeline.from_pretrained(folder, k=1, dtype=torch.bfloat16, path=str(tmp_path / "work"))
    assert sum(path.stat().st_size for path in (tmp_path / "work").rglob("*") if path.is_file()) > 0
    assert same(run(model, row.inputs()), expected)
    tw.unwrap(model)
    assert same(run(model, row.inputs()), expected)


def test_a_model_on_meta_is_sent_to_its_folder() -> None:
    with torch.device("meta"):
        model = case("LlamaForCausalLM").build()
    with pytest.raises(tw.UnsupportedModelError) as caught:
        tw.superpipeline(model, k=1)
    assert "torchwrap.superpipeline.from_pretrained" in str(caught.value)


def test_training_from_a_folder(tmp_path: Path) -> None:
    row = case("LlamaForCausalLM")
    plain = loaded(row, tmp_path).train()
    model = tw.superpipeline.from_pretrained(tmp_path, k=2, k_prime=1).train()
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2), tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2)]
    for _ in range(3):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            losses.append(each(**row.inputs(), labels=row.inputs()["input_ids"]).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(*losses)
    tw.unwrap(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("order", ["late", "early", "random"])
@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "T5ForConditionalGeneration-tied"])
def test_beside_a_device(patch: pytest.MonkeyPatch, name: str, store: str, order: Any, tmp_path: Path) -> None:
    row, machine = case(name), Machine(order)
    expected = run(loaded(row, tmp_path), row.inputs())
    separate(patch, machine)
    slots = counted_slots(patch, FakeArena)
    model = tw.superpipeline.from_pretrained(tmp_path, k=2, k_prime=2, store=store)
    stats = handle_of(model).stats()
    assert (stats["host_bytes"] > 0, stats["disk_bytes"] > 0) == (store == "host", store == "disk")
    for _ in range(3):
        assert same(run(model, row.inputs()), expected)
    assert slots.peak == 2 * handle_of(model).room.slot_bytes
    tw.unwrap(model)
    assert same(run(model, row.inputs()), expected)
    machine.check()
