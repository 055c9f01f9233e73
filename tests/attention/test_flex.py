"""FlexAttention as a back end. Its definition, which stores all scores, is held to the law of errors; compiled it runs once."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from tests.attention.cases import MASKS, assert_correct, make
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.torch_kernels import flex
from torchwrap.attention.torch_kernels.flex import Flex
from torchwrap.core import errors


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> Flex:
    """Torch's definition, without tracing."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return Flex(compiled=False)


def call(**options: Any) -> Call:
    options = {"mask": TileMask.causal(1, 20, 20), "wants_lse": False} | options
    return checked(torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16), **options)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_sinks_and_caps_are_those_of_the_definition(definition: Flex, mask: str) -> None:
    for extra, heads in (("plain", (8, 2)), ("sinks", (4, 4)), ("softcap", (9, 3))):
        one, what = make(5, mask=mask, extra=extra, heads=heads, q_length=17, past=11, width=16)
        assert definition.refuses(one) is None
        assert_correct(definition, one, what)


@pytest.mark.parametrize("shape", [(2, 1, 1, 20), (1, 4, 20, 20), (2, 4, 1, 20)])
def test_a_bias_is_added_after_the_cap(definition: Flex, shape: tuple[int, ...]) -> None:
    assert_correct(definition, call(bias=torch.randn(shape), softcap=3.0, wants_lse=True), str(shape))


def test_rows_without_a_key_are_dead(definition: Flex) -> None:
    out, lse = definition.forward(call(mask=TileMask.padded([0, 20], 20, 20), wants_lse=True))
    assert not out[0].any() and bool((lse[0] == -math.inf).all()) and bool(lse[1].isfinite().all())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dropout": 0.1}, "dropout=0.1"), ({"wants_lse": True}, "no lse"), ({"sinks": torch.zeros(4)}, "sinks"),
        ({"bias": torch.zeros(20, 20, requires_grad=True)}, "gradient"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_here_is_refused_with_the_reason(options: dict[str, Any], says: str) -> None:
    assert says in str(Flex().refuses(call(**options)))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiler", lambda: False)
    assert "no C++ compiler" in str(Flex().refuses(call()))


def test_by_name_with_gradients_the_error_says_who_can() -> None:
    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    with pytest.raises(errors.UnsupportedModelError, match="no gradients") as raised:
        attend(x, x, x, backend="flex")
    assert "backend='cpu'" in str(raised.value.fix)


def test_a_failed_compilation_is_a_kernel_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("no lowering")

    monkeypatch.setattr(flex, "_function", lambda compiled: fails)
    with pytest.raises(errors.KernelError, match="no lowering"):
        Flex().forward(call())


@pytest.mark.slow
def test_compiled_it_is_the_same_and_other_windows_need_no_compilation() -> None:
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", errors.TorchwrapWarning)
        for window in (5, 9, 150):
            q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
            mask = TileMask.window(2, 200, 200, window, kv_start=torch.tensor([0, 30], dtype=torch.int32))
            found = attend(q, k, v, mask=mask, softcap=4.0, scale=0.3, backend="flex")
            torch.testing.assert_close(found, attend(q, k, v, mask=mask, softcap=4.0, scale=0.3, backend="eager"), rtol=1e-5, atol=1e-5)
            if window == 5:
                first = compilations["unique_graphs"]
    assert compilations["unique_graphs"] == first


def test_the_definition_needs_the_memory_of_all_scores() -> None:
    one = replace(call(), wants_lse=True)
    assert (Flex().memory(one), Flex(compiled=False).memory(one)) == (0, 2 * 4 * 20 * 20 * 4)
