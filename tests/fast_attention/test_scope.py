"""The block without a model: every call of torch's function by one thread, and nothing left behind."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torchwrap as tw

B, T, E = 2, 6, 8


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def served(handle: Any) -> list[str]:
    return [key.split()[1] for key in handle.stats()["served"]]


def test_calls_in_the_block_are_served_and_no_others() -> None:
    q, plain = x(B, 4, T, E), F.scaled_dot_product_attention
    expected = plain(q, q, q, is_causal=True)
    with tw.fast_attention.scope(None, backend="eager") as handle:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)
        torch.testing.assert_close(plain(q, q, q, is_causal=True), expected)  # under a name that was taken before
        assert torch.nn.functional.scaled_dot_product_attention is plain
    F.scaled_dot_product_attention(q, q, q)
    assert sum(handle.stats()["served"].values()) == 2 and served(handle) == ["eager"]


def test_an_error_in_the_block_ends_it() -> None:
    q = x(B, 4, T, E)
    with pytest.raises(ValueError, match="the user's"), tw.fast_attention.scope() as handle:
        raise ValueError("the user's")
    F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(tw.UnsupportedModelError, match="cuda_mma"), tw.fast_attention.scope(backend="cuda_mma"):
        F.scaled_dot_product_attention(q, q, q)
    F.scaled_dot_product_attention(q, q, q)
    assert not handle.stats()["served"]


def test_the_innermost_block_serves_also_by_torchs_own_function() -> None:
    q = x(B, 4, T, E)
    with tw.fast_attention.scope(backend="eager") as outer:
        F.scaled_dot_product_attention(q, q, q)
        with tw.fast_attention.scope(backend="sdpa") as inner:  # which calls the function itself
            F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q)
    assert sum(outer.stats()["served"].values()) == 2 and served(inner) == ["sdpa"]


def test_other_threads_go_on_as_they_were() -> None:
    q, inside, done = x(B, 4, T, E), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        F.scaled_dot_product_attention(q, q, q)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tw.fast_attention.scope() as handle:
        inside.set()
        assert done.wait(10)
    thread.join()
    assert not handle.stats()["served"]


@pytest.mark.parametrize("training", [False, True])
def test_torchs_own_modules_are_served_in_it(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False)
    model.train(training)
    padding = torch.tensor([[False] * T, [False] * (T - 2) + [True] * 2])
    with torch.set_grad_enabled(training):
        expected = model(x(B, T, 16), src_key_padding_mask=padding)
        with tw.fast_attention.scope() as handle:
            found = model(x(B, T, 16), src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)
    assert sum(handle.stats()["served"].values()) == 2


def test_gradients_flow_through_it() -> None:
    q, twin = x(B, 4, T, E).requires_grad_(), x(B, 4, T, E).requires_grad_()
    F.scaled_dot_product_attention(twin, twin, twin).square().sum().backward()
    with tw.fast_attention.scope():
        loss = F.scaled_dot_product_attention(q, q, q).square().sum()
    loss.backward()
    torch.testing.assert_close(q.grad, twin.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["backward", "grad"])
def test_checkpointed_code_is_served_when_it_is_computed_again(how: str) -> None:
    q = x(B, 4, T, E).requires_grad_()
    with tw.fast_attention.scope() as handle:
        loss = checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q).square(), q, use_reentrant=False).sum()
        loss.backward() if how == "backward" else torch.autograd.grad(loss, q)
    assert sum(handle.stats()["served"].values()) == 2


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "heads": ((x(B, 4, T, E), x(B, 2, T, E), x(B, 2, T, E)), {}),
    "widths": ((x(B, 4, T, E), x(B, 4, T, E + 1), x(B, 4, T, E)), {}),
    "mask": ((x(B, 4, T, E), x(B, 4, T, E), x(B, 4, T, E)), {"attn_mask": torch.zeros(3, 5)}),
    "dtypes": ((x(B, 4, T, E), x(B, 4, T, E).half(), x(B, 4, T, E)), {}),
    "batches of as many places": ((x(3, 2, 4, T, E), x(2, 3, 4, T, E), x(2, 3, 4, T, E)), {}),
    "batches of keys and values": ((x(3, 2, 4, T, E), x(3, 2, 4, T, E), x(2, 3, 4, T, E)), {}),
    "mask with a batch": ((x(4, T, E), x(4, T, E), x(4, T, E)), {"attn_mask": torch.ones(1, 1, T, T).bool()}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_torch_refuses_is_torchs_error(what: str) -> None:
    args, options = WRONG[what]
    with pytest.raises(RuntimeError) as expected:
        F.scaled_dot_product_attention(*args, **options)
    with pytest.raises(RuntimeError) as found, tw.fast_attention.scope(fallback="error"):
        F.scaled_dot_product_attention(*args, **options)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((x(B, 1, T, E), x(B, 4, T, E), x(B, 4, T, E)), {}),
        ((x(B, 4, T, E), x(T, E), x(T, E)), {}),
        ((x(B, 4, T, E), x(B, 4, T, E), x(B, 4, T, E)), {"attn_mask": x(T, T), "is_causal": True}),
        ((x(T, E), x(T, E), x(T, E)), {}),
    ],
    ids=["heads", "dimensions", "mask and causal", "no heads"],
)
def test_what_torch_alone_takes_is_its_own_and_recorded(args: Any, options: Any) -> None:
    with pytest.warns(tw.TorchwrapWarning, match="the model's own"), tw.fast_attention.scope() as handle:
        found = F.scaled_dot_product_attention(*args, **options)
    assert torch.equal(found, F.scaled_dot_product_attention(*args, **options))
    assert sum(handle.stats()["left"].values()) == 1 and not handle.stats()["served"]


@pytest.mark.parametrize("mask", [None, (T,), (3, 1, T, T), (2, 1, 1, 1, T)], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [((1,), (3,)), ((3,), (1,)), ((3, 1), (1, 3)), ((1, 1), (2, 3)), ((2, 3), (3,)), ((2, 3), (2, 3))], ids=str
)
def test_leading_dimensions_are_broadcast_as_torch_does(queries: tuple[int, ...], keys: tuple[int, ...], mask: Any) -> None:
    q, k, v = (x(*lead, 4, T, E, seed=seed) for seed, lead in enumerate((queries, keys, keys)))
    added = None if mask is None else x(*mask)
    try:
        expected: Any = F.scaled_dot_product_attention(q, k, v, added)
    except RuntimeError as error:
        expected = error
    with warnings.catch_warnings(), tw.fast_attention.scope():
        warnings.simplefilter("ignore", tw.TorchwrapWarning)
        if isinstance(expected, Exception):
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(q, k, v, added)
        else:
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, added), expected)


def test_the_functional_form_is_at_hand() -> None:
    q = x(B, 4, T, E)
    out, lse = tw.fast_attention.attend(q, q, q, return_lse=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
    assert lse.shape == (B, 4, T)


def test_with_a_model_it_is_applied() -> None:
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    with tw.fast_attention.scope(model, fallback="silent") as found:
        assert found is model and tw.wrappers_of(model)["fast_attention"] == tw.FastAttention(fallback="silent")
        assert tw.fast_attention.explain(model) == "No call yet."
    assert not tw.wrappers_of(model)


@pytest.mark.parametrize("options", [{"cache": "keep"}, {"cache": "cooperative", "kv_host": 0.5}, {"backnd": "eager"}])
def test_settings_without_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(tw.ConfigError):
        tw.fast_attention.scope(None, **options)


@pytest.mark.slow
def test_code_compiled_before_is_compiled_once_more_for_the_block() -> None:
    torch._dynamo.reset()
    q = x(B, 4, T, E)

    @torch.compile(backend="eager")
    def attention(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    expected = attention(q)
    with tw.fast_attention.scope(backend="eager"):
        inside = attention(q)
    assert torch.equal(inside, tw.attention.attend.attend(q, q, q, backend="eager"))
    assert torch.equal(attention(q), expected)
    torch._dynamo.reset()
