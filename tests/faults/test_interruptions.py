"""Exceptions in the middle: in every block, in what acquires and releases weights, in two threads at once. The next call is right."""

from __future__ import annotations

import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.faults.disks import Disk, settle, under
from tests.faults.subjects import IDS, at_rest, lean, llama, probe, right_again, tower, twin_of
from tests.faults.tally import Faults, same
from torchwrap.core.errors import NotAppliedError
from torchwrap.storage.workers import Ticket

every_error = pytest.mark.parametrize("error", [ValueError("bad numbers"), KeyboardInterrupt()], ids=["error", "interrupt"])


def raising(error: BaseException, after: int = 0) -> Callable[..., None]:
    """Raises on call `after` (from 0), once."""
    calls = iter(range(1 << 30))

    def hook(*_: Any, **__: Any) -> None:
        if next(calls) == after:
            raise error

    return hook


@every_error
@pytest.mark.parametrize("first", [True, False], ids=["watched-pass", "later-pass"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("place", ["embed", "blocks.0.up", "blocks.1.down", "blocks.2", "blocks.3.down", "head"])
def test_exception_in_every_part_of_a_forward(place: str, slots: int, first: bool, error: BaseException, faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower(), slots=slots)
    if not first:
        assert same(probe(model), expected)
    handle = model.get_submodule(place).register_forward_hook(raising(error))
    assert faults.detected(lambda: probe(model), type(error)) is error
    handle.remove()
    right_again(model, expected)


@every_error
@pytest.mark.parametrize("layer", range(4))
def test_exception_while_gradients_are_recorded(layer: int, error: BaseException, faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    ids = torch.arange(6).view(1, 6)
    handle = model.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(raising(error))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert faults.detected(lambda: model(input_ids=ids), type(error)) is error
        assert torch.is_autocast_cache_enabled()
    handle.remove()
    right_again(model, expected)


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("slots", [1, 2])
def test_interrupt_while_waiting_for_weights(slots: int, after: int, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama(), slots=slots)
    real, interrupt = Ticket.wait, raising(KeyboardInterrupt(), after)

    def wait(ticket: Ticket, *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            interrupt()
        real(ticket, *args)

    monkeypatch.setattr(Ticket, "wait", wait)
    for _ in range(3):
        faults.judged(lambda: probe(model), expected, KeyboardInterrupt)
        at_rest(model)
    monkeypatch.undo()
    right_again(model, expected)


PLACES = {
    "submit": "torchwrap.storage.aio.Reader.submit",
    "before-compute": "torchwrap.stream.arena.HostArena.before_compute",
    "bind": "torchwrap.stream.window.bind",
    "shown": "torchwrap.stream.window.version_of",
    "counted": "torchwrap.stream.window.references",
    "unchanged": "torchwrap.storage.spillfile.SpillFile.check_unchanged",
    "hooks": "torch.autograd.graph.saved_tensors_hooks.__enter__",
}


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory")], ids=["interrupt", "memory"])
@pytest.mark.parametrize("place", PLACES)
def test_exception_inside_acquire(place: str, error: BaseException, after: int, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    real = pkgutil.resolve_name(PLACES[place])
    interrupt = raising(error, after)

    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            interrupt()
        return real(*args, **kwargs)

    monkeypatch.setattr(PLACES[place], call)
    for _ in range(3):
        with torch.enable_grad():
            faults.judged(lambda: probe(model), expected, type(error))
    monkeypatch.undo()
    settle(model)
    at_rest(model)
    right_again(model, expected)


def test_memory_runs_out_when_slots_are_made(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    for after in range(3):
        tw.handle_of(model, "offload").trim()
        interrupt = raising(MemoryError("no memory"), after)
        from torchwrap.storage import pool

        real = pool.allocate

        def allocate(nbytes: int, interrupt: Any = interrupt, real: Any = real) -> Any:
            interrupt()
            return real(nbytes)

        monkeypatch.setattr("torchwrap.storage.pool.allocate", allocate)
        faults.judged(lambda: probe(model), expected, MemoryError)
        monkeypatch.undo()
        at_rest(model)
    right_again(model, expected)


@pytest.mark.parametrize("after", range(6))
def test_memory_runs_out_while_unwrapping(after: int, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    assert same(probe(model), expected)
    from torchwrap.storage import pool

    real, interrupt = pool.allocate, raising(MemoryError("no memory"), after)
    monkeypatch.setattr("torchwrap.storage.pool.allocate", lambda nbytes: (interrupt(), real(nbytes))[1])
    faults.detected(lambda: tw.unwrap(model), MemoryError)
    monkeypatch.undo()
    assert "offload" in tw.wrappers_of(model)
    right_again(model, expected)


def test_unwrap_is_refused_without_memory(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    monkeypatch.setattr("torchwrap.weights.technique.memory_available", lambda: 1000)
    error = faults.detected(lambda: tw.unwrap(model), tw.BudgetError, says=["unwrapping"])
    assert error.available == 1000 and error.needed == tw.handle_of(model, "offload").stats()["disk_bytes"]
    monkeypatch.undo()
    right_again(model, expected)


def test_wrapping_and_unwrapping_twice(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    faults.detected(lambda: lean(model), tw.ConflictError, says=["offload", "unwrap"])
    faults.detected(lambda: tw.offload(model.blocks[1], params="device"), tw.ConflictError)
    assert same(probe(model), expected)
    tw.unwrap(model)
    faults.survived(lambda: probe(tw.unwrap(model)), expected)
    faults.detected(lambda: tw.unwrap(model, "offload"), NotAppliedError, says=["nothing"])


# -- threads ------------------------------------------------------------------------------------------------------------------------


def in_threads(*actions: Callable[[], Any]) -> list[Any]:
    """Results or exceptions of the actions, run at once."""
    results: list[Any] = [None] * len(actions)
    start = threading.Barrier(len(actions))

    def run(index: int) -> None:
        start.wait(10)
        try:
            results[index] = actions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return results


def test_threads_in_one_model(faults: Faults) -> None:
    plain, model = tower(), lean(tower())
    inputs = [(IDS + 17 * shift) % 8192 for shift in range(4)]
    expected = [probe(plain, ids) for ids in inputs]

    def several(ids: torch.Tensor) -> list[torch.Tensor]:
        return [probe(model, ids) for _ in range(4)]

    for result, wanted in zip(in_threads(*(lambda ids=ids: several(ids) for ids in inputs)), expected, strict=True):
        faults.survived(lambda result=result: result, [wanted] * 4)
    right_again(model, twin_of(tower))


def test_a_thread_fails_while_another_computes(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    bad = IDS.clone()
    bad[0, 0] = 8192  # out of range: torch's own IndexError
    with pytest.raises(IndexError):
        probe(tower(), bad)

    def failing() -> int:
        failures = 0
        for _ in range(5):
            try:
                probe(model, bad)
            except IndexError:
                failures += 1
        return failures

    failures, *others = in_threads(failing, *[lambda: [probe(model) for _ in range(5)]] * 2)
    assert failures == 5
    for result in others:
        faults.survived(lambda result=result: result, [expected] * 5)
    right_again(model, expected)


def tokens(model: nn.Module, prompt: torch.Tensor, count: int) -> Iterator[int]:
    """Greedy decoding with a cache, one token at a time."""
    cache, ids = None, prompt
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        yield int(ids)


def test_two_interleaved_generators(faults: Faults) -> None:
    plain, model = llama(), lean(llama())
    prompts = [torch.tensor([[5, 9, 20]]), torch.tensor([[31, 7, 2, 60, 12]])]
    expected = [torch.tensor(list(tokens(plain, prompt, 8))) for prompt in prompts]

    def interleaved() -> list[torch.Tensor]:
        pairs = list(zip(*(tokens(model, prompt, 8) for prompt in prompts), strict=True))
        return list(torch.tensor(pairs).T)

    faults.survived(interleaved, expected)
    results = in_threads(*(lambda prompt=prompt: torch.tensor(list(tokens(model, prompt, 8))) for prompt in prompts))
    faults.survived(lambda: results, expected)


def test_an_abandoned_generator_leaves_nothing_locked(faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    started = tokens(model, torch.tensor([[5, 9, 20]]), 8)
    next(started)
    started.close()
    at_rest(model)
    faults.survived(lambda: probe(model), expected)


def test_unwrap_waits_for_a_running_forward(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    inside, go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        assert go.wait(20)

    hook = model.blocks[1].register_forward_hook(stop)
    results: list[Any] = []
    forward = threading.Thread(target=lambda: results.append(probe(model)))
    undo = threading.Thread(target=lambda: tw.unwrap(model))
    forward.start()
    assert inside.wait(20)
    undo.start()
    assert not eventually_ended(undo), "unwrap did not wait"
    go.set()
    forward.join(20)
    undo.join(20)
    hook.remove()
    faults.survived(lambda: results, [expected])
    faults.survived(lambda: probe(model), expected)
    assert not tw.wrappers_of(model)


def eventually_ended(thread: threading.Thread) -> bool:
    """Whether the thread ends within a moment."""
    thread.join(0.1)
    return not thread.is_alive()


def test_unwrap_and_forward_in_a_race(faults: Faults) -> None:
    expected = twin_of(tower)
    for _ in range(5):
        model = lean(tower())
        results = in_threads(lambda model=model: [probe(model) for _ in range(3)], lambda model=model: [probe(tw.unwrap(model))])
        faults.survived(lambda results=results: results, [[expected] * 3, [expected]])


def test_wrapping_while_another_thread_computes(faults: Faults) -> None:
    expected, model = twin_of(tower), tower()
    results = in_threads(lambda: [probe(lean(model))], lambda: [probe(tw.unwrap(model)) for _ in range(1)])
    for result in results:
        faults.judged(lambda result=result: result, [expected])
    tw.unwrap(model)
    assert same(probe(model), expected)


def test_trim_during_a_forward(faults: Faults) -> None:
    expected, model = twin_of(tower), lean(tower())
    handle = tw.handle_of(model, "offload")
    errors: list[BaseException] = []

    def trim(*_: Any) -> None:
        try:
            handle.trim()
        except tw.TorchwrapError as error:
            errors.append(error)

    hook = model.blocks[1].register_forward_pre_hook(trim)
    faults.survived(lambda: probe(model), expected)
    hook.remove()
    right_again(model, expected)


def test_slots_are_not_lost_when_reads_ahead_fail(faults: Faults) -> None:
    """Every read ahead fails at once, at the moment it is submitted."""
    expected, model = twin_of(tower), lean(tower())
    assert same(probe(model), expected)
    file = tw.handle_of(model, "offload").store.file
    real, calls = file.check_unchanged, iter(range(1 << 30))

    def check() -> None:
        if next(calls) % 2:
            raise tw.StorageError("the network mount went away")
        real()

    settle(model)
    file.check_unchanged = check
    for _ in range(6):
        faults.judged(lambda: probe(model), expected, tw.StorageError)
        at_rest(model)
    del file.check_unchanged
    right_again(model, expected)


def test_a_disk_that_fails_for_one_pass_only(faults: Faults) -> None:
    expected, model = twin_of(llama), lean(llama())
    broken = threading.Event()

    def read(number: int, real: Any, fd: int, target: memoryview, offset: int) -> int:
        if broken.is_set():
            raise OSError(5, "Input/output error")
        return real(fd, target, offset)

    with under(model, Disk(read)):
        assert same(probe(model), expected)
        broken.set()
        for _ in range(3):
            faults.judged(lambda: probe(model), expected, tw.StorageError)
            at_rest(model)
        settle(model)
        broken.clear()
        faults.survived(lambda: probe(model), expected)
    right_again(model, expected)
