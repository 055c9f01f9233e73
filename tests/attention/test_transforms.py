"""`attend` under torch.func: gradients and maps are those of torch's own attention, what does not exist is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import torchwrap as tw
from torchwrap.attention.attend import attend
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors

N, S, E = 3, 6, 8


def inputs(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*lead, 1, 4, S, E), torch.randn(*lead, 1, 2, S, E), torch.randn(*lead, 1, 2, S, E)


MASK = TileMask.causal(1, S, S)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, mask=MASK).square().sum()


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True).square().sum()


def near(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


TRANSFORMS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "grad": (lambda f: grad(f, (0, 1, 2)), inputs()),
    "vjp": (lambda f: lambda *given: vjp(f, *given)[1](torch.ones(())), inputs()),
    "vmap": (lambda f: vmap(f), inputs(N)),
    "vmap of some": (lambda f: vmap(f, in_dims=(0, None, None)), (inputs(N)[0], *inputs()[1:])),
    "gradients of samples": (lambda f: vmap(grad(f, (0, 1, 2))), inputs(N)),
    "gradient of a map": (lambda f: grad(lambda *given: vmap(f)(*given).sum(), (0, 1, 2)), inputs(N)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_torchs_own_attention(name: str) -> None:
    transform, given = TRANSFORMS[name]
    near(transform(ours)(*given), transform(torchs)(*given))


@pytest.mark.parametrize("name", ["grad", "vmap of some", "gradients of samples"])
def test_transforms_are_compiled_around_the_call(name: str) -> None:
    transform, given = TRANSFORMS[name]
    near(torch.compile(transform(ours), backend="aot_eager")(*given), transform(torchs)(*given))


MADE: dict[str, Callable[[], TileMask]] = {
    "of numbers": lambda: TileMask.causal(1, S, S),
    "of tensors": lambda: TileMask.padded([S], S, S),
    "of a function": lambda: TileMask.from_function(lambda b, h, q, k: k <= q, 1, S, S),
    "of a dense mask": lambda: TileMask.from_dense(torch.ones(1, 1, S, S).tril().bool()),
    "of cumulative lengths": lambda: TileMask.from_cu_seqlens(torch.tensor([0, S])),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_a_mask_may_be_made_under_a_transform(make: Callable[[], TileMask]) -> None:
    masks: list[TileMask] = []

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks.append(make())
        return attend(q, k, v, mask=masks[-1]).square().sum()

    transform, given = TRANSFORMS["gradients of samples"]
    near(transform(loss)(*given), transform(torchs)(*given))
    torch._dynamo.reset()
    near(torch.compile(transform(loss), backend="aot_eager")(*given), transform(torchs)(*given))
    assert all(torch.equal(mask.rectangle(0, (0, S), (0, S)), torch.ones(1, S, S).tril().bool()) for mask in masks)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        pytest.param(lambda n: TileMask.padded(n, S, S), torch.full((N, 1), S), id="lengths"),
        pytest.param(lambda n: TileMask.causal(1, S, S, q_offset=n), torch.zeros(N, dtype=torch.int64), id="offset"),
        pytest.param(lambda m: TileMask.from_dense(m[None]), torch.ones(N, 1, S, S, dtype=torch.bool), id="dense"),
    ],
)
def test_a_mask_of_numbers_that_are_mapped_over_is_refused_by_name(make: Callable[[Tensor], TileMask], given: Tensor) -> None:
    q, k, v = inputs()
    with pytest.raises(errors.UnsupportedModelError, match="maps over"):
        vmap(lambda part: attend(q, k, v, mask=make(part)))(given)


def test_making_a_mask_in_a_graph_that_must_not_be_broken_says_what_to_do_instead() -> None:
    q, *_ = inputs()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="make masks before the compiled function"):
        torch.compile(grad(lambda q: (TileMask.causal(1, S, S), q.sum())[1]), backend="aot_eager", fullgraph=True)(q)


def test_a_graph_that_must_not_be_broken_under_a_transform_says_what_to_do_instead() -> None:
    q, k, v = inputs()
    torch._dynamo.reset()  # it remembers where other graphs were broken
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.autograd\.grad"):
        torch.compile(grad(lambda q: attend(q, k, v).square().sum()), backend="aot_eager", fullgraph=True)(q)

    whole = torch.compile(lambda q: attend(q, k, v).square().sum(), backend="aot_eager", fullgraph=True)
    near(torch.autograd.grad(whole(q.requires_grad_()), q)[0], grad(lambda q: attend(q, k, v).square().sum())(q.detach()))


def test_jacobians_are_those_of_torchs_own_attention() -> None:
    q, k, v = inputs()
    near(
        jacrev(lambda q: attend(q, k, v)[0, 0])(q),
        jacrev(lambda q: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))[0, 0])(q),
    )


def test_sinks_and_biases_have_gradients_too() -> None:
    q, k, v = inputs()
    sinks, bias = torch.randn(4), torch.randn(1, 4, S, S)
    found = grad(lambda *given: attend(q, k, v, sinks=given[0], bias=given[1]).square().sum(), (0, 1))(sinks, bias)
    leaves = sinks.requires_grad_(), bias.requires_grad_()
    near(found, torch.autograd.grad(attend(q, k, v, sinks=sinks, bias=bias).square().sum(), leaves))


def test_lse_under_a_map() -> None:
    q, k, v = inputs(N)
    near(vmap(lambda *given: attend(*given, return_lse=True)[1])(q, k, v), attend(q[:, 0], k[:, 0], v[:, 0], return_lse=True)[1][:, None])


def test_masks_that_are_mapped_over_hide_what_they_should() -> None:
    q, k, v = inputs(N)
    masks = torch.rand(N, 1, 1, S, S) < 0.7
    masks[:, ..., 0] = True
    found = vmap(lambda q, k, v, mask: attend(q, k, v, mask=mask))(q, k, v, masks)
    near(found, torch.stack([attend(q[i], k[i], v[i], mask=masks[i]) for i in range(N)]))


@pytest.mark.parametrize("transform", [lambda f: lambda q: jvp(f, (q,), (q,)), hessian, lambda f: grad(lambda q: grad(f)(q).sum())])
def test_what_does_not_exist_is_refused_by_name(transform: Any) -> None:
    q, k, v = inputs()
    with pytest.raises(errors.UnsupportedModelError, match="derivatives"):
        transform(lambda q: attend(q, k, v).square().sum())(q)


FORWARD: dict[str, Callable[[Any, Tensor], Any]] = {
    "linearize": lambda f, q: linearize(f, q)[1](q),
    "recorded": lambda f, q: make_fx(lambda q: jvp(f, (q,), (q,)))(q),
    "compiled around": lambda f, q: torch.compile(lambda q: jvp(f, (q,), (q,)), backend="eager")(q),
    "compiled": lambda f, q: jvp(torch.compile(f, backend="eager"), (q,), (q,)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_in_a_graph_is_refused_by_name(name: str) -> None:
    q, k, v = inputs()
    torch._dynamo.reset()
    with pytest.raises(errors.UnsupportedModelError, match="forward-mode"):
        FORWARD[name](lambda q: attend(q, k, v).square().sum(), q)


@pytest.mark.parametrize("trains", [False, True])
def test_dual_numbers_are_refused_by_name(trains: bool) -> None:
    q = inputs()[0].requires_grad_(trains)
    with forward_ad.dual_level(), pytest.raises(errors.UnsupportedModelError, match="forward-mode"):
        attend(forward_ad.make_dual(q, q.detach()), q, q)


def test_a_wrapped_model_has_gradients_of_samples() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False)
    weights, x = {name: value.detach() for name, value in model.named_parameters()}, torch.randn(N, S, 8)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],)).square().sum()

    expected = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    tw.fast_attention(model)
    near(vmap(grad(loss), in_dims=(None, 0))(weights, x), expected)
