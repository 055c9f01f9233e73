"""Which back end is chosen by what was measured: rules, and that a call is measured once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention.tuning_cases import Timed, call, new_process
from torchwrap.attention import dispatch, tune
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import prefill
from torchwrap.attention.cpu.decode import without_memory
from torchwrap.attention.dispatch import backend, choose, order
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import Eager
from torchwrap.attention.service import Service
from torchwrap.attention.settings import Settings
from torchwrap.attention.tune import Shape
from torchwrap.attention.tuning import clock, store, table
from torchwrap.attention.tuning.kinds import kind_of
from torchwrap.core.errors import ConfigError, UnsupportedModelError

# Which is first


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({"cpu": 1.0, "sdpa": 2.0}, ("cpu", "sdpa")), ({"cpu": 2.0, "sdpa": 1.0}, ("sdpa", "cpu")),
        ({"cpu": 0.98, "sdpa": 1.0}, ("sdpa", "cpu")), ({"cpu": 0.96, "sdpa": 1.0}, ("cpu", "sdpa")),
        ({"triton": 0.98, "sdpa-flash": 1.0, "sdpa-cudnn": 1.1}, ("sdpa-flash", "triton", "sdpa-cudnn")),
        ({"triton": 1.0, "cuda_mma": 0.9}, ("cuda_mma", "triton")), ({}, ()),
    ],
)  # fmt: skip
def test_ours_displaces_torchs_when_it_is_faster_by_three_percent(seconds: Timed, order: tuple[str, ...]) -> None:
    assert store.ranked(seconds) == order


def test_the_fastest_computes_calls_of_its_kind_and_no_others(measure: Settings, clocks: Any) -> None:
    asked = clocks({"cpu": 2e-3, "sdpa": 1e-3})
    one = call()
    attend(one.q, one.k, one.v, backend=measure)
    assert asked == [("cpu", "sdpa")]
    choice = choose(one, measure)
    assert choice.backend.name == "sdpa" and "measured here: 1 ms, cpu 2 ms" in choice.reason
    assert choose(call(keys=33), measure).backend.name == "sdpa", "of the same power of two"
    assert choose(call(keys=80), measure).backend.name == "cpu", "not measured"
    assert order(one, Settings(tune="off", tune_dir=measure.tune_dir))[0] == "cpu"
    assert order(one, Settings(tune_dir=measure.tune_dir)) == ("sdpa", "cpu", "eager")


def test_a_kind_is_measured_once_also_by_many_threads(measure: Settings, clocks: Any) -> None:
    asked, one = clocks({"cpu": 2e-3, "sdpa": 1e-3}), call()
    threads = [threading.Thread(target=lambda: attend(one.q, one.k, one.v, backend=measure)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    attend(one.q, one.k, one.v, mask=TileMask.causal(1, 6, 40), backend=measure)
    assert len(asked) == 2


def test_backward_is_measured_and_chosen_by_itself(measure: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([{"cpu": 1e-3, "sdpa": 2e-3}, {"cpu": 2e-3, "sdpa": 1e-3}])
    monkeypatch.setattr(dispatch, "median_seconds", lambda runs, device: (next(times), {}))
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    attend(x, x, x, backend=measure).sum().backward()
    one = checked(x, x, x)
    assert (choose(one, measure).backend.name, choose(one, measure, "backward").backend.name) == ("cpu", "sdpa")


def test_one_back_end_alone_is_not_timed(measure: Settings, clocks: Any) -> None:
    asked, one = clocks({}), call(softcap=2.0)
    for _ in range(2):
        torch.testing.assert_close(attend(one.q, one.k, one.v, softcap=2.0, backend=measure), attend(one.q, one.k, one.v, softcap=2.0))
    assert not asked and "first that can" in choose(one, measure).reason
    assert measure.tune_dir is not None and not Path(measure.tune_dir).exists()


def test_who_would_store_a_large_mask_is_neither_measured_nor_first(
    measure: Settings, clocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, one = clocks({"cpu": 2e-3, "sdpa": 1e-3}), call(mask=TileMask.window(1, 6, 40, 5))
    attend(one.q, one.k, one.v, mask=one.mask, backend=measure)
    assert order(one, measure)[0] == "sdpa"
    monkeypatch.setattr(dispatch, "MASK_BYTES", 100)
    assert order(one, measure) == ("cpu", "sdpa", "eager")
    attend(one.q[:, :, :3], one.k, one.v, mask=TileMask.window(1, 3, 40, 5), backend=measure)
    assert len(asked) == 1


class Loose(Eager):
    """A back end whose gradients add up in any order."""

    name = "cpu"
    deterministic = False


def test_deterministic_leaves_such_a_back_end_out_of_backward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "backend", lambda name: Loose() if name == "cpu" else backend(name))
    strict = Settings(deterministic=True)
    assert choose(call(), strict).backend.name == "cpu" == choose(call(), "auto", "backward").backend.name
    choice = choose(call(), strict, "backward")
    assert choice.backend.name == "sdpa" and "deterministic=True" in choice.reason
    with pytest.raises(UnsupportedModelError, match="deterministic=True") as raised:
        choose(call(), Settings(backend="cpu", deterministic=True), "backward")
    assert "backend='sdpa'" in str(raised.value.fix)


# Measuring


def test_real_figures_are_taken_and_results_stay_the_same(measure: Settings) -> None:
    one = call()
    before = torch.get_rng_state()
    found = attend(one.q, one.k, one.v, backend=measure)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, attend(one.q, one.k, one.v))
    seconds = store.measurements(one.q.device, measure.tune_dir).seconds()[kind_of(one, "forward")]
    assert seconds.keys() == {"cpu", "sdpa"} and min(seconds.values()) > 0


def test_who_fails_has_no_figure_and_who_is_slow_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counts = [0.0], {"fast": 0, "near": 0, "slow": 0}
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            counts[name] += 1
            now[0] += seconds * (50 if counts[name] == 1 else 1)  # the first call compiles

        return work

    def broken() -> None:
        raise RuntimeError("no memory")

    def faulty() -> None:
        raise KeyError("of somebody else's")

    runs = {"slow": run("slow", 0.5), "broken": broken, "faulty": faulty, "fast": run("fast", 0.01), "near": run("near", 0.02)}
    seconds, failed = clock.median_seconds(runs, torch.device("cpu"))
    assert seconds == pytest.approx({"fast": 0.01, "near": 0.02, "slow": 0.5})
    assert (
        "no memory" in failed["broken"]
        and failed["faulty"].startswith("KeyError")
        and counts == {"slow": 2, "fast": 2 + clock.ROUNDS, "near": 2 + clock.ROUNDS}
    )


def test_a_measurement_of_calls_that_take_long_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counts = [0.0], {"long": 0, "longer": 0, "endless": 0}
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def run(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            counts[name] += 1
            now[0] += seconds

        return work

    each = {"endless": 100.0, "longer": 45.0, "long": 40.0}
    seconds, failed = clock.median_seconds({name: run(name, s) for name, s in each.items()}, torch.device("cpu"))
    assert seconds == pytest.approx(each) and not failed
    assert counts == {"endless": 1, "longer": 3, "long": 3}


@pytest.mark.parametrize("masked", [{}, {"causal": False}, {"window": 64}], ids=["causal", "all", "window"])
def test_a_shape_that_would_take_hours_is_refused_before(masked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LIMIT_S", 1e-6)
    monkeypatch.setattr(tune, "_PROBED", 1 << 12)
    long = Shape(heads=2, kv_heads=1, width=8, q_length=512, kv_length=512, **masked)
    with pytest.raises(ConfigError, match=r"one call of q \[1, 2, 512, 8\].* s here"):
        tune.tune([long], tune_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert tune.tune([long], tune_dir=str(tmp_path))[0].order


def test_memory_is_what_the_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "memory_available", lambda: 1 << 20)
    with pytest.raises(ConfigError, match="1 MiB are free"):
        tune.tune([Shape(heads=4, kv_heads=2, width=64, q_length=512, kv_length=512)], tune_dir=str(tmp_path))


def test_compiled_graphs_and_records_go_by_the_figures(measure: Settings, clocks: Any) -> None:
    clocks({"cpu": 2e-3, "sdpa": 1e-3})
    service, one = Service(measure), call()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, backend=measure), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(one.q, one.k, one.v), attend(one.q, one.k, one.v))
    service.attend("a", one.q, one.k, one.v)
    assert next(iter(service.stats()["served"])).startswith("a sdpa ") and "measured here" in service.explain()


def test_tensors_without_numbers_are_not_timed(measure: Settings, clocks: Any) -> None:
    asked = clocks({"cpu": 2e-3, "sdpa": 1e-3})
    with FakeTensorMode():
        x, half = (torch.empty(1, 2, 8, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        assert attend(x, x, x, backend=measure).shape == attend(x[:, :, :1], x, x).shape[:2] + x.shape[2:]
        # Native code must not be given their addresses, which are 0.
        assert "mode" in str(without_memory(checked(x, x, x)))
        assert prefill.refuses(checked(half, half, half)) is not None
    assert "FakeTensor" in str(without_memory(checked(x, x, x)))
    assert prefill.refuses(checked(half, half, half)) is not None
    assert not asked


# Kinds and the shipped order


def test_kinds_are_told_apart_by_what_changes_the_order() -> None:
    kinds = {
        kind_of(one, "forward")
        for one in (
            call(), call(mask=TileMask.causal(1, 6, 40)), call(mask=TileMask.window(1, 6, 40, 4)), call(mask=TileMask.window(1, 6, 40, 30)),
            call(mask=TileMask.padded([20], 6, 40)), call(softcap=1.0), call(sinks=torch.zeros(4)), call(dropout=0.1), call(rows=1),
            call(bias=torch.zeros(6, 40)), call(bias=torch.zeros(6, 40, requires_grad=True)), call(keys=70),
        )
    }  # fmt: skip
    assert len(kinds) == 12
    assert kind_of(call(), "forward") != kind_of(call(), "backward")
    assert kind_of(call(keys=33), "forward") == kind_of(call(keys=64), "forward") != kind_of(call(keys=65), "forward")


@pytest.mark.parametrize(
    ("capability", "dense", "masked", "decode"),
    [
        ((9, 0), "sdpa-cudnn", "triton", "triton"), ((12, 0), "sdpa-flash", "triton", "triton"),
        ((8, 6), "sdpa-flash", "triton", "triton"), ((7, 5), *["sdpa-efficient"] * 3),
        ((7, 0), *["sdpa-efficient"] * 3), ((6, 1), *["sdpa-efficient"] * 3),
    ],
)  # fmt: skip
def test_the_shipped_order_of_cards(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dense: str, masked: str, decode: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    table._row.cache_clear()
    with FakeTensorMode():
        x, one = (torch.empty(1, 2, rows, 64, device="cuda", dtype=torch.float16) for rows in (64, 1))
    window = TileMask.window(1, 64, 64, 9)
    calls = Call(q=x, k=x, v=x, scale=1.0), Call(q=x, k=x, v=x, mask=window, scale=1.0), Call(q=one, k=x, v=x, scale=1.0)
    found = [table.first_choices(given) for given in calls]
    table._row.cache_clear()
    assert [names[0] for names in found] == [dense, masked, decode]
    assert all(names[-1] == "eager" and ("cuda_mma" not in names[:1]) for names in found)


# Ahead


def test_tuning_ahead_is_what_later_calls_go_by(measure: Settings, clocks: Any) -> None:
    clocks({"cpu": 2e-3, "sdpa": 1e-3})
    shape = Shape(heads=4, kv_heads=2, width=8, q_length=6, kv_length=40, causal=False)
    found = tune.tune([shape], train=True, tune_dir=measure.tune_dir)
    assert [one.order for one in found] == [("sdpa", "cpu")] * 2 and "forward" in str(found[0]) and "sdpa 1 ms, cpu 2 ms" in str(found[1])
    new_process()
    assert choose(call(), Settings(tune_dir=measure.tune_dir)).backend.name == "sdpa"


def test_named_back_ends_are_compared_again(measure: Settings, clocks: Any) -> None:
    asked = clocks({"cpu": 2e-3, "sdpa": 1e-3, "eager": 5e-4})
    shape = Shape(heads=4, kv_heads=2, width=8, q_length=6, kv_length=40)
    for backends in (None, None, ("cpu", "eager")):
        tune.tune([shape], backends=backends, tune_dir=measure.tune_dir)
    assert asked == [("cpu", "sdpa"), ("cpu", "eager")]
    found = tune.tune([shape], tune_dir=measure.tune_dir)
    assert found[0].order == ("eager", "sdpa", "cpu"), "figures of others stay"
    assert tune.tune([shape], backends=("cuda_mma",), tune_dir=measure.tune_dir)[0].order == found[0].order, "nobody to compare with"


@pytest.mark.parametrize(
    ("shape", "backends", "says"),
    [
        ({"q_length": 0}, None, "below 1"), ({"kv_length": 1 << 40}, None, "MiB are free"), ({}, ("fastest",), "'fastest' is unknown"),
        ({"heads": 3}, None, "cannot share"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path: Path, shape: dict[str, int], backends: Any, says: str) -> None:
    given = {"heads": 4, "kv_heads": 2, "width": 8, "q_length": 6, "kv_length": 40} | shape
    with pytest.raises(ConfigError, match=says):
        tune.tune([Shape(**given)], backends=backends, tune_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_no_name_is_not_the_current_folder() -> None:
    with pytest.raises(ConfigError, match="tune_dir=''"):
        Settings(tune="measure", tune_dir="")
