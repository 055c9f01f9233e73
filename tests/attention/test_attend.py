"""`attend`: gradients against finite differences, one graph under torch.compile, and the properties attention has whatever computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import MASKS, make
from torchwrap.attention.attend import attend
from torchwrap.attention.contract import Call, checked
from torchwrap.attention.cpu import compose, parts, tiled
from torchwrap.attention.cpu.backend import Composed
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.operator import mask_of, taken_apart
from torchwrap.attention.reference import visible
from torchwrap.core import errors


def inputs(batch: int, heads: tuple[int, int], sq: int, sk: int, width: int = 8, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads[0], sq, width, **options),
        torch.randn(batch, heads[1], sk, width, **options),
        torch.randn(batch, heads[1], sk, width, **options),
    )


def near(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"sinks": True}, {"bias": True}, {"return_lse": True}, {"softcap": 1.5, "sinks": True, "bias": True}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("mask", ["none", "causal", "window 7", "padded left", "dense"])
def test_gradients_are_those_of_finite_differences(mask: str, options: dict[str, Any]) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(2, (4, 2), 9, 12, width=3, dtype=torch.float64))
    made = dict(options)
    leaves: list[Tensor] = [q, k, v]
    for name, shape in (("sinks", (4,)), ("bias", (4, 1, 12))):
        if name in options:
            made[name] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            leaves.append(made[name])
    tile = MASKS[mask](2, 9, 12)

    def function(*given: Tensor) -> Any:
        names = dict(zip([name for name in ("sinks", "bias") if name in options], given[3:], strict=True))
        result = attend(*given[:3], mask=tile, **{**made, **names})
        # Rows that see nothing have lse -inf, which has no differences.
        return (result[0], torch.where(result[1] == -math.inf, 0.0, result[1])) if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "eager"])
def test_a_row_hidden_by_the_least_number_is_the_mean_as_in_torch(backend: str) -> None:
    q, k, v = inputs(1, (4, 2), 9, 40)
    mask = torch.full((9, 40), torch.finfo(q.dtype).min)
    near(attend(q, k, v, mask=mask, backend=backend), v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 9, -1))


@pytest.mark.parametrize("queries", [1, 9, 100])
def test_a_sink_that_a_row_sees_alone_has_the_whole_gradient_of_lse(queries: int) -> None:
    q, k, v = inputs(2, (4, 2), queries, 12)
    sinks, mask = torch.randn(4, requires_grad=True), TileMask.padded([0, 12], queries, 12, causal=False)
    _, lse = attend(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    lse[0].sum().backward()
    assert sinks.grad is not None
    near(sinks.grad, torch.full((4,), float(queries)))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = inputs(1, (4, 2), 5, 5)
    k.requires_grad_()
    attend(q, k, v, mask=TileMask.causal(1, 5, 5)).sum().backward()
    assert k.grad is not None and q.grad is None


def test_without_gradients_no_node_is_made() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, (4, 2), 5, 5))
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad
    assert attend(q, k, v).requires_grad


def test_a_change_in_place_before_backward_is_an_error() -> None:
    q, k, v = inputs(1, (2, 2), 5, 5)
    q.requires_grad_()
    out = attend(q, k, v)
    k.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_second_derivatives_are_refused(backend: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, (2, 2), 5, 5))
    loss = attend(q, k, v, backend=backend).square().sum()
    (first,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(errors.UnsupportedModelError, match="derivatives of derivatives"):
        (loss + first.square().sum()).backward()


def test_partial_gradients_sum_to_the_whole() -> None:
    q, k, v = inputs(1, (4, 2), 40, 100, dtype=torch.float64)
    whole = checked(q, k, v, mask=TileMask.causal(1, 40, 100))
    out, lse = compose.forward(whole)
    grad = torch.randn_like(out)
    expected = compose.backward(whole, out, lse, grad)
    assert whole.mask is not None
    halves = [checked(q, k[:, :, a:b], v[:, :, a:b], mask=whole.mask.sub(columns=(a, b))) for a, b in ((0, 37), (37, 100))]
    shares = [compose.backward(half, out, lse, grad) for half in halves]
    near(shares[0][0] + shares[1][0], expected[0])
    near(torch.cat([shares[0][1], shares[1][1]], 2), expected[1])
    near(torch.cat([shares[0][2], shares[1][2]], 2), expected[2])


@pytest.mark.parametrize("name", [name for name in MASKS if name != "none"])
def test_no_result_depends_on_the_size_of_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (16, 33, 128):
        monkeypatch.setattr(parts, "TILE", size)
        monkeypatch.setattr(parts, "GENERIC", (size, size))
        monkeypatch.setattr(parts, "WIDEST", size * 3)
        monkeypatch.setattr(parts, "SMALL", 0)
        monkeypatch.setattr(tiled, "WIDTH", size)
        call, _ = make(3, mask=name, extra="plain", q_length=127, past=0, width=16, batch=3)  # another mask each time: plans are kept
        out, lse = compose.forward(call)
        results.append((out, lse, *compose.backward(call, out, lse, torch.ones_like(out))[:3], *tiled.forward(call)))
    for other in results[1:]:
        near(other, results[0])


def test_packed_sequences_are_separate_sequences() -> None:
    lengths = (5, 40, 1, 23)
    q, k, v = inputs(1, (4, 2), sum(lengths), sum(lengths))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = attend(q, k, v, mask=TileMask.from_cu_seqlens(ends))
    for first, end in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        alone = attend(*(tensor[:, :, first:end] for tensor in (q, k, v)), mask=TileMask.causal(1, end - first, end - first))
        near(packed[:, :, first:end], alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    lengths, longest = (300, 17, 1), 300
    q, k, v = inputs(3, (4, 2), longest, longest)
    padded = attend(q, k, v, mask=TileMask.padded(list(lengths), longest, longest, side=side))
    for row, length in enumerate(lengths):
        real = slice(longest - length, longest) if side == "left" else slice(0, length)
        alone = attend(*(tensor[row : row + 1, :, real] for tensor in (q, k, v)), mask=TileMask.causal(1, length, length))
        near(padded[row : row + 1, :, real], alone)


def test_rows_of_padding_give_zero_and_take_no_gradient() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(2, (4, 2), 200, 200))
    out, lse = attend(q, k, v, mask=TileMask.padded([200, 50], 200, 200), return_lse=True)
    assert not out[1, :, :150].any() and bool((lse[1, :, :150] == -math.inf).all())
    out.sum().backward()
    assert q.grad is not None and k.grad is not None
    assert not q.grad[1, :, :150].any() and not k.grad[1, :, :150].any() and q.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_rows_that_a_bias_hides_take_no_gradient_of_lse(backend: str) -> None:
    q, k, v, bias = (torch.randn(1, 2, 20, width, requires_grad=True) for width in (16, 16, 16, 20))
    hidden = torch.zeros(20, 20).index_fill_(0, torch.tensor([3]), -math.inf)
    for given in ({"mask": hidden}, {"bias": bias + hidden} if backend != "sdpa" else {"bias": hidden}):
        out, lse = attend(q, k, v, backend=backend, return_lse=True, **given)
        wanted = (q, k, v, bias) if given.get("bias", hidden) is not hidden else (q, k, v)
        grads = torch.autograd.grad((out, lse), wanted, (torch.ones_like(out), torch.ones_like(lse)))
        assert all(bool(grad.isfinite().all()) for grad in grads) and not grads[0][:, :, 3].any()


def test_a_window_as_long_as_the_keys_is_causal() -> None:
    q, k, v = inputs(1, (4, 2), 130, 130)
    near(attend(q, k, v, mask=TileMask.window(1, 130, 130, 130)), attend(q, k, v, mask=TileMask.causal(1, 130, 130)))


def test_keys_can_be_permuted_where_nothing_is_masked() -> None:
    q, k, v = inputs(1, (4, 2), 20, 130)
    order = torch.randperm(130)
    near(attend(q, k, v, return_lse=True), attend(q, k[:, :, order], v[:, :, order], return_lse=True))


def test_batch_rows_and_heads_can_be_permuted() -> None:
    q, k, v = inputs(3, (4, 2), 20, 30)
    out = attend(q, k, v, mask=TileMask.causal(1, 20, 30))
    near(attend(q.flip(0), k.flip(0), v.flip(0), mask=TileMask.causal(1, 20, 30)), out.flip(0))
    near(attend(q.flip(1), k.flip(1), v.flip(1), mask=TileMask.causal(1, 20, 30)), out.flip(1))


def test_a_constant_added_to_all_scores_moves_lse_alone() -> None:
    q, k, v = inputs(1, (4, 2), 20, 30)
    out, lse = attend(q, k, v, return_lse=True)
    moved, moved_lse = attend(q, k, v, bias=torch.full((1,), 3.0), return_lse=True)
    near(moved, out)
    near(moved_lse, lse + 3.0)


def test_dropout_draws_from_the_default_generator_and_scales() -> None:
    q, k, _ = inputs(1, (2, 2), 64, 256)
    ones = torch.ones(1, 2, 256, 8)
    torch.manual_seed(1)
    first = attend(q, k, ones, dropout=0.25)
    torch.manual_seed(1)
    assert torch.equal(attend(q, k, ones, dropout=0.25), first)
    assert not torch.equal(attend(q, k, ones, dropout=0.25), first)
    assert abs(float(first.mean()) - 1.0) < 0.05


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_autocast_casts_the_inputs_and_nothing_else(options: dict[str, Any]) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, (4, 2), 20, 30))
    expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_lse=True, **options)
    grads = torch.autograd.grad(expected[0].sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k.bfloat16(), v, return_lse=True, **options)
        again = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert all(torch.equal(one, two) for one, two in zip(again, grads, strict=True))


def test_a_float_mask_and_a_bool_mask_mean_the_same() -> None:
    q, k, v = inputs(2, (4, 2), 20, 30)
    seen = torch.rand(2, 1, 20, 30) < 0.5
    near(attend(q, k, v, mask=seen), attend(q, k, v, mask=torch.where(seen, 0.0, -math.inf)))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_taken_apart_is_put_together_again(name: str) -> None:
    call, _ = make(5, mask=name, extra="plain")
    again = mask_of(*taken_apart(call.mask))
    assert (again is None) == (call.mask is None)
    if again is not None:
        one, two = visible(call), visible(Call(q=call.q, k=call.k, v=call.v, scale=1.0, mask=again))
        assert one is not None and two is not None and torch.equal(one, two)


def test_a_mask_at_a_position_that_is_a_tensor_is_put_together_again() -> None:
    mask = TileMask.causal(1, 4, 9, q_offset=torch.tensor(3))
    again = mask_of(*taken_apart(mask))
    assert again is not None and torch.equal(again.rectangle(0, (0, 4), (0, 9)), mask.rectangle(0, (0, 4), (0, 9)))


@pytest.mark.parametrize(("name", "extra"), [("none", "plain"), ("padded window", "sinks"), ("function", "bias with gradient")])
def test_compiled_code_has_one_graph_and_the_same_gradients(name: str, extra: str) -> None:
    call, _ = make(11, mask=name, extra=extra, q_length=17, batch=3)
    leaves = [tensor.detach().requires_grad_() for tensor in (call.q, call.k, call.v)]
    options = {"softcap": call.softcap, "sinks": call.sinks, "bias": call.bias}

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q * 2, k, v + 1, mask=call.mask, return_lse=True, **options)

    torch._dynamo.reset()
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = function(*leaves), compiled(*leaves)
    near(found, expected)
    live = expected[1] != -math.inf
    grads = [torch.autograd.grad(out.sum() + lse[live].sum(), leaves) for out, lse in (expected, found)]
    near(grads[1], grads[0])


@pytest.mark.parametrize("shape", [(12, 12), (2, 4, 12, 12), (1, 1, 1, 12)], ids=str)
def test_compiled_code_takes_masks_of_booleans_and_never_their_numbers(shape: tuple[int, ...]) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(2, (4, 2), 12, 12)]

    def function(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return attend(q, k, v, mask=seen & True)

    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        mask = torch.rand(shape) < 0.5
        expected, found = function(*leaves, mask), compiled(*leaves, mask)
        near(found, expected)
        near(*(torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)))


def test_compiled_code_takes_a_mask_of_booleans_beside_a_bias_and_with_rows() -> None:
    q, k, v = inputs(2, (4, 2), 12, 12)
    mask, bias = torch.rand(12, 12) < 0.5, torch.randn(4, 1, 12)

    def function(mask: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, mask=mask, bias=bias, need_rows=[0, -1])[1], attend(q, k, v, mask=mask, bias=bias)

    torch._dynamo.reset()
    near(torch.compile(function, fullgraph=True, backend="aot_eager")(mask), function(mask))


def test_compiled_code_has_the_gradients_of_the_definition_too() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, (4, 2), 5, 5))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attend(q, k, v, backend="eager"), fullgraph=True, backend="aot_eager")
    near(torch.autograd.grad(compiled(q).square().sum(), (q, k, v)), torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_an_infinite_sink_is_no_number_as_in_the_softmax(backend: str, queries: int) -> None:
    q, k, v = inputs(1, (2, 2), queries, 12)
    sinks = torch.tensor([math.inf, -math.inf], requires_grad=True)
    out, lse = attend(q, k, v, sinks=sinks, backend=backend, return_lse=True)
    assert out[:, 0].isnan().all() and lse[:, 0].isnan().all()
    near((out[:, 1], lse[:, 1]), tuple(found[:, 1] for found in attend(q, k, v, return_lse=True)))
    out.sum().backward()
    assert sinks.grad is not None and bool(sinks.grad[0].isnan()) and sinks.grad[1] == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_the_bias_of_compiled_code_has_its_gradient_where_it_is_wanted(wanted: bool) -> None:
    q, k, v = (tensor.requires_grad_(not wanted) for tensor in inputs(1, (4, 2), 5, 5))
    bias = torch.randn(1, 4, 5, 5, requires_grad=wanted)
    leaf = bias if wanted else q
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, bias: attend(q, k, v, bias=bias, backend="auto" if wanted else "sdpa"), backend="aot_eager")
    expected, found = (torch.autograd.grad(way(q, bias).square().sum(), leaf) for way in (lambda q, b: attend(q, k, v, bias=b), compiled))
    near(found, expected)


def test_the_operator_obeys_the_rules_of_operators() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(1, (2, 1), 5, 7))
    mask = taken_apart(TileMask.causal(1, 5, 7))
    arguments = (q, k, v, torch.zeros(2, requires_grad=True), None, None, *mask, 0.3, None, 0.0, False, "cpu")
    torch.library.opcheck(torch.ops.torchwrap.attend, arguments)


def test_the_output_lies_in_memory_as_the_queries_do() -> None:
    """Models reshape it to (B, Sq, Hq * D) at once, which is then free."""
    q = torch.randn(2, 64, 4, 16).transpose(1, 2)
    k = torch.randn(2, 2, 64, 16)
    for mask in (None, TileMask.causal(1, 64, 64), TileMask.window(1, 64, 64, 9), TileMask.padded([64, 7], 64, 64)):
        out, _ = Composed().forward(checked(q, k, k, mask=mask))
        assert out.transpose(1, 2).is_contiguous()


def test_tensors_without_numbers_have_results_without_numbers() -> None:
    q = torch.empty(2, 4, 6, 8, device="meta")
    out, lse = attend(q, q[:, :2], q[:, :2], return_lse=True)
    assert out.device.type == lse.device.type == "meta" and out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("which", range(3))
def test_what_is_no_tensor_is_refused_by_name(which: int, autocast: bool) -> None:
    given: list[Any] = list(inputs(1, (2, 2), 3, 3))
    given[which] = given[which].numpy()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(errors.ConfigError, match=f"{'qkv'[which]} is a ndarray"):
        attend(*given)
