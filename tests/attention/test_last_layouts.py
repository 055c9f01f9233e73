"""Calls of the last layouts are known by torch's guards, in place of a key: the same results, and what the key refuses is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchwrap.attention import prepared
from torchwrap.attention.attend import attend
from torchwrap.attention.cpu import decode
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.settings import Settings
from torchwrap.core import errors

pytestmark = [
    pytest.mark.skipif(decode.native_library() is not None, reason="nothing is prepared without the native kernels"),
    pytest.mark.skipif(prepared._Guards is None, reason="this torch has no guards"),
]


@pytest.fixture(autouse=True)
def _nothing_known() -> Any:
    prepared.forget()
    yield
    prepared.forget()


def tensors(keys: int = 20, rows: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(keys)
    return torch.randn(2, 4, rows, 16, dtype=dtype), *(torch.randn(2, 2, keys, 16, dtype=dtype) for _ in range(2))


def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call that makes its key."""
    counted: list[int] = []
    whole = prepared.is_traced
    monkeypatch.setattr(prepared, "transformed", lambda: bool(counted.append(1)) or whole())
    return counted


def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return attend(q, k, v, backend="eager", **options)


def test_a_layout_is_known_without_a_key_from_the_second_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = made(monkeypatch)
    both = tensors(), tensors(30)
    for turn in range(3):
        for given in both:
            torch.testing.assert_close(attend(*given), wanted(*given))
        if not turn:
            first = len(counted)
    ours = [attend(*given) for given in both]
    keys_of_eager = 2 * 2  # `wanted` is no prepared call, and makes its key every time
    assert len(counted) == first + keys_of_eager and len(ours) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, v: (q, k.bfloat16().float().mT.contiguous().mT, v), lambda q, k, v: (q[:1], k[:1], v[:1]),
        lambda q, k, v: (q.double(), k.double(), v.double()), lambda q, k, v: (torch._neg_view(q), k, v),
        lambda q, k, v: (q, torch._efficientzerotensor(k.shape), v), lambda q, k, v: (q, k[:, :, ::2], v[:, :, ::2]),
        lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16()),
    ],
    ids=["strides", "batch", "double", "sign", "zeros", "length", "dtype"],
)  # fmt: skip
def test_tensors_of_another_layout_are_not_taken_for_the_last(other: Any) -> None:
    given = tensors()
    attend(*given)
    changed = other(*given)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if changed[0].dtype == torch.bfloat16 else {}
    whole = [tensor.resolve_neg().clone() for tensor in changed]
    torch.testing.assert_close(attend(*changed), wanted(*whole), **tolerance)


# In a process of its own, which a guard that is asked for their strides ends without a word of Python.
NESTED = """
import torch
from torchwrap.attention.attend import attend
from torchwrap.core.errors import ConfigError
known = torch.randn(2, 4, 6, 8)
nested = torch.nested.nested_tensor([known[0], known[1]])
attend(known, known, known)
for given in ((nested, known, known), (known, nested, known), (known, known, nested), (nested, nested, nested)):
    try:
        attend(*given)
    except ConfigError as error:
        assert "nested" in str(error)
        print("refused")
bias = torch.randn(2, 4, 6, 6)
attend(known, known, known, bias=bias)
try:
    attend(known, known, known, bias=torch.nested.nested_tensor([bias[0], bias[1]]))
except ConfigError as error:
    assert "nested" in str(error)
    print("refused")
"""


def test_nested_tensors_are_refused_after_others_too() -> None:
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", NESTED], capture_output=True, text=True, check=False, timeout=120)
    assert (found.returncode, found.stdout.split()) == (0, ["refused"] * 5), found.stderr


def test_numbers_settings_and_gradients_are_part_of_what_is_known() -> None:
    q, k, v = tensors()
    attend(q, k, v, scale=1.0)
    torch.testing.assert_close(attend(q, k, v, scale=0.5), wanted(q, k, v, scale=0.5))
    torch.testing.assert_close(attend(q, k, v, scale=1.0, softcap=2.0), wanted(q, k, v, scale=1.0, softcap=2.0))
    with pytest.raises(errors.ConfigError, match="scale is a bool"):
        attend(q, k, v, scale=True)
    with pytest.raises(errors.ConfigError):
        attend(q, k, v, scale=1.0, backend="none of them")
    torch.testing.assert_close(attend(q, k, v, scale=1.0, backend=Settings(backend="sdpa")), wanted(q, k, v, scale=1.0))
    assert attend(q, k.requires_grad_(), v, scale=1.0).requires_grad
    with torch.no_grad():
        assert not attend(q, k, v, scale=1.0).requires_grad


def test_masks_are_known_by_themselves_and_not_kept() -> None:
    q, k, v = tensors(20, 20)
    masks = [TileMask.causal(1, 20, 20), TileMask.window(1, 20, 20, 3), TileMask.padded((20, 7), 20, 20)]
    for _ in range(2):
        for mask in masks:
            torch.testing.assert_close(attend(q, k, v, mask=mask), wanted(q, k, v, mask=mask))
            torch.testing.assert_close(attend(q, k, v), wanted(q, k, v))
    gone = [weakref.ref(mask) for mask in masks]
    del mask, masks
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_without_guards_calls_are_known_by_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_Guards", None)
    given = tensors()
    for _ in range(2):
        torch.testing.assert_close(attend(*given), wanted(*given))
    assert not prepared._last


def test_a_call_without_a_mask_is_not_that_of_a_mask_that_is_gone() -> None:
    q, k, v = tensors(20, rows=20)
    for _ in range(2):
        mask = TileMask.causal(1, 20, 20)
        torch.testing.assert_close(attend(q, k, v, mask=mask), wanted(q, k, v, mask=mask))
        del mask
        gc.collect()
        torch.testing.assert_close(attend(q, k, v), wanted(q, k, v))


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_what_was_computed_below_a_mode_is_computed_again_without_it(rows: int, masked: bool) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(20, rows))
    mask = TileMask.causal(1, rows, 20) if masked else None
    attend(q, k, v, mask=mask)
    with Looking():
        out = checkpoint(attend, q, k, v, mask=mask, use_reentrant=False)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v, mask=mask).sum(), (q, k, v))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_mode_that_makes_other_tensors_takes_the_whole_way() -> None:
    given = tensors()
    attend(*given)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(attend(*given), FakeTensor)


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_masks_that_are_tensors_are_known_by_their_layout_and_not_by_their_numbers(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = tensors(20, rows)
    k, v = (tensor.repeat(1, 2, 1, 1) for tensor in (k, v))
    bias = torch.randn(2, 4, rows, 20)
    attend(q, k, v, **{name: bias})
    counted = made(monkeypatch)
    for given in (bias, torch.randn_like(bias)):
        found = attend(q, k, v, **{name: given})
        assert not counted
        torch.testing.assert_close(found, wanted(q, k, v, **{name: given}))
        counted.clear()
    bias.fill_(-3.0)[..., :4] = 1.0
    torch.testing.assert_close(attend(q, k, v, **{name: bias}), wanted(q, k, v, **{name: bias}))


OTHER_BIASES: dict[str, Any] = {
    "expanded": lambda bias: bias[:, :1],
    "transposed": lambda bias: bias.mT.contiguous().mT,
    "half": lambda bias: bias.bfloat16(),
    "learned": lambda bias: bias.clone().requires_grad_(),
    "a sign to be applied": torch._neg_view,
    "nothing": lambda bias: None,
}


@pytest.mark.parametrize("other", OTHER_BIASES)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_another_bias_is_not_taken_for_the_last(other: str, rows: int) -> None:
    q, k, v = tensors(20, rows)
    bias = torch.randn(2, 4, rows, 20)
    attend(q, k, v, bias=bias)
    changed = OTHER_BIASES[other](bias)
    whole = None if changed is None else changed.detach().float().resolve_neg().clone()
    found = attend(q, k, v, bias=changed)
    torch.testing.assert_close(found, wanted(q, k, v, bias=whole))
    assert found.requires_grad == (other == "learned")


@pytest.mark.parametrize("rows", [1, 20])
def test_a_bias_of_zeros_without_memory_is_not_the_layout_of_one_with(rows: int) -> None:
    q, k, v = tensors(20, rows)
    shape = q.shape[0], q.shape[1], rows, 20
    attend(q, k, v, bias=torch._efficientzerotensor((20,)).expand(shape))
    bias = torch.randn(20).expand(shape)
    torch.testing.assert_close(attend(q, k, v, bias=bias), wanted(q, k, v, bias=bias))
