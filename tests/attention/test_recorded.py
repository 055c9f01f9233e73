"""`attend` in graphs that tracers record: the operator is in them, never the numbers of the call that was recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import torchwrap as tw
from torchwrap.attention.attend import attend
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core.errors import UnsupportedModelError

Call = Callable[[Tensor], Tensor]
LENGTHS = pytest.mark.parametrize("length", [1, 8, 200])  # by another kernel each


def two(length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, length, 32), torch.randn(1, 4, length, 32)


@LENGTHS
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_call_and_not_its_result(length: int, mode: str) -> None:
    first, second = two(length)

    def call(x: Tensor) -> Tensor:
        return attend(x, x, x, mask=TileMask.causal(1, length, length))

    torch.testing.assert_close(make_fx(call, tracing_mode=mode)(first)(second), call(second), atol=1e-5, rtol=1e-5)


@LENGTHS
@pytest.mark.parametrize("masked", [False, True])
def test_a_jit_trace_records_the_call_and_not_its_result(length: int, masked: bool) -> None:
    first, second = two(length)
    mask = torch.ones(length, length).tril().bool() if masked else None

    def call(x: Tensor) -> Tensor:
        return attend(x, x, x, mask=mask)

    torch.testing.assert_close(torch.jit.trace(call, (first,))(second), call(second), atol=1e-5, rtol=1e-5)


def test_a_rule_in_a_jit_trace_is_refused_by_name() -> None:
    mask = TileMask.causal(1, 8, 8)
    with pytest.raises(UnsupportedModelError, match="cannot record a TileMask"):
        torch.jit.trace(lambda x: attend(x, x, x, mask=mask), (two(8)[0],))


def test_a_jit_trace_of_a_wrapped_module_records_the_call() -> None:
    module = tw.fast_attention(torch.nn.Sequential(torch.nn.MultiheadAttention(32, 4, batch_first=True)).eval().requires_grad_(False))[0]
    first, second = torch.randn(1, 40, 32), torch.randn(1, 40, 32)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(x, x, x, need_weights=False)[0]
        return found

    call(first)  # prepared now
    torch.testing.assert_close(torch.jit.trace(call, (first,))(second), call(second), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_dense_mask_is_recorded_and_not_its_numbers(mode: str) -> None:
    first, second = two(8)

    def call(x: Tensor) -> Tensor:
        return attend(x, x, x, mask=(x @ x.mT).tril() > 0)  # for this length anything from a key to the row's own

    torch.testing.assert_close(make_fx(call, tracing_mode=mode)(first)(second), call(second), atol=1e-5, rtol=1e-5)


def test_a_dense_mask_may_be_exported() -> None:
    first, second = two(200)
    mask = torch.rand(200, 200) < 0.5

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return attend(x, x, x, mask=mask)

    torch.testing.assert_close(torch.export.export(Module(), (first,)).module()(second), Module()(second), atol=1e-5, rtol=1e-5)


TRANSFORMS: dict[str, Callable[[Call], Call]] = {
    "grad": lambda call: torch.func.grad(lambda x: call(x).square().sum()),
    "vmap": lambda call: torch.func.vmap(call),
    "vmap of grad": lambda call: torch.func.vmap(torch.func.grad(lambda x: call(x).square().sum())),
    "grad of vmap": lambda call: torch.func.grad(lambda x: torch.func.vmap(call)(x).square().sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_make_fx_records_a_call_under_a_transform(name: str, masked: bool) -> None:
    first, second = (torch.randn(*(() if name == "grad" else (2,)), 1, 2, 8, 16) for _ in range(2))
    mask = torch.ones(8, 8).tril().bool() if masked else None
    transform = TRANSFORMS[name](lambda x: attend(x, x, x, mask=mask))
    torch.testing.assert_close(make_fx(transform)(first)(second), transform(second), atol=1e-5, rtol=1e-5)


def test_make_fx_of_second_derivatives_refuses_by_name() -> None:
    def first(x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: attend(x, x, x).square().sum())(x).sum()
        return found

    with pytest.raises(UnsupportedModelError, match="derivatives of derivatives"):
        make_fx(torch.func.grad(first))(two(8)[0])
