"""The package flash-attn as a back end, by a stand-in of its documented functions: bands at the last corner, lse +inf in dead rows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import assert_correct
from tests.attention.test_torch_kernels import of
from torchwrap.attention import flash_attn
from torchwrap.attention.attend import attend
from torchwrap.attention.flash_attn import FlashAttn
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors


def _band(q: Tensor, k: Tensor, causal: bool, left: int, right: int) -> Tensor:
    rows, columns = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
    right = 0 if causal else right
    return ((left < 0) | (columns >= rows - left)) & ((right < 0) | (columns <= rows + right))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    raw = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)) * scale
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    return capped.masked_fill(~seen, -torch.inf), 1 - (capped / softcap) ** 2 if softcap else torch.ones_like(raw)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    assert softmax_scale is not None and dropout_p == 0.0 and return_attn_probs
    scores, _ = _scores(q, k, softmax_scale, softcap, _band(q, k, causal, *window_size))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", weights, v.double().repeat_interleave(q.shape[2] // v.shape[2], 2)).to(q.dtype)
    return out, torch.where(lse == -torch.inf, torch.inf, lse).float(), None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    scores, slope = _scores(q, k, softmax_scale, softcap, _band(q, k, causal, window_size_left, window_size_right))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (tensor.double().repeat_interleave(group, 2) for tensor in (k, v))
    weights = torch.exp(scores - softmax_lse[..., None].double())
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)
    grad = weights * (torch.einsum("bihd,bjhd->bhij", dout.double(), wide_v) - delta[..., None]) * slope * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", grad, wide_k))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", grad, q.double()).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", weights, dout.double()).unflatten(2, (-1, group)).sum(3))
    return delta


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], FlashAttn]]:
    """Makes the package appear, of a version; on a card of 8.0."""

    def appear(version: str = "2.8.3") -> FlashAttn:
        package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
        package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        package.__version__ = version  # type: ignore[attr-defined]
        interface.flash_attn_func, interface._flash_attn_backward = flash_attn_func, _flash_attn_backward  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
        flash_attn._missing.cache_clear()
        flash_attn._package.cache_clear()
        return FlashAttn()

    monkeypatch.setattr(flash_attn, "on_card", lambda call: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    yield appear
    flash_attn._missing.cache_clear()
    flash_attn._package.cache_clear()


@pytest.mark.parametrize(
    "call",
    [
        of(7, 40), of(19, 19, TileMask.causal(1, 19, 19), sinks=torch.randn(4)), of(9, 30, TileMask.causal(2, 9, 30), softcap=2.0),
        of(30, 9, TileMask.causal(2, 30, 9)), of(20, 33, TileMask.window(2, 20, 33, 5)), of(20, 20, TileMask(1, 20, 20, left=3)),
        of(19, 19, width=12, value_width=20, heads=6, kv_heads=1),
    ],
    ids=["everything", "causal with sinks", "capped", "dead rows", "window", "left only", "odd widths"],
)  # fmt: skip
def test_results_and_gradients_are_those_of_the_definition(installed: Callable[..., FlashAttn], call: Any) -> None:
    assert_correct(installed(), call, "flash_attn")  # in float32, which the package would refuse: its arithmetic is not the subject


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "float32"), ({"dropout": 0.1}, "dropout=0.1"), ({"bias": torch.zeros(5, 9)}, "bias"), ({"width": 264}, "264"),
        ({"mask": TileMask.causal(1, 5, 9, q_offset=0)}, "a mask"), ({"mask": TileMask.padded([2, 9], 5, 9)}, "a mask"),
    ],
)  # fmt: skip
def test_what_the_package_lacks_is_refused(installed: Callable[..., FlashAttn], options: dict[str, Any], says: str) -> None:
    call, one = of(5, 9, **options), installed()
    if says != "float32":
        for part in ("q", "k", "v"):
            object.__setattr__(call, part, getattr(call, part).half())
    assert says in str(one.refuses(call))


def test_an_old_package_or_card_is_refused(installed: Callable[..., FlashAttn], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "flash-attn is 2.5.6, and 2.7 is the oldest" in str(installed("2.5.6").refuses(of(5, 5)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5" in str(installed().refuses(of(5, 5)))


def test_where_it_is_absent_the_error_says_so() -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    x = torch.randn(1, 2, 5, 16)
    with pytest.raises(errors.UnsupportedModelError, match="flash-attn is not installed"):
        attend(x, x, x, backend="flash_attn")
