"""What was prepared for a call serves its like and nothing else: masks, dtypes, numbers, settings, threads and gradients are told apart."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torchwrap as tw
from tests.attention.cases import assert_correct
from torchwrap import native
from torchwrap.attention import dispatch, node, prepared
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, Gradients, checked
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.attention.settings import Settings
from torchwrap.core import errors

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())


def inputs(*, batch: int = 2, heads: tuple[int, int] = (4, 2), lengths: tuple[int, int] = (6, 20), dtype: Any = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]))
    return [torch.randn(batch, *shape, 16, generator=generator).to(dtype) for shape in shapes]


def known(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    given = {"mask": None, "scale": None, "softcap": None, "dropout": 0.0, "backend": "auto", **options}
    return prepared.prepared(q, k, v, *given.values())


def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return attend(q, k, v, backend="eager", **options)


class Kept:
    """A back end of what is prepared, by the second call of each."""

    name = "cpu"

    def of(self, call: Call, trains: bool) -> Any:
        tensors = [tensor.detach().requires_grad_(trains) for tensor in (call.q, call.k, call.v)]
        options = {"mask": call.mask, "scale": call.scale, "softcap": call.softcap}
        first = known(*tensors, **options)
        assert first is not None and known(*tensors, **options) is first
        return first

    def refuses(self, call: Call) -> None:
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = self.of(call, False).forward(call.q, call.k, call.v, None, True)
        trained, of_trained = self.of(call, True).forward(call.q, call.k, call.v, None, True)
        assert of_trained is not None and torch.equal(out, trained) and torch.equal(lse, of_trained)
        return out, lse

    def backward(self, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        work = self.of(call, True)
        out, lse = work.forward(call.q, call.k, call.v, None, True)
        return *work.backward(call.q, call.k, call.v, out, lse, grad_out, grad_lse), None, None


MASKS: dict[str, Any] = {
    "none": lambda sq, sk: None,
    "causal": lambda sq, sk: TileMask.causal(1, sq, sk),
    "first rows see nothing": lambda sq, sk: TileMask.causal(1, sq, sk, q_offset=-2),
    "window": lambda sq, sk: TileMask.window(1, sq, sk, 5),
    "padded, one row empty": lambda sq, sk: TileMask.padded([sk, 0], sq, sk, causal=False),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [
        ((1, 40), (4, 2), torch.float32), ((1, 40), (4, 4), torch.float32), ((1, 3), (4, 4), torch.float32),
        ((1, 40), (4, 4), torch.float16), ((5, 40), (4, 2), torch.bfloat16), ((12, 12), (4, 4), torch.float32),
        ((40, 40), (4, 2), torch.float16), ((70, 70), (2, 2), torch.bfloat16),
    ],
)  # fmt: skip
def test_what_is_prepared_computes_the_definition(mask: str, lengths: Any, heads: Any, dtype: torch.dtype) -> None:
    call, what = (
        checked(*inputs(lengths=lengths, heads=heads, dtype=dtype), mask=MASKS[mask](*lengths)),
        f"{mask} {lengths} {heads} {dtype}",
    )
    if dtype == torch.float32:
        assert_correct(Kept(), call, what)
        assert_correct(Kept(), call, what, with_lse=True)
        return
    found, expected = Kept().forward(call), Composed().forward(call)
    assert all(map(torch.equal, found, expected))
    grad = torch.randn_like(found[0])
    for of_lse in (None, torch.randn_like(found[1])):
        assert all(map(torch.equal, Kept().backward(call, *found, grad, of_lse)[:3], Composed().backward(call, *found, grad, of_lse)[:3]))


def test_layouts_are_told_apart() -> None:
    q, k, v = inputs(lengths=(9, 9))
    expected = eager(q, k, v)
    innermost = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    wider = [torch.cat([tensor, tensor], 3)[..., :16] for tensor in (q, k, v)]
    reversed_rows = [tensor.mT.contiguous().mT for tensor in (q, k, v)]
    for tensors in ((q, k, v), innermost, wider, reversed_rows, (q, innermost[1], wider[2])):
        for _ in range(2):
            torch.testing.assert_close(attend(*tensors), expected)
    assert known(*reversed_rows) is None  # rows that are not contiguous are copied, which is the other way's business


def test_the_same_shape_with_another_mask_is_another_call() -> None:
    q, k, v = inputs(lengths=(6, 6))
    masks = [
        None, TileMask.causal(1, 6, 6), TileMask.window(1, 6, 6, 2), TileMask.causal(1, 6, 6, q_offset=2), TileMask.full(1, 6, 6),
        TileMask.padded([6, 2], 6, 6), TileMask.padded([3, 4], 6, 6), torch.ones(6, 6).tril().bool(), torch.zeros(6, 6),
    ]  # fmt: skip
    for _ in range(2):
        for mask in masks:
            torch.testing.assert_close(attend(q, k, v, mask=mask), eager(q, k, v, mask=mask))


def test_a_tensor_as_a_mask_may_be_written_to_between_calls() -> None:
    q, k, v = inputs(lengths=(6, 6))
    mask = torch.ones(6, 6).tril().bool()
    first = attend(q, k, v, mask=mask)
    mask.fill_(True)
    torch.testing.assert_close(attend(q, k, v, mask=mask), attend(q, k, v))
    assert not torch.equal(first, attend(q, k, v, mask=mask))


def test_rules_that_say_the_same_share_what_is_prepared_and_wrong_shapes_do_not() -> None:
    q, k, v = inputs(lengths=(6, 6))
    assert known(q, k, v, mask=TileMask.causal(1, 6, 6)) is known(q, k, v, mask=TileMask.causal(1, 6, 6))
    assert known(q, k, v, mask=TileMask.causal(1, 6, 6, q_offset=1)) is not known(q, k, v, mask=TileMask.causal(1, 6, 6))
    with pytest.raises(errors.ConfigError, match="Build the mask for these lengths"):
        attend(q, k, v, mask=TileMask.causal(1, 6, 7))
    with pytest.raises(errors.ConfigError, match="Build the mask for these lengths"):
        attend(q, k, v, mask=TileMask.causal(3, 6, 6))


def test_numbers_and_dtypes_are_told_apart() -> None:
    q, k, v = inputs()
    for _ in range(2):
        for options in ({}, {"scale": 0.5}, {"scale": 1}, {"softcap": 2.0}, {"scale": torch.tensor(0.7)}, {"sinks": torch.ones(4)}):
            torch.testing.assert_close(attend(q, k, v, **options), eager(q, k, v, **options))
        for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
            given = [tensor.to(dtype) for tensor in (q, k, v)]
            assert attend(*given).dtype == dtype
            torch.testing.assert_close(attend(*given).float(), eager(q, k, v), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.zeros(2, 2, 20, 15)}, {"v": torch.zeros(2, 2, 19, 16)}, {"k": torch.zeros(2, 2, 20, 16).half()}, {"scale": math.nan},
        {"k": torch.zeros(2, 3, 20, 16), "v": torch.zeros(2, 3, 20, 16)}, {"dropout": 1.5}, {"dropout": None}, {"softcap": -1.0},
        {"q": torch.zeros(2, 4, 6, 16).to_sparse()}, {"k": torch.zeros(2, 2, 20, 16, device="meta")}, {"scale": math.inf},
        {"backend": ["auto"]}, {"backend": 3}, {"mask": [[True]]},
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_and_after_what_is_right(wrong: dict[str, Any]) -> None:
    q, k, v = inputs()
    for _ in range(2):
        with pytest.raises(errors.ConfigError):
            given = {"q": q, "k": k, "v": v, **wrong}
            attend(given.pop("q"), given.pop("k"), given.pop("v"), **given)
        torch.testing.assert_close(attend(q, k, v), eager(q, k, v))


def test_settings_that_change_between_calls_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    asked: list[str] = []
    forward = type(dispatch.backend("eager")).forward
    monkeypatch.setattr(type(dispatch.backend("eager")), "forward", lambda self, call: asked.append("eager") or forward(self, call))
    for settings in ("auto", "eager", Settings(), Settings(backend="eager"), "cpu", "eager"):
        attend(q, k, v, backend=settings)
    assert asked == ["eager"] * 3
    with pytest.raises(errors.UnsupportedModelError, match="cuda_mma"):
        attend(q, k, v, backend="cuda_mma")


def test_what_was_measured_since_is_obeyed(tmp_path: Any) -> None:
    q, k, v = inputs()
    settings = Settings(tune_dir=str(tmp_path))
    assert known(q, k, v, backend=settings) is not None
    call = checked(q, k, v)
    store = dispatch.measurements(q.device, str(tmp_path))
    store.add(dispatch.kind_of(call, "forward"), {"sdpa": 1.0, "cpu": 2.0})
    prepared.forget()  # `dispatch.compare` counts what it has measured; nothing else writes figures
    assert known(q, k, v, backend=settings) is None
    assert dispatch.choose(call, settings).backend.name == "sdpa"
    torch.testing.assert_close(attend(q, k, v, backend=settings), eager(q, k, v))


def test_a_measurement_ends_what_was_prepared(tmp_path: Any) -> None:
    q, k, v = inputs()
    measuring = Settings(tune="measure", tune_dir=str(tmp_path))
    assert known(q, k, v, backend=measuring) is None  # nothing is known yet, and the whole way measures
    before = dispatch.revision()
    attend(q, k, v, backend=measuring)
    assert dispatch.revision() == before + 1
    assert dispatch.measurements(q.device, str(tmp_path)).orders
    first = dispatch.choose(checked(q, k, v), measuring).backend.name
    assert (known(q, k, v, backend=measuring) is not None) == (first == "cpu")


def test_another_number_of_threads_is_another_call_with_the_same_bits() -> None:
    q, k, v = inputs(lengths=(80, 80))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, alone = known(q, k, v), attend(q, k, v)
        torch.set_num_threads(2)
        assert known(q, k, v) is not one and torch.equal(attend(q, k, v), alone)
    finally:
        torch.set_num_threads(threads)


def test_gradients_are_there_when_they_are_wanted_and_only_then() -> None:
    q, k, v = inputs(lengths=(6, 6))
    assert attend(q, k, v).grad_fn is None
    learned = q.clone().requires_grad_()
    for _ in range(2):
        assert attend(learned, k, v).grad_fn is not None
        with torch.no_grad():
            assert attend(learned, k, v).grad_fn is None
        with torch.inference_mode():
            assert attend(learned, k, v).is_inference()
        assert attend(learned.detach(), k, v).grad_fn is None
    (found,) = torch.autograd.grad(attend(learned, k, v).square().sum(), learned)
    (expected,) = torch.autograd.grad(eager(learned, k, v).square().sum(), learned)
    torch.testing.assert_close(found, expected)


def test_gradients_of_any_layout_through_one_prepared_call() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(lengths=(9, 9)))
    out, lse = attend(q, k, v, return_lse=True)
    wanted, wanted_lse = eager(q, k, v, return_lse=True)
    dense = torch.randn(2, 9, 4, 16)
    for grad in (
        dense.transpose(1, 2),
        dense.transpose(1, 2).contiguous(),
        torch.ones(()).expand(2, 4, 9, 16),
        dense.transpose(1, 2).mT.contiguous().mT,
    ):
        found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, (q, k, v), grad, retain_graph=True))
    both = torch.autograd.grad((out.sum() + lse.sum()), (q, k), retain_graph=True)
    torch.testing.assert_close(both, torch.autograd.grad((wanted.sum() + wanted_lse.sum()), (q, k), retain_graph=True))
    only = torch.autograd.grad(lse.square().sum(), (q, k), retain_graph=True)
    torch.testing.assert_close(only, torch.autograd.grad(wanted_lse.square().sum(), (q, k)))


def test_derivatives_of_derivatives_are_refused_by_name() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(lengths=(1, 20), heads=(4, 4)))
    (grad,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(errors.UnsupportedModelError, match="derivatives of derivatives"):
        grad.sum().backward()


def test_a_change_in_place_of_what_backward_needs_is_noticed() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs())
    held = k * 1.0
    out = attend(q, held, v)
    held.data.zero_()
    out.sum().backward()  # `.data` is no change that autograd knows
    out = attend(q, held, v)
    with torch.no_grad():
        held.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_marks_of_signs_and_zeros_are_seen_in_calls_that_are_known() -> None:
    q, k, v = inputs()
    attend(q, k, v)
    torch.testing.assert_close(attend(torch._neg_view(q), k, v), attend(-q, k, v))
    zeros = torch._efficientzerotensor(k.shape)
    torch.testing.assert_close(attend(q, zeros, v), attend(q, torch.zeros_like(k), v))


def test_transforms_and_compiled_code_take_their_own_way_after_a_call_that_is_known() -> None:
    q, k, v = inputs(batch=1)
    plain = attend(q, k, v)
    mapped = torch.func.vmap(lambda q: attend(q, k, v))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(mapped[0], plain)
    grads = torch.func.grad(lambda q: attend(q, k, v).square().sum())(q)
    torch.testing.assert_close(grads, torch.func.grad(lambda q: eager(q, k, v).square().sum())(q))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), plain)
    meta = [tensor.to("meta") for tensor in (q, k, v)]
    assert attend(*meta).is_meta


@pytest.mark.parametrize("lengths", [(1, 20), (6, 6), (20, 20)])
def test_a_mode_of_fake_tensors_around_a_call_that_is_known_is_no_place_to_compute(lengths: Any) -> None:
    q, k, v = inputs(lengths=lengths)
    attend(q, k, v)
    with FakeTensorMode(), pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        attend(q, k, v)


def test_autocast_is_entered_and_left_between_calls() -> None:
    q, k, v = inputs()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(q, k, v).dtype == torch.bfloat16
        assert attend(q, k, v).dtype == torch.float32


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST", 4)
    for keys in range(20, 40):
        q, k, v = inputs(lengths=(1, keys))
        torch.testing.assert_close(attend(q, k, v), eager(q, k, v))
        assert len(prepared._plain) <= 4


def test_threads_share_what_is_prepared() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(lengths=(30, 30)))
    wanted = [attend(q, k, v), *torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(20):
            out = attend(q, k, v)
            # Layouts of the gradient take turns, and so do what is prepared for them.
            doubled = (2 * out).detach() if (turn + number) % 2 else (2 * out).detach().transpose(1, 2).contiguous().transpose(1, 2)
            found = [out, *torch.autograd.grad(out, (q, k, v), doubled)]
            if not all(map(torch.equal, found, wanted)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_default_dtype_of_the_user_changes_nothing() -> None:
    q, k, v = inputs(lengths=(1, 20))
    expected = attend(q, k, v, return_lse=True)
    prepared.forget()
    torch.set_default_dtype(torch.float64)
    try:
        found = attend(q, k, v, return_lse=True)
        again = native.decode(q.view(2, 2, 2, 16), k, v, scale=0.25)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected)) and again[0].dtype == torch.float32
    torch.testing.assert_close(again[0].view(2, 4, 1, 16), expected[0])


def test_a_record_counts_calls_that_are_known_and_says_why() -> None:
    service = Service()
    q, k, v = inputs(lengths=(1, 20))
    for _ in range(3):
        service.attend("layer", q, k, v)
    assert service.stats()["served"] == {"layer cpu decode, unmasked, float32": 3}
    assert "native kernel" in service.explain()
    other = Service(backend="eager")
    other.attend("layer", q, k, v)
    assert list(other.stats()["served"]) == ["layer eager decode, unmasked, float32"]


def test_undoing_gives_a_module_its_own_attention_back_after_calls_that_are_known() -> None:
    class Attends(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 2, 20, 8)
    module = Attends()
    own = module(x)
    wrapped = tw.fast_attention(module)
    torch.testing.assert_close([wrapped(x), wrapped(x)], [own, own])
    with tw.disabled(wrapped, "fast_attention"):
        assert torch.equal(wrapped(x), own)
    torch.testing.assert_close(wrapped(x), own)
    assert torch.equal(tw.unwrap(wrapped)(x), own)


def test_without_the_library_nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.attention.cpu import decode, prefill

    monkeypatch.setattr(decode, "native_refuses", lambda call: "not here")
    monkeypatch.setattr(prefill, "refuses", lambda call: "not here")
    q, k, v = inputs()
    assert known(q, k, v) is None
    torch.testing.assert_close(attend(q, k, v), eager(q, k, v))


def test_rows_of_one_query_without_a_key_are_zero_and_minus_infinity() -> None:
    q, k, v = inputs(lengths=(1, 20), heads=(4, 4))
    mask = TileMask.padded([20, 0], 1, 20, causal=False)
    q.requires_grad_()
    out, lse = attend(q, k, v, mask=mask, return_lse=True)
    assert type(known(q, k, v, mask=mask)).__name__ == "Few"
    assert not out[1].any() and bool((lse[1] == -math.inf).all()) and bool(lse[0].isfinite().all())
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not grad[1].any() and bool(grad.isfinite().all())


def test_what_is_not_a_number_stays_none() -> None:
    for lengths, heads in (((1, 20), (4, 4)), ((1, 5), (4, 2)), ((6, 6), (4, 2)), ((40, 40), (4, 4))):
        for learns in (False, True):
            q, k, v = inputs(lengths=lengths, heads=heads)
            k[0, 0, 0, 0] = math.nan
            out, _ = node.prepared(known(q.requires_grad_(learns), k, v), q, k, v, None)
            assert bool(out[0, 0].isnan().all()) and bool(out[1].isfinite().all())


@pytest.mark.parametrize("shape", [(20, 20), (1, 20), (2, 1, 1, 20), (2, 4, 20, 20), (1, 1, 20, 20), (20,)])
@pytest.mark.parametrize("floats", [False, True])
def test_masks_that_are_tensors_are_one_call_whatever_they_hide(shape: tuple[int, ...], floats: bool) -> None:
    q, k, v = inputs(lengths=(20, 20))
    for seed in range(3):
        seen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
        if len(shape) > 1:
            seen[..., 0, :] = False
        mask = torch.where(seen, 0.25, -math.inf) if floats else seen
        out, lse = attend(q, k, v, mask=mask, return_lse=True)
        assert type(known(q, k, v, mask=mask)).__name__ == "Many"
        torch.testing.assert_close((attend(q, k, v, mask=mask), out, lse), (out, *eager(q, k, v, mask=mask, return_lse=True)))
    learned = q.clone().requires_grad_()
    with_gradients = attend(learned, k, v, mask=mask)
    assert torch.equal(with_gradients, attend(q, k, v, mask=mask))  # as checkpointing and offloading expect
    (grad,) = torch.autograd.grad(with_gradients.square().sum(), learned)
    assert bool(grad.isfinite().all())


def test_one_query_with_a_bias_is_one_call_of_the_same_bits_in_training() -> None:
    q, k, v = inputs(lengths=(1, 40), heads=(4, 4))
    bias = torch.randn(1, 4, 1, 40).masked_fill(torch.rand(1, 4, 1, 40) < 0.3, -math.inf)
    found = attend(q, k, v, bias=bias)
    torch.testing.assert_close(found, eager(q, k, v, bias=bias))
    assert torch.equal(found, attend(q, k, v, mask=bias)) and torch.equal(found, attend(q, k, v, bias=bias, return_lse=True)[0])
    learned = q.clone().requires_grad_()
    again = attend(learned, k, v, bias=bias)
    assert torch.equal(again, found)
    wanted = torch.autograd.grad(eager(learned, k, v, bias=bias).square().sum(), learned)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), learned), wanted)
    with pytest.raises(errors.ConfigError, match="the bias is"):
        attend(q, k, v, bias=bias[..., :39])
    with pytest.raises(errors.ConfigError, match="the bias is"):
        attend(q, k, v, bias=bias > 0)


def test_masks_of_one_shape_may_have_other_strides_and_dtypes() -> None:
    q, k, v = inputs(lengths=(20, 20))
    seen = torch.rand(2, 4, 20, 20) > 0.5
    numbers = torch.randn(4, 20, 20)
    for mask in (seen, seen.transpose(2, 3), seen[:, :1].expand(2, 4, 20, 20), numbers, numbers.transpose(1, 2), numbers.bfloat16()):
        for _ in range(2):
            torch.testing.assert_close(attend(q, k, v, mask=mask), eager(q, k, v, mask=mask))


def test_masks_that_want_gradients_or_do_not_fit_take_the_whole_way() -> None:
    q, k, v = inputs(lengths=(20, 20))
    assert known(q, k, v, mask=torch.zeros(20, 20, requires_grad=True)) is None
    with pytest.raises(errors.ConfigError, match="the mask is"):
        attend(q, k, v, mask=torch.ones(20, 19).bool())


@pytest.mark.parametrize("trains", [False, True])
def test_calls_with_dropout_draw_one_number_each_before_and_after_they_are_known(trains: bool) -> None:
    tensors = [tensor.requires_grad_(trains) for tensor in inputs(lengths=(9, 9))]
    prepared.forget()

    def run(backend: str, seed: int, p: float) -> list[Tensor]:
        torch.manual_seed(seed)
        out = attend(*tensors, dropout=p, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors) if trains else ()
        return [out.detach(), *grads, torch.rand(2)]

    for seed, p in ((1, 0.3), (2, 0.3), (2, 0.5), (3, 0.0)):  # new, known, another number, none
        for found, same in zip(run("auto", seed, p), run("eager", seed, p), strict=True):
            torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)
    assert known(*tensors, dropout=0.3) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("square", [True, False])
def test_gradients_of_short_calls_with_large_scores_obey_the_law_in_halves(dtype: torch.dtype, square: bool) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        rows, size = 2 + seed % 5, 8 if seed % 2 else 3
        keys = rows if square else rows + 1 + seed
        q, k, v = torch.randn(2, 4, rows, 32) * size, torch.randn(2, 2, keys, 32), torch.randn(2, 2, keys, 32)
        assert_correct(Composed(), checked(q.to(dtype), k.to(dtype), v.to(dtype)), f"{seed} {dtype}")


def test_what_is_hidden_may_be_no_number_in_short_calls_in_halves() -> None:
    q, k, v = inputs(lengths=(6, 6), dtype=torch.bfloat16)
    v[:, :, 5] = math.nan  # seen by the last query alone
    call = checked(q, k, v, mask=TileMask.causal(1, 6, 6))
    out, lse = Composed().forward(call)
    dq, _, dv, _, _ = Composed().backward(call, out, lse, torch.ones_like(out), None)
    assert bool(dq[:, :, :5].isfinite().all()) and bool(dq[:, :, 5].isnan().all()) and bool(dv.isfinite().all())


@pytest.mark.parametrize("keys", [1, 5, 15, 16])
def test_no_number_among_few_keys_reaches_the_gradients_of_one_query(keys: int) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(lengths=(1, keys), heads=(4, 4)))
    with torch.no_grad():
        k[0, 0, 0, 0] = math.nan
    assert type(known(q, k, v)).__name__ == "Few"
    found, expected = (torch.autograd.grad(each(q, k, v).sum(), (q, k, v)) for each in (attend, eager))
    for name, one, other in zip("qkv", found, expected, strict=True):
        assert torch.equal(one.isnan().any(-1), other.isnan().any(-1)), name
        torch.testing.assert_close(one[~one.isnan()], other[~other.isnan()])
