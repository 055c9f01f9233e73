"""Attention with gradients over keys and values on the host: results, gradients and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.attention.cooperative_cases import RATES
from tests.attention.virtual import VirtualMachine
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import checked
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.training import host_attend
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.reference import attention
from torchwrap.core import errors

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 37, 101, 8, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((B, HQ, SQ, D), (B, HKV, SK, D), (B, HKV, SK, DV))
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return q, k, v, torch.randn(HQ, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()


def gradients(found: tuple[Tensor, Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Of both results, with weights that are the same in every call."""
    chance = torch.Generator().manual_seed(9)
    loss = sum((one.double() * torch.randn(one.shape, generator=chance).double()).nan_to_num(neginf=0.0).sum() for one in found)
    return list(torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]


CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"mask": TileMask.causal(1, SQ, SK)},
    "window": {"mask": TileMask.window(1, SQ, SK, 20)},
    "padded": {"mask": TileMask.padded([SK, 30], SQ, SK)},
    "no key": {"mask": TileMask.padded([SK, 0], SQ, SK)},
    "softcap": {"softcap": 2.0, "mask": TileMask.causal(1, SQ, SK)},
    "scale": {"scale": 0.2},
}


@pytest.mark.parametrize("virtual", [False, True], ids=["one memory", "virtual"])
@pytest.mark.parametrize("case", list(CASES))
def test_results_and_gradients_are_those_of_one_piece(case: str, virtual: bool) -> None:
    """In float64, where the definition is known to 1e-12: whatever is wrong is more than rounding."""
    leaves = inputs(torch.float64)
    q, k, v, sinks = leaves
    machine: Any = VirtualMachine(RATES) if virtual else OneMemory()
    token = B * HKV * (D + DV) * 8
    found = host_attend(q, k, v, sinks=sinks, **CASES[case], machine=machine, chunk_bytes=7 * token)
    expected = attend(q, k, v, sinks=sinks, **CASES[case], return_lse=True)
    reference = attention(checked(q.detach(), k.detach(), v.detach(), sinks=sinks.detach(), **CASES[case]))
    for one, other, third in zip(found, expected, reference, strict=True):
        assert torch.allclose(one, other, atol=1e-12) and torch.allclose(one, third, atol=1e-12)
    mine, theirs = gradients(found, leaves), gradients(expected, leaves)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_law_holds(dtype: torch.dtype) -> None:
    """No farther from float64 than twice the definition in the same dtype, plus 1e-6."""
    leaves = inputs(dtype)[:3]
    mask = TileMask.causal(1, SQ, SK)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    truth = attend(*exact, mask=mask, return_lse=True)
    true_grads = gradients((truth[0],) * 2, exact)
    plain = attend(*leaves, mask=mask, backend="eager", return_lse=True)
    found = host_attend(*leaves, mask=mask, chunk_bytes=2000)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32

    def off(one: Tensor, other: Tensor) -> float:
        return float((one.detach().double() - other.detach()).abs().max())

    assert off(found[0], truth[0]) <= 2 * off(plain[0], truth[0]) + 1e-6
    mine, theirs = gradients((found[0],) * 2, leaves), gradients((plain[0],) * 2, leaves)
    for one, other, true in zip(mine, theirs, true_grads, strict=True):
        assert one.dtype == dtype and off(one, true) <= 2 * off(other, true) + 1e-6


def test_finite_differences_agree() -> None:
    q, k, v = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((1, 2, 3, 2), (1, 1, 5, 2), (1, 1, 5, 2)))
    sinks, mask = torch.randn(2, dtype=torch.float64).requires_grad_(), TileMask.causal(1, 3, 5)
    assert torch.autograd.gradcheck(lambda *leaves: host_attend(*leaves[:3], sinks=leaves[3], mask=mask, chunk_bytes=64), (q, k, v, sinks))


def test_gradients_are_added_where_they_are_wanted() -> None:
    """A prompt in two chunks: the keys of both steps have one sum each, in float32 although they are stored in bfloat16."""
    q, k, v, _ = inputs()
    k, v = (one.detach().bfloat16() for one in (k, v))
    sums = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    total = torch.zeros(())
    for first in (0, 20):
        rows = q[:, :, first : first + 17]
        out, _ = host_attend(rows, k, v, grads=sums, chunk_bytes=3000)
        total = total + out.square().sum()
    total.backward()
    wide = tuple(one.float().requires_grad_() for one in (k, v))
    q2 = q.detach().clone().requires_grad_()
    sum(attend(q2[:, :, first : first + 17], *wide).square().sum() for first in (0, 20)).backward()  # type: ignore[union-attr]
    for one, other in ((sums[0], wide[0].grad), (sums[1], wide[1].grad), (q.grad, q2.grad)):
        assert one is not None and other is not None and torch.allclose(one, other, atol=1e-5)


class Largest(TorchDispatchMode):
    """How many tensors are made that are as long as the keys."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.long = length, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and self.length in found.shape and found._base is None and not found.is_meta:
            self.long += 1
        return found


def test_the_device_holds_two_chunks_however_many_keys_there_are() -> None:
    chunk = 64
    for count in (1000, 4000):
        q, k, v = torch.randn(1, 2, 16, D), torch.randn(1, 1, count, D), torch.randn(1, 1, count, D)
        leaves = tuple(one.requires_grad_() for one in (q, k, v))
        machine = VirtualMachine(RATES)
        token = 2 * D * 4
        with Largest(count) as seen:
            out, _ = host_attend(*leaves, mask=TileMask.causal(1, 16, count), machine=machine, chunk_bytes=chunk * token)
            assert machine.allocated["device"] == 2 * chunk * token and seen.long == 0
            torch.autograd.grad(out.sum(), leaves)
        assert machine.allocated["device"] == 2 * 2 * chunk * token  # the virtual machine does not see memory going back
        assert machine.allocated["host"] == 0
        assert seen.long == 2  # the gradients of keys and values themselves
        assert machine.uploaded == 2 * count * token


def test_keys_that_nobody_sees_do_not_cross_the_link() -> None:
    q, k, v = torch.randn(1, 2, 4, D), torch.randn(1, 1, 1000, D), torch.randn(1, 1, 1000, D, requires_grad=True)
    machine = VirtualMachine(RATES)
    out, _ = host_attend(q, k, v, mask=TileMask.window(1, 4, 1000, 50), machine=machine, chunk_bytes=50 * 64)
    (dv,) = torch.autograd.grad(out.sum(), (v,))
    assert machine.uploaded == 2 * 100 * 64
    assert not dv[:, :, :900].any() and dv[:, :, 950:].any()


def test_time_is_that_of_the_link_where_it_is_the_slowest() -> None:
    """Chunks are attended while the next one is on its way, in both directions."""
    q, k, v = torch.randn(1, 2, 4, D), torch.randn(1, 1, 4096, D), torch.randn(1, 1, 4096, D, requires_grad=True)
    machine = VirtualMachine(RATES)
    out, _ = host_attend(q, k, v, machine=machine, chunk_bytes=64 * 64)
    one_way = 4096 * 64 / RATES.link
    assert machine.now() == pytest.approx(one_way, rel=0.05)
    torch.autograd.grad(out.sum(), (v,))
    assert machine.now() == pytest.approx(2 * one_way, rel=0.1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask": torch.ones(SQ, SK, dtype=torch.bool)}, "the mask is a Tensor"),
        ({"k": torch.zeros(B, HKV, SK + 1, D)}, "different heads or lengths"),
        ({"k": torch.zeros(B, HKV, SK, D, dtype=torch.int64)}, "k is torch.int64"),
        ({"v": torch.zeros(B, HKV, SK, DV, dtype=torch.float64)}, "k is torch.float32 and v torch.float64"),
        ({"v": torch.zeros(B, HKV, SK, DV, device="meta")}, "on meta"),
        ({"v": [1.0]}, "v is a list"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
        ({"grads": (torch.zeros(1), torch.zeros(1))}, "gradients are to be added"),
        ({"sinks": torch.zeros(3)}, "q has 4 heads"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else "",
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    q, k, v, _ = inputs()
    with pytest.raises(errors.ConfigError, match=said):
        host_attend(**{"q": q, "k": k, "v": v, **given})


def test_a_failure_of_the_host_is_an_error_of_the_caller() -> None:
    class Broken(OneMemory):
        def work(self, *args: Any, **options: Any) -> Any:
            raise MemoryError("gone")

    q, k, v, _ = inputs()
    out, _ = host_attend(q, k, v, machine=Broken(), chunk_bytes=1000)
    with pytest.raises(errors.WorkError, match="adding gradients up on the host failed: gone"):
        out.sum().backward()


def test_empty_inputs_and_no_gradients() -> None:
    q, k, v, _ = inputs()
    out, lse = host_attend(q, k[:, :, :0], v[:, :, :0])
    assert out.shape == (B, HQ, SQ, DV) and not out.any() and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None and not q.grad.any()
    with torch.no_grad():
        assert not host_attend(q, k, v)[0].requires_grad
