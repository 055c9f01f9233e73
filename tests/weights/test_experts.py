"""Experts that are slices of one parameter: only the routed ones are read, and results stay those of the whole model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.weights.budgets import streamed
from torchwrap.core.transaction import records_of
from torchwrap.offload.handle import OffloadHandle
from torchwrap.storage.request import Read
from torchwrap.storage.workers import Pool
from torchwrap.stream import routed

EXPERTS, WIDTH, INNER, LAYERS = 16, 64, 64, 3
SLICES = 3 * WIDTH * INNER * 4
"""Bytes of one expert: both projections into the experts' width and the one back, float32."""

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def make(family: str, way: str = "grouped_mm") -> nn.Module:
    """A small model with 16 experts in each of 3 layers, of which a token uses 2."""
    import transformers

    sizes = dict(vocab_size=96, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(max_position_embeddings=64, num_experts_per_tok=2, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    torch.manual_seed(0)
    if family == "mixtral":
        config = transformers.MixtralConfig(**sizes, intermediate_size=INNER, num_local_experts=EXPERTS)
    else:
        kind = {"qwen2_moe": transformers.Qwen2MoeConfig, "qwen3_moe": transformers.Qwen3MoeConfig}[family]
        config = kind(**sizes, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=way).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)  # so that different tokens go to different experts
    return model


def handle(model: nn.Module) -> OffloadHandle:
    found = tw.handle_of(model, "offload")
    assert isinstance(found, OffloadHandle)
    return found


def generated(model: nn.Module, batch: int) -> torch.Tensor:
    prompt = torch.arange(1, 1 + 5 * batch).reshape(batch, 5)
    with torch.no_grad():
        result: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    return result


def token(value: int = 7, count: int = 1) -> torch.Tensor:
    return torch.arange(value, value + count).reshape(1, count)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, use_cache=False).logits
    return result


def settle(model: nn.Module) -> None:
    """Passes of one token, until units that were fetched whole are out of the slots."""
    for value in (3, 4, 5):
        logits(model, token(value))


@contextmanager
def routings(model: nn.Module) -> Iterator[list[set[int]]]:
    """The experts used by each call of an experts module within the block."""
    seen: list[set[int]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(set(args[1].reshape(-1).tolist()))

    hooks = [m.register_forward_pre_hook(note) for name, m in model.named_modules() if name.endswith(".experts")]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices that were not read are NaN from beginning to end, as nothing that was not asked for may be used."""
    monkeypatch.setattr(routed, "_mark_bytes", lambda piece: piece.nbytes)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_whole_model(family: str, way: str, batch: int, poisoned: None) -> None:
    model = make(family, way)
    expected = generated(model, batch)
    wrapped = streamed(model)
    assert torch.equal(generated(wrapped, batch), expected)
    assert torch.equal(generated(wrapped, batch), expected)
    assert handle(wrapped).stats()["expert_bytes_skipped"] > 0


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_the_routed_slices_and_no_others(family: str, count: int, poisoned: None) -> None:
    model = make(family)
    expected = logits(model, token(7, count))
    wrapped = streamed(model)
    settle(wrapped)
    before = handle(wrapped).stats()
    with routings(wrapped) as seen:
        assert torch.equal(logits(wrapped, token(7, count)), expected)
    after = handle(wrapped).stats()
    used = sum(len(rows) for rows in seen)
    assert len(seen) == LAYERS and used < LAYERS * EXPERTS // 2
    assert after["expert_bytes_read"] - before["expert_bytes_read"] == used * SLICES
    assert after["expert_bytes_skipped"] - before["expert_bytes_skipped"] == (LAYERS * EXPERTS - used) * SLICES
    rest = int(before["streamed_bytes"]) - LAYERS * EXPERTS * SLICES
    gaps = LAYERS * 4 * 4096
    assert 0 <= after["bytes_read"] - before["bytes_read"] - rest - used * SLICES <= gaps


def test_a_slot_that_keeps_its_unit_gets_what_is_missing(poisoned: None) -> None:
    model = make("mixtral")
    expected = [logits(model, token(value)) for value in range(10, 20)]
    wrapped = tw.offload(model, params="disk", k=LAYERS + 4)  # every unit has a slot of its own
    settle(wrapped)
    handle(wrapped).trim()
    before = handle(wrapped).stats()["expert_bytes_read"]
    with routings(wrapped) as seen:
        assert all(torch.equal(logits(wrapped, token(value)), each) for value, each in zip(range(10, 20), expected, strict=True))
    distinct = sum(len(set().union(*seen[layer::LAYERS])) for layer in range(LAYERS))
    assert handle(wrapped).stats()["expert_bytes_read"] - before == distinct * SLICES


def test_many_tokens_read_whole_units_ahead() -> None:
    prompt = torch.arange(1, 81).reshape(2, 40)
    expected = logits(make("qwen3_moe"), prompt)
    figures = []
    for wrapped in (streamed(make("qwen3_moe")), streamed(make("qwen3_moe"), expert_streaming=False)):
        for _ in range(2):
            assert torch.equal(logits(wrapped, prompt), expected)
        figures.append(handle(wrapped).stats())
    assert figures[0]["expert_bytes_skipped"] == 0
    assert all(figures[0][name] == figures[1][name] for name in ("bytes_read", "unit_hits", "unit_uses"))


def test_a_prompt_after_single_tokens_waits_for_experts_in_the_first_layer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.arange(1, 81).reshape(2, 40)
    model = make("qwen3_moe")
    expected = logits(model, prompt)
    wrapped = streamed(model)
    settle(wrapped)
    late: list[str] = []
    read = routed.RoutedSlots._read_slices

    def watched(self: routed.RoutedSlots, fetch: Any, slices: Any) -> None:
        late.append(fetch.unit.name)
        read(self, fetch, slices)

    monkeypatch.setattr(routed.RoutedSlots, "_read_slices", watched)
    assert torch.equal(logits(wrapped, prompt), expected)
    assert late == ["model.layers.0"]


def test_it_can_be_switched_off() -> None:
    wrapped = streamed(make("mixtral"), expert_streaming=False)
    settle(wrapped)
    before = handle(wrapped).stats()
    logits(wrapped, token())
    after = handle(wrapped).stats()
    assert "expert_bytes_read" not in after
    assert after["bytes_read"] - before["bytes_read"] >= before["streamed_bytes"]


def test_memory_held_is_the_same_as_without() -> None:
    with_it, without = streamed(make("mixtral")), streamed(make("mixtral"), expert_streaming=False)
    assert handle(with_it).stats()["held_bytes"] == handle(without).stats()["held_bytes"]


def test_experts_that_are_a_unit_of_their_own(poisoned: None) -> None:
    model = make("qwen3_moe")
    expected = generated(model, 3)
    wrapped = streamed(model, max_unit_bytes=EXPERTS * SLICES // 2)
    assert any(unit.name.endswith("mlp.experts") for unit in handle(wrapped).units)
    assert torch.equal(generated(wrapped, 3), expected)
    settle(wrapped)
    before = handle(wrapped).stats()["expert_bytes_read"]
    with routings(wrapped) as seen:
        logits(wrapped, token())
    assert handle(wrapped).stats()["expert_bytes_read"] - before == sum(map(len, seen)) * SLICES


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_budgets_that_keep_some_of_the_experts(share: float, poisoned: None) -> None:
    model = make("mixtral")
    expected = generated(model, 3)
    total = sum(p.nbytes for p in model.parameters())
    wrapped = tw.offload(model, device_memory=int(total * share) + (1 << 20))
    assert torch.equal(generated(wrapped, 3), expected)


def test_a_slice_that_nobody_asked_for_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.integrations.transformers import experts

    known = experts.routed

    def lies(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        routing = known(module, args, kwargs)
        return None if routing is None else routing.reshape(-1)[:1]

    monkeypatch.setattr(experts, "routed", lies)
    wrapped = streamed(make("mixtral"))
    settle(wrapped)
    assert logits(wrapped, token()).isnan().all()


def test_outside_of_their_call_experts_are_placeholders() -> None:
    wrapped = streamed(make("mixtral"))
    settle(wrapped)
    layer = wrapped.model.layers[1]
    seen: list[bool] = []
    layer.mlp.gate.register_forward_hook(lambda *_: seen.append(bool(layer.mlp.experts.down_proj.isnan().all())))
    logits(wrapped, token())
    assert seen == [True]
    assert all(p.isnan().all() for p in layer.mlp.experts.parameters())


# -- what happens besides -----------------------------------------------------------------------------------------------------------------


def test_gradients_and_passes_without_them_in_turn(poisoned: None) -> None:
    model, twin = make("qwen3_moe"), make("qwen3_moe")
    wrapped = streamed(model)
    for value in (5, 9):
        assert torch.equal(logits(wrapped, token(value)), logits(twin, token(value)))
        for each in (wrapped, twin):
            each.zero_grad()
            each(token(value, 3), labels=token(value, 3)).loss.backward()
        theirs = dict(twin.named_parameters())
        for name, parameter in wrapped.named_parameters():
            assert (parameter.grad is None) == (theirs[name].grad is None)
            assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad), name


def test_several_batches_at_once(poisoned: None) -> None:
    model = make("mixtral")
    batches = [token(value, count) for value, count in ((3, 1), (9, 2), (20, 1), (40, 30))]
    expected = [logits(model, ids) for ids in batches]
    wrapped = streamed(model)
    settle(wrapped)
    with torch.no_grad():
        for _ in range(2):
            got = handle(wrapped).forward_many([{"input_ids": ids, "use_cache": False} for ids in batches])
            assert all(torch.equal(each.logits, right) for each, right in zip(got, expected, strict=True))


def test_state_dict_saving_and_unwrapping(tmp_path: Path, poisoned: None) -> None:
    model = make("qwen2_moe")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = streamed(model)
    settle(wrapped)
    assert all(torch.equal(value, expected[name]) for name, value in wrapped.state_dict().items())
    wrapped.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    before = logits(wrapped, token())
    model = tw.unwrap(wrapped)
    assert not records_of(model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, token()), before)


def test_from_a_folder(tmp_path: Path, poisoned: None) -> None:
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    expected = generated(model, 1)
    wrapped = tw.offload.from_pretrained(tmp_path, params="disk", device="cpu", k=2)
    assert torch.equal(generated(wrapped, 1), expected)
    assert handle(wrapped).stats()["expert_bytes_skipped"] > 0


def test_new_values_are_used(poisoned: None) -> None:
    model, other = make("mixtral"), make("mixtral")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name:
                parameter.mul_(1.5)
    wrapped = streamed(model)
    settle(wrapped)
    wrapped.load_state_dict(other.state_dict())
    for value in (7, 8):
        assert torch.equal(logits(wrapped, token(value)), logits(other, token(value)))


def test_copies_read_routed_experts_too(poisoned: None) -> None:
    model = make("mixtral")
    expected = logits(model, token())
    twin = copy.deepcopy(streamed(model))
    settle(twin)
    assert torch.equal(logits(twin, token()), expected)
    assert handle(twin).stats()["expert_bytes_skipped"] > 0


# -- faults -------------------------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_routed_slice_is_refused(poisoned: None) -> None:
    wrapped = streamed(make("mixtral"))
    expected = logits(wrapped, token())
    settle(wrapped)
    with routings(wrapped) as seen:
        logits(wrapped, token())
    settle(wrapped)
    row = min(seen[1])
    piece = next(p for p in handle(wrapped).pieces if p.name == "model.layers.1.mlp.experts.down_proj")
    assert piece.home is not None
    place = piece.home.offset + row * (piece.nbytes // EXPERTS) + 100
    _flip(Path(piece.home.file.path), place)
    with pytest.raises(tw.CorruptDataError, match=rf"down_proj\[{row}\]"):
        logits(wrapped, token())
    _flip(Path(piece.home.file.path), place)
    assert torch.equal(logits(wrapped, token()), expected)


def test_the_first_read_of_what_was_stored_is_compared_with_what_was_written(poisoned: None) -> None:
    """Also of slices that no token was routed to before: their sums are learned with the whole parameter's being compared."""
    wrapped = streamed(make("mixtral"))
    with routings(wrapped) as seen:
        logits(wrapped, token())
    handle(wrapped).trim()
    piece = next(p for p in handle(wrapped).pieces if p.name == f"model.layers.{LAYERS - 1}.mlp.experts.gate_up_proj")
    assert piece.home is not None
    row = min(set(range(EXPERTS)) - seen[-1])
    _flip(Path(piece.home.file.path), piece.home.offset + row * (piece.nbytes // EXPERTS) + 8)
    with pytest.raises(tw.CorruptDataError, match="gate_up_proj"):
        for value in range(1, 90):
            logits(wrapped, token(value))


def test_the_first_read_of_a_folder_reads_routed_slices_only(tmp_path: Path, poisoned: None) -> None:
    make("mixtral").save_pretrained(tmp_path)
    whole = tw.offload.from_pretrained(tmp_path, params="disk", device="cpu", k=1, expert_streaming=False)
    wrapped = tw.offload.from_pretrained(tmp_path, params="disk", device="cpu", k=1)
    for value in (9, 7):
        assert torch.equal(logits(wrapped, token(value)), logits(whole, token(value)))
    assert handle(wrapped).stats()["expert_bytes_skipped"] > 0


def test_bytes_beside_a_slice_are_those_that_were_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of whole pages brings bytes of neighbours along, which nobody compares: they must not stay."""
    wrapped = streamed(make("mixtral"))
    expected = logits(wrapped, token())
    settle(wrapped)
    fetch = Pool._fetch

    def disturb(self: Pool, ticket: Any, piece: Any, bounce: Any) -> Iterator[Any]:
        yield from fetch(self, ticket, piece, bounce)
        first, last = piece.wanted()
        if piece.place is not None and "[" in "".join(part.name for part in piece.read.parts):
            piece.place[: first - piece.low] = b"\x01" * (first - piece.low)
            piece.place[last - piece.low :] = b"\x01" * (piece.high - last)

    monkeypatch.setattr(Pool, "_fetch", disturb)
    for _ in range(3):
        assert torch.equal(logits(wrapped, token()), expected)


def test_an_error_of_the_disk_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    wrapped = streamed(make("mixtral"))
    expected = logits(wrapped, token())
    settle(wrapped)
    fetch = Pool._fetch

    def fails(self: Pool, ticket: Any, piece: Any, bounce: Any) -> Iterator[Any]:
        if "experts" in "".join(part.name for part in _parts(piece.read)):
            raise OSError(5, "injected")
        yield from fetch(self, ticket, piece, bounce)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "_fetch", fails)
        with pytest.raises(tw.StorageError, match="injected"):
            logits(wrapped, token())
    assert torch.equal(logits(wrapped, token()), expected)


def test_an_error_of_the_model_leaves_it_usable(poisoned: None) -> None:
    wrapped = streamed(make("mixtral"))
    expected = logits(wrapped, token())
    settle(wrapped)
    experts = wrapped.model.layers[1].mlp.experts
    activation, experts.act_fn = experts.act_fn, _Raises()
    with pytest.raises(ZeroDivisionError):
        logits(wrapped, token())
    experts.act_fn = activation
    assert torch.equal(logits(wrapped, token()), expected)
    assert all(p.isnan().all() for p in experts.parameters())


class _Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def _parts(read: Read) -> tuple[Any, ...]:
    return read.parts


def _flip(path: Path, offset: int) -> None:
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
