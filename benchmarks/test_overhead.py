"""What one layer costs per call, beside accelerate's one hook: `pytest benchmarks/test_overhead.py -s --benchmark-disable-gc`.

The module is the identity, so everything measured is the mechanism. Contenders are timed in rotating order within each round of one
process, because a busy machine is slow for all of them in the same moment. Of the rounds the lower quartile counts: other programs only
ever add time. Figures and ratio are printed and stored in `extra_info`. Outputs are compared before. Times are never asserted here:
`targets.toml` holds the bars.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchwrap.core.layer import Layer
from torchwrap.core.swap import attach

CALLS, ROUNDS = 500, 400


class Identity(nn.Module):
    """Returns its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Nothing(Layer):
    """Has both methods, as a real layer does, and does nothing in them."""

    def __init__(self, where: Any = "inside", traceable: bool = True) -> None:
        self.where, self.traceable = where, traceable

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return output


def _with(*layers: Layer) -> nn.Module:
    module = Identity()
    for layer in layers:
        attach(module, layer)
    return module


def _accelerate() -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    module: nn.Module = hooks.add_hook_to_module(Identity(), hooks.ModelHook())
    return module


def _torch_hooks() -> nn.Module:
    module = Identity()
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    module.register_forward_hook(lambda module, args, kwargs, output: output, with_kwargs=True)
    return module


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "bare": Identity,
    "one layer": lambda: _with(Nothing()),
    "accelerate, one hook": _accelerate,
    "one layer, outside": lambda: _with(Nothing("outside")),
    "one layer, not traceable": lambda: _with(Nothing(traceable=False)),
    "two layers": lambda: _with(Nothing(), Nothing()),
    "torch hooks": _torch_hooks,
}


def _seconds(module: nn.Module, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - begin) / CALLS


def test_overhead_of_one_layer(benchmark: Any) -> None:
    torch.set_num_threads(1)
    x = torch.ones(1)
    modules = {name: make() for name, make in CONTENDERS.items()}
    for name, module in modules.items():
        assert torch.equal(module(x), x), name
        _seconds(module, x)
    times: dict[str, list[float]] = {name: [] for name in modules}
    names = list(modules)

    def others() -> None:
        turn = len(times["bare"]) % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_seconds(modules[name], x))

    benchmark.group = "overhead[identity]"
    benchmark.pedantic(lambda: _seconds(modules["one layer"], x), setup=others, rounds=ROUNDS, iterations=1)
    quartile = {name: statistics.quantiles(values, n=4)[0] * 1e6 for name, values in times.items()}
    bare = quartile["bare"]
    added = {name: value - bare for name, value in quartile.items()}
    ratio = added["one layer"] / added["accelerate, one hook"]
    benchmark.extra_info |= {
        "bare_us": bare,
        "added_us": added,
        "one_layer_over_accelerate": ratio,
        "torch": torch.__version__,
    }
    print(f"\nbare call {bare:.2f} us; added per call, lower quartile of {ROUNDS} rounds of {CALLS} calls:")
    for name in names[1:]:
        print(f"  {name:26s} {added[name]:+.2f} us")
    print(f"one layer / accelerate's one hook: {ratio:.2f}")
