"""Eight threads on one wrapped model, undo during a call, and a process forked from a wrapped one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_technique, models_named
from tests.contract.compare import equal, model_difference, output_difference
from tests.contract.neutral import Outer, note_layers, notes
from tests.models import ModelFixture, run

some_models = models_named("llama-tied", "mixtral", "albert", "t5", "bert", "convnet", "mlp")


@every_technique
@some_models
def test_eight_threads_get_the_results_of_serial_calls(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    jobs = [_job(fixture, number) for number in range(32)]
    expected = [run(twin, job) for job in jobs]
    started = threading.Barrier(8)

    def worker(first: int) -> list[Any]:
        started.wait(timeout=60)
        return [run(model, jobs[index]) for index in range(first, len(jobs), 8)]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(worker, range(8)))
    for first, part in enumerate(parts):
        for step, output in enumerate(part):
            equal(output, expected[first + 8 * step])
    tw.unwrap(model)
    assert model_difference(model, twin) is None


def _job(fixture: ModelFixture, number: int) -> dict[str, Any]:
    """Inputs of different length and content, so that a result handed to the wrong thread is seen."""
    inputs = {}
    for name, value in fixture.inputs().items():
        length = 1 + number % value.shape[0]
        rolled = value.roll(number, dims=-1) if value.is_floating_point() or name.endswith("input_ids") else value
        inputs[name] = rolled[:length]
    return inputs


@every_technique
@models_named("albert", "mlp")
def test_an_exception_in_one_thread_leaves_the_others_alone(case: Case, fixture: ModelFixture) -> None:
    model, twin = tw.apply(case.apply(fixture.build()), Outer()), fixture.build()
    expected = run(twin, fixture.inputs())
    broken = {name: value.new_zeros((1, 1, 1, 1, 3)) for name, value in fixture.inputs().items()}

    def worker(number: int) -> str | None:
        for _ in range(6):
            if number % 2:
                with pytest.raises(Exception):  # noqa: B017 - each model complains in its own way
                    run(model, broken)
            else:
                found = output_difference(run(model, fixture.inputs()), expected)
                if found:
                    return found
        return None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(worker, range(8))) == [None] * 8
    for layer in note_layers(model, "test_outer"):
        assert layer.journal.count("before") == layer.journal.count("after") + layer.journal.count("failed")


@every_technique
@models_named("llama", "convnet")
def test_disabled_holds_for_its_thread_only(case: Case, fixture: ModelFixture) -> None:
    model = tw.apply(case.apply(fixture.build()), Outer())
    with tw.disabled(model, "test_outer"):
        run(model, fixture.inputs())
        assert notes(model, "test_outer") == []
        other = threading.Thread(target=run, args=(model, fixture.inputs()))
        other.start()
        other.join(timeout=60)
    assert notes(model, "test_outer") != []


@every_technique
@models_named("llama", "convnet", "mlp")
def test_unwrap_during_a_running_forward_gives_right_results(case: Case, fixture: ModelFixture) -> None:
    model, twin = case.apply(fixture.build()), fixture.build()
    expected = run(twin, fixture.inputs())
    inside, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause(module: nn.Module, args: Any) -> None:
        inside.set()
        assert go_on.wait(timeout=60)

    handle = model.get_submodule(fixture.block).register_forward_pre_hook(pause)
    caller = threading.Thread(target=lambda: results.append(run(model, fixture.inputs())))
    caller.start()
    assert inside.wait(timeout=60)
    undo = threading.Thread(target=tw.unwrap, args=(model,))
    undo.start()
    go_on.set()
    caller.join(timeout=60)
    undo.join(timeout=60)
    assert not caller.is_alive() and not undo.is_alive()
    handle.remove()
    equal(results, [expected])
    equal(run(model, fixture.inputs()), expected)
    assert model_difference(model, twin) is None


@every_technique
@models_named("llama", "mlp")
def test_undo_while_others_go_on_calling(case: Case, fixture: ModelFixture) -> None:
    model, twin = fixture.build(), fixture.build()
    expected, config = run(twin, fixture.inputs()), case.config(model)

    def caller(started: threading.Barrier) -> list[str | None]:
        started.wait(timeout=60)
        return [output_difference(run(model, fixture.inputs()), expected) for _ in range(6)]

    with ThreadPoolExecutor(3) as pool:
        for _ in range(12):
            tw.apply(model, config)  # with nobody calling: only a wrapped model has a lock that a call could hold
            started = threading.Barrier(4)
            results = [pool.submit(caller, started) for _ in range(3)]
            started.wait(timeout=60)
            run(model, fixture.inputs())
            tw.unwrap(model)
            assert [result.result(timeout=60) for result in results] == [[None] * 6] * 3
    assert model_difference(model, twin) is None


@every_technique
@models_named("llama", "mlp")
def test_a_forked_process_computes_the_same(case: Case, fixture: ModelFixture) -> None:
    import multiprocessing

    model, twin = case.apply(fixture.build()), fixture.build()
    expected = run(twin, fixture.inputs())
    equal(run(model, fixture.inputs()), expected)
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        try:
            there.send(output_difference(run(model, fixture.inputs()), expected))
        except BaseException as error:
            there.send(repr(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert here.poll(60), "the forked process hangs"
    assert here.recv() is None
    process.join(timeout=60)
    assert process.exitcode == 0
    equal(run(model, fixture.inputs()), expected)
