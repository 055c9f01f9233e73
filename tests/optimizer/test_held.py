"""State dicts that somebody holds while training goes on: as in memory, they show the model and the optimizer as these are now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchwrap as tw
from tests.optimizer.optimizing import ADAM, pair, trained
from torchwrap import OffloadedOptimizer


def _flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{number}.{key}": value for number, kept in state["state"].items() for key, value in kept.items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kept", [False, True])
def test_a_held_state_dict_shows_the_weights_as_they_are_now(tmp_path: Path, kept: bool) -> None:
    plain, model = pair()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, path=tmp_path / "run" if kept else None, **ADAM)
    held = [model.state_dict()]
    first = {name: value.clone() for name, value in held[0].items()}
    states = []
    for step in range(4):
        trained(plain, reference, range(step, step + 1))
        trained(model, optimizer, range(step, step + 1))
        held.append(model.state_dict())
        states.append(optimizer.state_dict())
        assert all(_same(each, plain.state_dict()) for each in held)
        assert all(_same(_flat(each), _flat(reference.state_dict())) for each in states)
        if kept and step < 3:
            optimizer.commit()
    if kept:
        trained(plain, reference, range(4, 5))
        optimizer.rollback()
        now = {name: value.clone() for name, value in model.state_dict().items()}
        assert not _same(now, plain.state_dict())
        assert all(_same(each, now) for each in held)
        assert all(_same(_flat(each), _flat(optimizer.state_dict())) for each in states)
    model.load_state_dict(first)
    assert all(_same(each, first) for each in held)


def test_state_dicts_of_a_folder_whose_tensors_lie_anywhere_follow_too(tmp_path: Path) -> None:
    """In the file of a checkpoint a tensor begins anywhere in a page; one that cannot be mapped elsewhere is copied."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=104, intermediate_size=200, num_hidden_layers=3, num_attention_heads=4, vocab_size=301, max_position_embeddings=64
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    model = tw.offload.from_pretrained(tmp_path / "model", params="disk").train()
    optimizer = OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, path=tmp_path / "run", chunk=4096 * 4)
    held = [model.state_dict()]
    for step in range(4):
        ids = torch.randint(0, 301, (1, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.commit()
        held.append(model.state_dict())
        now = {name: value.clone() for name, value in held[-1].items()}
        assert all(_same(each, now) for each in held)


def test_a_view_at_another_place_of_its_page_becomes_a_copy_that_follows(tmp_path: Path) -> None:
    from torchwrap.storage.safefile import TensorFile
    from torchwrap.storage.spill import SpillStore
    from torchwrap.storage.views import Views

    old, new = torch.randn(70, 1000), torch.randn(70, 1000)
    save_file({"other": torch.zeros(3), "w": old}, tmp_path / "a.safetensors", {"filler": "x" * 11})
    file = TensorFile.open(tmp_path / "a.safetensors")
    assert file.segments["w"].offset % 4096
    views = Views()
    view = views.view(file, "w")
    with SpillStore.create(tmp_path / "spill") as store:
        store.put("w", new)
        views.show(store.file, "w")
        assert torch.equal(view, new)
        store.put("w", old)
        views.show(store.file, "w")
        assert torch.equal(view, old)


def test_a_place_that_a_view_has_left_is_used_again(tmp_path: Path) -> None:
    model = tw.offload(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)), params="disk", units=("0", "2"), path=tmp_path)
    store = tw.handle_of(model, "offload").store
    assert store is not None
    held = model.state_dict()
    sizes = []
    for scale in range(9):
        model.load_state_dict({name: torch.full_like(value, float(scale)) for name, value in held.items()})
        sizes.append(store.file.nbytes)
        assert all(bool((value == scale).all()) for value in held.values())
    assert sizes[-1] == sizes[4], sizes
