"""Calls that do not fit together are refused before any work, with the shapes in the message."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 6)}
    given.update(changed)
    return checked(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"q": torch.zeros(2, 3, 3, 8)}, r"3 query heads cannot share 2 key heads.*\[2, 3, 3, 8\]", id="heads"),
        pytest.param({"q": torch.zeros(2, 4, 3, 7)}, r"different widths.*\[2, 4, 3, 7\].*\[2, 2, 5, 8\]", id="width"),
        pytest.param({"q": torch.zeros(4, 3, 8)}, r"four dimensions.*\[4, 3, 8\]", id="dimensions"),
        pytest.param({"q": torch.zeros(1, 4, 3, 8)}, r"batch sizes.*\[1, 4, 3, 8\]", id="batch"),
        pytest.param({"v": torch.zeros(2, 2, 4, 8)}, r"k and v have different.*\[2, 2, 4, 8\]", id="lengths"),
        pytest.param({"k": torch.zeros(2, 2, 5, 8, dtype=torch.bfloat16)}, "one floating dtype.*bfloat16", id="dtypes"),
        pytest.param({name: torch.zeros(2, 2, 3, 8, dtype=torch.int32) for name in "qkv"}, "one floating dtype.*int32", id="integers"),
        pytest.param({"softcap": 0.0}, "softcap is 0.0", id="softcap"),
        pytest.param({"softcap": math.nan}, "softcap is nan", id="softcap nan"),
        pytest.param({"softcap": 1e-60}, "softcap is 1e-60", id="softcap that is 0 in float32"),
        pytest.param({"softcap": 1e60}, r"softcap is 1e\+60", id="softcap that is infinite in float32"),
        pytest.param({"scale": -1e60}, r"scale is -1e\+60", id="scale that is infinite in float32"),
        pytest.param({"softcap": "a"}, "softcap is a str", id="softcap that is no number"),
        pytest.param({"q": [[1.0]]}, "q is a list", id="no tensor"),
        pytest.param({"v": None}, "v is a NoneType", id="nothing"),
        pytest.param({"q": torch.zeros(2, 4, 3, 8).to_sparse()}, "q is a sparse or nested", id="sparse"),
        pytest.param(
            {"k": torch.nested.nested_tensor([torch.zeros(2, 5, 8)] * 2, layout=torch.jagged)}, "k is a sparse or nested", id="nested"
        ),
        pytest.param({"mask": [[True]]}, "the mask is a list", id="mask that is no tensor"),
        pytest.param({name: torch.zeros(2, 2, 3, 8).to(torch.float8_e4m3fn) for name in "qkv"}, "16 bits.*float8", id="float8"),
        pytest.param({"mask": torch.ones(3, 5).to_sparse()}, "the mask is a sparse", id="sparse mask"),
        pytest.param({"bias": torch.ones(3, 5).to_sparse()}, "bias is a sparse", id="sparse bias"),
        pytest.param({"bias": [1.0]}, "bias is a list", id="bias that is no tensor"),
        pytest.param({"sinks": [1.0] * 4}, "sinks is a list", id="sinks that are no tensor"),
        pytest.param({"scale": 1j}, "scale is 1j", id="imaginary scale"),
        pytest.param({"scale": torch.tensor(1j)}, "scale is 1j", id="imaginary scale in a tensor"),
        pytest.param({"softcap": np.complex64(2 + 1j)}, r"softcap is \(2\+1j\)", id="imaginary softcap of numpy"),
        pytest.param({"scale": True}, "scale is a bool", id="scale that is a claim"),
        pytest.param({"dropout": "0.1"}, "dropout is a str", id="dropout in quotes"),
        pytest.param({"dropout": None}, "dropout is a NoneType", id="no dropout"),
        pytest.param({"scale": np.ones(2)}, "scale is a ndarray", id="several scales of numpy"),
        pytest.param({"softcap": 10**400}, "softcap is a int", id="softcap beyond floating numbers"),
        pytest.param({"scale": torch.ones((), device="meta")}, r"scale is \[\] float32 on meta", id="scale without a number"),
        pytest.param({"scale": torch.ones(2)}, r"scale is \[2\]", id="scale that is several"),
        pytest.param({"scale": torch.ones((), requires_grad=True)}, "scale asks for a gradient", id="learned scale"),
        pytest.param({"scale": math.inf}, "scale is inf", id="scale"),
        pytest.param({"dropout": 1.0}, "dropout is 1.0", id="dropout"),
        pytest.param({"sinks": torch.zeros(2)}, r"sinks are \[2\].*4 heads", id="sinks"),
        pytest.param({"bias": torch.zeros(4, 5, 3)}, r"bias is \[4, 5, 3\].*\(2, 4, 3, 5\)", id="bias"),
        pytest.param({"bias": torch.zeros(3, 5, dtype=torch.int64)}, "bias is .*int64", id="bias dtype"),
        pytest.param({"mask": torch.zeros(5, 3, dtype=torch.bool)}, r"mask is \[5, 3\]", id="mask"),
        pytest.param({"mask": torch.zeros(3, 5, dtype=torch.int64)}, r"mask is .*int64.*mask\.bool\(\)", id="mask dtype"),
        pytest.param({"mask": torch.zeros(2, 5, dtype=torch.bool)}, r"mask is \[2, 5\].*mask\[:, None, None\]", id="mask of a tokenizer"),
        pytest.param({"k": torch.zeros(2, 2, 5, 8, device="meta"), "v": torch.zeros(2, 2, 5, 6, device="meta")}, "k on meta", id="device"),
        pytest.param({"mask": TileMask.causal(2, 3, 5, device="meta")}, "the mask on meta", id="device of a mask that is a rule"),
        pytest.param({"mask": torch.zeros(3, 5, dtype=torch.bool, device="meta")}, "the mask on meta", id="device of the mask"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said) as raised:
        call(**changed)
    assert isinstance(raised.value, ValueError) and raised.value.fix


def test_scale_defaults_to_the_root_of_the_width() -> None:
    assert call().scale == 8**-0.5 and call(scale=0.0).scale == 0.0


def test_numbers_of_numpy_and_of_tensors_are_those_of_python() -> None:
    found = call(scale=np.float32(0.5), softcap=torch.tensor([20]), dropout=Fraction(1, 4))
    numbers = (found.scale, found.softcap, found.dropout)
    assert numbers == (0.5, 20.0, 0.25) and {type(number) for number in numbers} == {float}


def test_numbers_that_a_graph_does_not_know_yet_are_numbers() -> None:
    def attended(q: Tensor, factor: float) -> Tensor:
        return attend(q, q, q, scale=q.shape[-1] ** -0.5, softcap=factor)

    torch.compiler.reset()
    compiled = torch.compile(attended, backend="eager", dynamic=True, fullgraph=True)
    for width, factor in ((8, 3), (12, 2.5), (16, 1.5)):
        q = torch.randn(1, 2, 3, width)
        assert torch.equal(compiled(q, factor), attended(q, factor))


def test_a_mapped_scale_is_refused_by_name() -> None:
    q = torch.zeros(3, 1, 2, 4, 8)
    with pytest.raises(errors.ConfigError, match="scale is"):
        torch.func.vmap(lambda one, scale: attend(one, one, one, scale=scale))(q, torch.ones(3))


def test_a_bias_of_few_dimensions_gets_four() -> None:
    assert call(bias=torch.zeros(3, 5)).bias.shape == (1, 1, 3, 5)


def test_a_float_mask_is_added() -> None:
    both = call(mask=torch.ones(3, 5), bias=torch.ones(4, 1, 5))
    assert both.mask is None and torch.equal(both.bias, torch.full((1, 4, 3, 5), 2.0))


def test_modes_and_sizes() -> None:
    assert [call(q=torch.zeros(2, 4, rows, 8)).mode for rows in (1, 3, 5)] == ["decode", "chunked", "prefill"]
    one = call()
    sizes = one.batch, one.heads, one.kv_heads, one.group, one.q_length, one.kv_length, one.width, one.value_width
    assert sizes == (2, 4, 2, 2, 3, 5, 8, 6)


@pytest.mark.parametrize("rows", [0, 3])
def test_an_empty_result_has_the_shape_of_a_result(rows: int) -> None:
    out, lse = call(q=torch.zeros(2, 4, rows, 8), sinks=torch.arange(4.0)).empty_result()
    assert out.shape == (2, 4, rows, 6) and torch.equal(lse, torch.arange(4.0)[:, None].expand(2, 4, rows))


def test_a_learned_scale_is_a_number_where_nothing_is_learned() -> None:
    with torch.no_grad():
        assert call(scale=torch.tensor(0.5, requires_grad=True)).scale == 0.5


def test_a_mask_without_numbers_is_passed_on_with_tensors_without_numbers() -> None:
    q = torch.zeros(2, 4, 3, 8, device="meta")
    assert attend(q, q, q, mask=torch.ones(3, 3, dtype=torch.bool, device="meta")).shape == q.shape


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "mask", [TileMask.causal(2, 3, 3), TileMask.padded([1, 3], 3, 3), TileMask.from_dense(torch.eye(3).bool()[None, None])], ids=str
)
def test_a_mask_with_numbers_serves_tensors_without_numbers(mask: TileMask, trains: bool) -> None:
    q = torch.zeros(2, 4, 3, 8, device="meta", requires_grad=trains)
    out, lse = attend(q, q, q, mask=mask, return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", q.shape[:3])
    if trains:
        out.sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape
