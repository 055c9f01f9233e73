"""Which back end computes a call: by name, by itself, and what it says when the one that was asked for cannot."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from tests.attention.cases import EXTRAS, MASKS, assert_correct, make
from torchwrap.attention import dispatch
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cooperative.training import host_attend
from torchwrap.attention.cpu import prefill
from torchwrap.attention.dispatch import BACKENDS, backend, choose
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import Eager
from torchwrap.attention.service import Service
from torchwrap.attention.torch_kernels.backend import TorchSdpa
from torchwrap.attention.torch_kernels.masks import is_causal
from torchwrap.core import errors


def call(**options: Any) -> Call:
    return checked(torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), **options)


def test_on_cpus_the_compositions_come_first() -> None:
    choice = choose(call())
    assert choice.backend.name == "cpu" and "first" in choice.reason


@pytest.mark.parametrize(
    ("mask", "options", "says"),
    [
        (None, {}, "1 rectangles"),
        (TileMask.causal(1, 200, 200), {}, "1 causal squares"),
        (TileMask.window(1, 200, 200, 9), {}, "strips of a window|rectangles with masks"),
        (TileMask.causal(1, 200, 200), {"softcap": 2.0}, "tiles of our own: softcap=2.0"),
        (TileMask.causal(1, 1, 200), {}, "native kernel|pieces of the keys"),
    ],
)
def test_the_reason_says_how_a_call_is_computed(
    mask: TileMask | None, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "refuses", lambda call: "the compositions are under test")
    sq = 200 if mask is None else mask.shape[2]
    one = checked(torch.zeros(1, 2, sq, 8), torch.zeros(1, 1, 200, 8), torch.zeros(1, 1, 200, 8), mask=mask, **options)
    reason = choose(one).reason
    assert re.search(says, reason)
    assert "the compositions are under test" in reason or sq == 1


def test_the_reason_says_why_the_native_kernel_was_passed_over() -> None:
    one = checked(*(torch.zeros(1, 2, 40, 8, dtype=torch.float64) for _ in "qkv"), mask=TileMask.causal(1, 40, 40))
    assert "not the native kernel: torch.float64" in choose(one).reason


def test_the_reason_of_an_empty_call_can_be_asked_for() -> None:
    empty = torch.zeros(1, 2, 0, 8)
    assert "nothing to compute" in choose(checked(empty, empty, empty)).reason


def test_a_back_end_is_taken_when_it_is_asked_for() -> None:
    for name in ("cpu", "sdpa", "eager"):
        choice = choose(call(), name)
        assert choice.backend.name == name and "asked for" in choice.reason


def test_every_name_is_that_of_a_back_end() -> None:
    assert all(backend(name).name == name for name in BACKENDS)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(errors.ConfigError, match=r"backend='flash3' is unknown.*'cpu'"):
        attend(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), backend="flash3")


@pytest.mark.parametrize(
    ("name", "options", "check"),
    [("sdpa", {"softcap": 2.0}, "softcap=2.0"), ("sdpa", {"dropout": 0.5}, "dropout=0.5"), ("cuda_mma", {}, "cpu")],
)
def test_a_back_end_that_cannot_says_why_and_who_can(name: str, options: dict[str, Any], check: str) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=rf"backend='{name}' cannot compute this call: .*{check}") as raised:
        choose(call(**options), name)
    assert "backend='cpu'" in raised.value.fix


def test_reasons_for_leaving_a_first_choice_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backend("cpu")), "refuses", lambda self, call: "it is away")
    choice = choose(call())
    assert choice.backend.name == "sdpa" and "not cpu: it is away" in choice.reason


@pytest.mark.parametrize("mask", MASKS)
def test_torchs_own_is_as_exact_as_the_definition(mask: str) -> None:
    for extra in ("plain", "sinks"):
        one, what = make(31, mask=mask, extra=extra)
        assert_correct(TorchSdpa(), one, what)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_eager_back_end_is_the_definition(extra: str) -> None:
    one, what = make(41, extra=extra, mask="padded left")
    assert_correct(Eager(), one, what, with_lse=extra == "gradient of lse")


def test_causal_in_torchs_sense_is_not_taken_for_another() -> None:
    def of(mask: TileMask | None, sq: int, sk: int) -> bool:
        return is_causal(checked(torch.zeros(1, 1, sq, 8), torch.zeros(1, 1, sk, 8), torch.zeros(1, 1, sk, 8), mask=mask))

    assert of(TileMask.causal(1, 5, 5), 5, 5)
    assert of(TileMask.causal(1, 5, 9, q_offset=0), 5, 9)
    assert not of(TileMask.causal(1, 5, 9), 5, 9)
    assert not of(TileMask.window(1, 5, 5, 3), 5, 5)
    assert not of(TileMask.padded([3], 5, 5), 5, 5)
    assert not of(None, 5, 5)


class Broken(Eager):
    """A back end whose kernel cannot be launched."""

    name = "cpu"

    def __init__(self, doing: str) -> None:
        self.doing, self.asked = doing, 0

    def forward(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        self.fail("forward")
        return super().forward(call)

    def backward(self, call: Call, *given: Any) -> Any:
        self.fail("backward")
        return super().backward(call, *given)

    def fail(self, doing: str) -> None:
        self.asked += 1
        if doing == self.doing:
            raise errors.KernelError("no such card", where="here")


@pytest.mark.parametrize("doing", ["forward", "backward"])
def test_after_a_kernel_that_cannot_run_the_next_back_end_computes_the_call(monkeypatch: pytest.MonkeyPatch, doing: str) -> None:
    broken = Broken(doing)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "backend", lambda name: broken if name == "cpu" else backend(name))
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))

    def results(name: str) -> tuple[torch.Tensor, ...]:
        out = attend(q, k, v, backend=name)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    with pytest.warns(errors.TorchwrapWarning, match="'cpu' cannot run.*no such card"):
        first = results("auto")
    for found, expected in zip(first, results("eager"), strict=True):
        torch.testing.assert_close(found, expected)
    asked = broken.asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = results("auto")
    torch.testing.assert_close(first, again)
    assert broken.asked == asked, "it is not asked again"
    assert "failed here before" in choose(checked(q, k, v)).reason


def test_the_record_names_who_computed_a_call_after_another_had_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken("forward")
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "backend", lambda name: broken if name == "cpu" else backend(name))
    service, x = Service(), torch.randn(1, 2, 6, 8)
    with pytest.warns(errors.TorchwrapWarning):
        service.attend("a", x, x, x)
    service.attend("a", x, x, x)
    assert list(service.stats()["served"].values()) == [2] and "cpu" not in next(iter(service.stats()["served"])).split()
    assert "failed here before" in service.explain()


@pytest.mark.parametrize("doing", ["forward", "backward"])
def test_a_part_of_attention_is_computed_by_the_next_back_end(monkeypatch: pytest.MonkeyPatch, doing: str) -> None:
    broken = Broken(doing)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "SHARING", ("cpu", "eager"))
    monkeypatch.setattr(dispatch, "backend", lambda name: broken if name == "cpu" else backend(name))
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, _ = host_attend(q, k, v)
        out.square().sum().backward()
    assert ["no such card" in str(one.message) for one in caught] == [True], "it is said, once"
    torch.testing.assert_close(out, attend(q, k, v, backend="eager"))
    asked = broken.asked
    host_attend(q, k, v)
    assert broken.asked == asked, "it is not asked again"


def test_a_back_end_that_was_asked_for_fails_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "backend", lambda name: Broken("forward") if name == "cpu" else backend(name))
    q = k = v = torch.randn(1, 2, 6, 8)
    for _ in range(2):
        with pytest.raises(errors.KernelError, match="no such card"):
            attend(q, k, v, backend="cpu")
