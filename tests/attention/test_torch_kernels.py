"""Torch's kernels for CUDA as back ends, without a card: their calls, by schemas and fake registrations, and the arithmetic around."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.attention.cases import MASKS, assert_correct, make
from tests.attention.torch_kernels import Emulated
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.torch_kernels import backend, card, cudnn, efficient, flash
from torchwrap.attention.torch_kernels.card import CardKernel
from torchwrap.attention.torch_kernels.masks import corner
from torchwrap.core import errors

KERNELS = {"flash": (flash, flash.Flash()), "efficient": (efficient, efficient.Efficient()), "cudnn": (cudnn, cudnn.Cudnn())}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """Kernels on the CPU, where torch's checks permit everything."""
    found = Emulated()
    cudnn._dimensions.cache_clear()
    monkeypatch.setattr(card, "on_card", lambda call: None)
    for module, _ in KERNELS.values():
        monkeypatch.setattr(module, "_aten", found)
        monkeypatch.setattr(module, "permits", lambda *given: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    return found


def of(rows: int, columns: int, mask: Any = None, *, heads: int = 4, kv_heads: int = 2, width: int = 16, **options: Any) -> Call:
    q, k = torch.randn(2, heads, rows, width), torch.randn(2, kv_heads, columns, width)
    return checked(q, k, torch.randn(2, kv_heads, columns, options.pop("value_width", width)), mask=mask, **options)


CALLS = {
    "everything": lambda: of(7, 40),
    "decode": lambda: of(1, 33, TileMask.causal(2, 1, 33)),
    "causal": lambda: of(19, 19, TileMask.causal(1, 19, 19)),
    "causal, last corner": lambda: of(9, 30, TileMask.causal(2, 9, 30)),
    "causal, last corner, dead rows": lambda: of(30, 9, TileMask.causal(2, 30, 9)),
    "causal, first corner": lambda: of(9, 30, TileMask.causal(2, 9, 30, q_offset=0)),
    "window": lambda: of(20, 33, TileMask.window(2, 20, 33, 5)),
    "both ways": lambda: of(20, 20, TileMask(1, 20, 20, left=3, right=2)),
    "far right": lambda: of(9, 30, TileMask(1, 9, 30, right=30)),
    "far right of the first key": lambda: of(30, 9, TileMask(1, 30, 9, right=10)),
    "left only": lambda: of(20, 20, TileMask(1, 20, 20, left=3)),
    "sinks": lambda: of(19, 19, TileMask.causal(1, 19, 19), sinks=torch.randn(4)),
    "odd widths": lambda: of(19, 19, TileMask.causal(1, 19, 19), width=12, value_width=20, scale=0.3),
    "one head each": lambda: of(19, 19, heads=3, kv_heads=3),
    "one key head": lambda: of(19, 23, TileMask.causal(1, 19, 23), heads=6, kv_heads=1),
}
TAKEN = {
    "flash": set(CALLS) - {"causal, first corner", "far right of the first key"},
    "efficient": set(CALLS),
    "cudnn": {"everything", "decode", "causal", "sinks", "odd widths", "one head each"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_and_gradients_are_those_of_the_definition(emulated: Emulated, kernel: str, name: str) -> None:
    call, one = CALLS[name](), KERNELS[kernel][1]
    if name not in TAKEN[kernel]:
        assert "mask" in str(one.refuses(call))
        return
    assert one.refuses(call) is None
    assert_correct(one, call, f"{kernel}, {name}")
    assert len({id(given) for _, given in emulated.calls}) == 2 + (kernel == "cudnn"), "forward, backward, and cuDNN's form is asked once"


def test_cudnn_is_given_the_lse_as_its_release_gives_it(emulated: Emulated) -> None:
    emulated.statistics = 3
    assert_correct(KERNELS["cudnn"][1], CALLS["causal"](), "three dimensions")


@pytest.mark.parametrize("mask", MASKS)
def test_the_efficient_kernel_takes_every_mask(emulated: Emulated, mask: str) -> None:
    for extra, heads in (("plain", (8, 2)), ("bias", (9, 3)), ("sinks", (4, 4))):
        call, what = make(7, mask=mask, extra=extra, heads=heads, q_length=17, past=11)
        assert_correct(KERNELS["efficient"][1], call, what)


@pytest.mark.parametrize("shape", [(1, 1, 1, 28), (2, 1, 17, 28), (1, 8, 17, 28), (2, 8, 1, 28), (2, 8, 17, 1)])
def test_a_bias_of_any_shape_is_added(emulated: Emulated, shape: tuple[int, ...]) -> None:
    assert_correct(KERNELS["efficient"][1], of(17, 28, heads=8, bias=torch.randn(shape)), str(shape))


def test_keys_are_not_copied_for_the_heads_that_share_them(emulated: Emulated) -> None:
    one = KERNELS["efficient"][1]
    for call in (of(1, 50, heads=8), of(1, 50, TileMask.causal(2, 1, 50), heads=8), of(12, 12, TileMask.causal(1, 12, 12), heads=8)):
        one.forward(call)
        assert emulated.calls[-1][1]["key"].untyped_storage().data_ptr() == call.k.untyped_storage().data_ptr()


@pytest.mark.parametrize("kernel", KERNELS)
def test_slices_that_begin_anywhere_are_laid_out_anew(emulated: Emulated, kernel: str) -> None:
    call = of(16, 16, TileMask.causal(1, 16, 16))
    parts = torch.randn(3, 2, 4, 16, 23)
    moved = [part[:, :heads, :, 3:19] for part, heads in zip(parts, (4, 2, 2), strict=True)]
    assert_correct(KERNELS[kernel][1], replace(call, q=moved[0], k=moved[1], v=moved[2]), kernel)


def test_an_old_cudnn_is_refused_lengths_that_it_gets_wrong(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    one = KERNELS["cudnn"][1]
    assert "cuDNN is 91002" in str(one.refuses(of(130, 130))) and one.refuses(of(128, 256)) is None


def test_the_memory_of_a_mask_is_known_before(emulated: Emulated) -> None:
    one = KERNELS["efficient"][1]
    assert one.memory(of(64, 64, TileMask.causal(1, 64, 64))) == 0 == one.memory(of(64, 64))
    assert one.memory(of(64, 64, TileMask.window(1, 64, 64, 9))) == 64 * 64 * 5
    assert KERNELS["flash"][1].memory(of(64, 64, TileMask.window(1, 64, 64, 9))) == 0


def test_a_gradient_of_lse_is_computed_by_tiles(emulated: Emulated) -> None:
    assert_correct(KERNELS["flash"][1], of(19, 19, TileMask.causal(1, 19, 19)), "lse", with_lse=True)


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (RuntimeError("This flash attention build does not support local attention."), errors.KernelError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
    ids=["a refusal", "a broken card", "no memory"],
)
def test_only_a_refusal_is_gone_on_from(monkeypatch: pytest.MonkeyPatch, emulated: Emulated, raised: Exception, arrives: type) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise raised

    call, one = of(9, 9, TileMask.window(1, 9, 9, 4)), KERNELS["flash"][1]
    out, lse = one.forward(call)
    monkeypatch.setattr(flash, "_aten", SimpleNamespace(_flash_attention_forward=refuse, _flash_attention_backward=refuse))
    for work in (lambda: one.forward(call), lambda: one.backward(call, out, lse, out, None)):
        with pytest.raises(arrives) as caught:
            work()
        assert type(caught.value) is arrives


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("options", "says"),
    [({"softcap": 2.0}, "softcap=2.0"), ({"dropout": 0.2}, "dropout=0.2"), ({"bias": torch.zeros(5, 5, requires_grad=True)}, "gradient")],
)
def test_what_torch_lacks_is_refused(emulated: Emulated, kernel: str, options: dict[str, Any], says: str) -> None:
    assert says in str(KERNELS[kernel][1].refuses(of(5, 5, **options)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_card_the_reason_is_the_device(kernel: str) -> None:
    assert "q is on cpu" in str(KERNELS[kernel][1].refuses(of(5, 5)))


def test_torchs_own_words_are_the_reason() -> None:
    # On a build for CPUs torch refuses every one of its kernels for CUDA; what it says is passed on.
    x = torch.zeros(1, 2, 5, 8)
    for kernel in ("flash", "efficient"):
        assert str(card.permits(kernel, x, x, x, None, False)).startswith(f"torch's check of its {kernel} kernel says: ")


@pytest.mark.parametrize("rows", [(3, 3), (3, 7)])
def test_corners(rows: tuple[int, int]) -> None:
    first, last = TileMask.causal(1, *rows, q_offset=0), TileMask.causal(1, *rows)
    expected = ("both", "both") if rows[0] == rows[1] else ("first", "last")
    assert (corner(of(*rows, first)), corner(of(*rows, last))) == expected
    assert corner(of(*rows, TileMask.causal(1, *rows, q_offset=2))) is None


def test_the_first_kernel_that_can_is_that_of_sdpa(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    both: Any = backend.TorchSdpa()

    def chosen(call: Call) -> str:
        found = both._kernel(call)
        return found.name if isinstance(found, CardKernel) else found

    assert chosen(of(5, 5)) == "sdpa-cudnn"
    assert chosen(of(5, 9, TileMask.window(1, 5, 9, 3))) == "sdpa-flash"
    assert chosen(of(5, 9, TileMask.padded([3, 4], 5, 9))) == "sdpa-efficient"
    assert chosen(of(5, 9, softcap=3.0)).count("softcap=3.0") == 3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen(of(5, 5)) == "sdpa-flash"


@pytest.mark.parametrize("name", ["everything", "causal", "odd widths", "sinks", "one key head"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_torchs_fake_registrations_take_the_calls(monkeypatch: pytest.MonkeyPatch, kernel: str, name: str) -> None:
    """Of tensors on a card that is not there: torch checks arguments and gives shapes."""
    module, one = KERNELS[kernel]
    cudnn._dimensions.cache_clear()
    monkeypatch.setattr(module, "permits", lambda *given: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    call = CALLS[name]()
    given = {part: getattr(call, part) for part in ("q", "k", "v", "sinks") if getattr(call, part) is not None}
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {part: torch.empty(tensor.shape, dtype=torch.float16, device="cuda") for part, tensor in given.items()}
        fake = Call(mask=call.mask, scale=call.scale, **tensors)
        if (reason := one.refuses(fake)) is not None:
            assert name not in TAKEN[kernel], reason
            return
        out, lse = one.run(fake)
        assert out.shape == (2, call.heads, call.q_length, call.value_width) and out.device.type == "cuda"
        assert lse.shape == out.shape[:3] and lse.dtype == torch.float32
        if kernel == "efficient":
            return  # torch 2.13: the fake registration of its backward lacks an argument of the schema
        grads = one.run_backward(fake, out, torch.where(lse == -math.inf, math.inf, lse), out)
        assert [grad.shape for grad in grads] == [call.q.shape, call.k.shape, call.v.shape]
