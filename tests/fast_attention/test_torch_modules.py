"""fast_attention on torch's own modules and on modules of the user's that call torch's function."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

import torchwrap as tw
from torchwrap.attention.service import Service

B, T, S, E = 2, 7, 5, 16


def multihead(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, 4, batch_first=True, **options)
    nn.init.normal_(module.in_proj_bias if module.in_proj_bias is not None else module.out_proj.weight, std=0.3)
    return module.eval()


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


PADDING = torch.zeros(B, T, dtype=torch.bool)
PADDING[0, 5:] = True
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
BANDS = torch.rand(T, T, generator=torch.Generator().manual_seed(2)) < 0.3
BANDS.fill_diagonal_(False)
HEADS = (torch.rand(B * 4, T, T, generator=torch.Generator().manual_seed(2)) < 0.3) & ~torch.eye(T, dtype=torch.bool)

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"key_padding_mask": PADDING},
    "padding-added": {"key_padding_mask": torch.zeros(B, T).masked_fill(PADDING, float("-inf"))},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal-unsaid": {"attn_mask": CAUSAL},
    "causal-added": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T), "is_causal": True},
    "causal-padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    "bands": {"attn_mask": BANDS},
    "bands-padding": {"attn_mask": BANDS, "key_padding_mask": PADDING},
    "added": {"attn_mask": x(T, T)},
    "heads": {"attn_mask": HEADS},
    "heads-added": {"attn_mask": x(B * 4, T, T), "key_padding_mask": PADDING.float()},
}


@pytest.mark.parametrize("how", CALLS)
def test_self_attention_with_every_kind_of_mask(how: str) -> None:
    module, inputs = multihead(), x(B, T, E)
    wrapped = tw.fast_attention(copy.deepcopy(module))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: mask dtypes that differ
        expected, _ = module(inputs, inputs, inputs, need_weights=False, **CALLS[how])
        got, weights = wrapped(inputs, inputs, inputs, need_weights=False, **CALLS[how])
    assert weights is None
    close(got, expected)
    assert sum(tw.handle_of(wrapped, "fast_attention").stats()["served"].values()) == 1


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=["cross", "no-bias", "widths"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(options: dict[str, Any], batch_first: bool) -> None:
    module = multihead(**options)
    module.batch_first = batch_first
    query, key, value = x(B, T, E), x(B, S, options.get("kdim", E), seed=2), x(B, S, options.get("vdim", E), seed=3)
    if not batch_first:
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    wrapped = tw.fast_attention(copy.deepcopy(module))
    with torch.no_grad():
        close(wrapped(query, key, value, need_weights=False)[0], module(query, key, value, need_weights=False)[0])


def test_unbatched_inputs() -> None:
    module, inputs = multihead(), x(T, E)
    wrapped = tw.fast_attention(copy.deepcopy(module))
    expected = module(inputs, inputs, inputs, need_weights=False)[0]
    got = wrapped(inputs, inputs, inputs, need_weights=False)[0]
    assert got.shape == (T, E)
    close(got, expected)


def test_gradients_of_everything() -> None:
    gradients = []
    for wrap in (True, False):
        module, inputs, mask = multihead(), x(B, T, E).requires_grad_(), x(T, T).requires_grad_()
        if wrap:
            tw.fast_attention(module)
        module(inputs, inputs, inputs, need_weights=False, attn_mask=mask)[0].square().sum().backward()
        gradients.append([inputs.grad, mask.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"need_weights": True}, {}], ids=["asked", "by-default"])
def test_a_call_for_weights_is_torchs_own_and_says_so_once(options: dict[str, Any]) -> None:
    module, inputs = multihead(), x(B, T, E)
    wrapped = tw.fast_attention(copy.deepcopy(module))
    with pytest.warns(tw.TorchwrapWarning, match="need_weights=False"):
        got = wrapped(inputs, inputs, inputs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(inputs, inputs, inputs, **options)
    for ours, theirs in zip(got, module(inputs, inputs, inputs, **options), strict=True):
        assert torch.equal(ours, theirs)
    assert "returns the weights" in tw.handle_of(wrapped, "fast_attention").explain()


@pytest.mark.parametrize("fallback", ["error", "silent"])
def test_a_call_for_weights_may_be_an_error_or_silent(fallback: str) -> None:
    module, inputs = tw.fast_attention(multihead(), fallback=fallback), x(B, T, E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if fallback == "silent":
            assert module(inputs, inputs, inputs)[1] is not None
        else:
            with pytest.raises(tw.UnsupportedModelError, match="need_weights"):
                module(inputs, inputs, inputs)


def test_a_hint_of_causality_without_a_mask_is_torchs_error() -> None:
    inputs = x(B, T, E)
    module = tw.fast_attention(nn.MultiheadAttention(E, 4, batch_first=True))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        module(inputs, inputs, inputs, is_causal=True, need_weights=False)


WRONG: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "width": ((B, T, E + 1), (B, S, E), (B, S, E), {}),
    "width of keys": ((B, T, E), (B, S, 8), (B, S, E), {}),
    "lengths of keys and values": ((B, T, E), (B, S, E), (B, S + 1, E), {}),
    "batch": ((B, T, E), (B + 1, S, E), (B + 1, S, E), {}),
    "batch of one": ((B, T, E), (1, S, E), (1, S, E), {}),
    "dimensions": ((B, T, E), (S, E), (S, E), {}),
    "four dimensions": ((1, B, T, E), (1, B, S, E), (1, B, S, E), {}),
    "mask": ((B, T, E), (B, S, E), (B, S, E), {"attn_mask": torch.zeros(1, S)}),
    "mask of heads": ((B, T, E), (B, S, E), (B, S, E), {"attn_mask": torch.zeros(4, T, S)}),
    "mask of integers": ((B, T, E), (B, S, E), (B, S, E), {"attn_mask": torch.zeros(T, S, dtype=torch.long)}),
    "padding": ((B, T, E), (B, S, E), (B, S, E), {"key_padding_mask": torch.zeros(B, T, dtype=torch.bool)}),
    "padding of one row": ((B, T, E), (B, S, E), (B, S, E), {"key_padding_mask": torch.zeros(1, S, dtype=torch.bool)}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_torchs_error(what: str) -> None:
    *shapes, options = WRONG[what]
    given = [x(*shape) for shape in shapes]  # type: ignore[arg-type]
    with pytest.raises(Exception) as expected:
        multihead()(*given, **options, need_weights=False)
    with pytest.raises(type(expected.value)) as found:
        tw.fast_attention(multihead())(*given, **options, need_weights=False)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_the_modules_own_are_torchs(options: dict[str, Any]) -> None:
    module, inputs = multihead(**options), x(B, T, E)
    wrapped = tw.fast_attention(copy.deepcopy(module), fallback="silent")
    assert torch.equal(*(each(inputs, inputs, inputs, need_weights=False)[0] for each in (wrapped, module)))
    assert tw.handle_of(wrapped, "fast_attention").stats()["left"]


# Layers around it, whose native path must not be taken


def encoder(norm_first: bool = False, nested: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, norm_first=norm_first, activation="gelu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E), enable_nested_tensor=nested).eval()


STACKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(T)},
    "causal-bool-padding": {"mask": CAUSAL, "src_key_padding_mask": PADDING},
    "bands": {"mask": BANDS, "is_causal": False},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("how", STACKS)
def test_encoders_in_inference_go_through_attention_of_ours(how: str, norm_first: bool) -> None:
    model, twin, inputs = tw.fast_attention(encoder(norm_first)), encoder(norm_first), x(B, T, E)
    enabled = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected, got = twin(inputs, **STACKS[how]), model(inputs, **STACKS[how])
    seen = ~STACKS[how].get("src_key_padding_mask", torch.zeros(B, T, dtype=torch.bool))
    close(got[seen], expected[seen])
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 2
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    tw.unwrap(model)
    with torch.no_grad():
        assert torch.equal(model(inputs, **STACKS[how]), expected)


def test_one_encoder_layer_alone() -> None:
    model, inputs = encoder().layers[0], x(B, T, E)
    with torch.no_grad():
        expected = model(inputs, src_key_padding_mask=PADDING)
        got = tw.fast_attention(model)(inputs, src_key_padding_mask=PADDING)
    close(got[~PADDING], expected[~PADDING])


def test_whole_transformer_with_a_decoder() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, 4, 2, 2, 32, batch_first=True).eval()
    given = dict(src=x(B, S, E), tgt=x(B, T, E), tgt_mask=nn.Transformer.generate_square_subsequent_mask(T), tgt_is_causal=True)
    with torch.no_grad():
        expected = model(**given)
        tw.fast_attention(model)
        close(model(**given), expected)
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 2 + 2 * 2


def test_native_path_of_other_models_stays_on_in_other_threads() -> None:
    """The wrapped model runs while another thread checks the switch and the native path of a plain one."""
    model, plain, inputs = tw.fast_attention(encoder()), encoder(), x(B, T, E)
    with torch.no_grad():
        expected = plain(inputs)
    stop, seen = threading.Event(), []

    def watch() -> None:
        with torch.no_grad():
            while not stop.is_set():
                seen.append(torch.backends.mha.get_fastpath_enabled() and torch.equal(plain(inputs), expected))

    thread = threading.Thread(target=watch)
    thread.start()
    with torch.no_grad():
        for _ in range(20):
            model(inputs)
    stop.set()
    thread.join()
    assert seen and all(seen)


def test_a_subclass_with_a_forward_of_its_own_is_not_touched() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    with pytest.raises(tw.UnsupportedModelError, match="no attention"):
        tw.fast_attention(Own(E, 4))


# Modules that call torch's function themselves


class Attention(nn.Module):
    """As in many small models: one projection, heads, torch's function."""

    def __init__(self, causal: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.causal, self.groups = causal, groups
        self.q, self.kv, self.out = nn.Linear(E, E), nn.Linear(E, 2 * E // groups), nn.Linear(E, E)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 4 // self.groups, -1)).permute(2, 0, 3, 1, 4)
        causal = self.causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.groups > 1)
        return self.out(out.transpose(1, 2).flatten(2))


def own(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(**options), nn.GELU(), Attention(**options)).eval()


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"groups": 2}], ids=["causal", "full", "groups"])
def test_modules_that_call_the_function_are_found(options: dict[str, Any]) -> None:
    model, inputs = own(**options), x(B, T, E)
    expected = model(inputs)
    tw.fast_attention(model)
    close(model(inputs), expected)
    model(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(tw.handle_of(model, "fast_attention").stats()["served"]) == {
        f"{name} cpu prefill, {'causal' if options.get('causal', True) else 'unmasked'}, float32" for name in "02"
    }


class Mixed(Attention):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q.float(), k, v))
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def test_autocast_takes_parts_of_different_dtypes_as_torch_does() -> None:
    model, inputs = nn.Sequential(Mixed()), x(B, T, E)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs)
        tw.fast_attention(model)
        torch.testing.assert_close(model(inputs), expected, atol=2e-2, rtol=2e-2)
    (served,) = tw.handle_of(model, "fast_attention").stats()["served"]
    assert served.endswith("bfloat16")


@pytest.mark.parametrize("mask", [~BANDS, x(T, T), x(B, 4, T, T)], ids=["bool", "added", "heads"])
def test_masks_of_the_function(mask: torch.Tensor) -> None:
    model, inputs = own()[0], x(B, T, E)
    expected = model(inputs, mask)
    close(tw.fast_attention(model)(inputs, mask), expected)


@pytest.mark.parametrize("shape", [(3, T, 8), (2, 3, 2, T, 8), (1, 4, T, 8)], ids=["three", "five", "four"])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    q, k = x(*shape), x(*shape, seed=2)
    expected = Bare()(q, k)
    got = tw.fast_attention(Bare())(q, k)
    assert got.shape == expected.shape
    close(got, expected)


def test_the_function_itself_is_never_changed() -> None:
    function, model, inputs = F.scaled_dot_product_attention, tw.fast_attention(own()), x(B, T, E)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(F.scaled_dot_product_attention))
    model(inputs)
    with pytest.raises(RuntimeError):
        model(x(B, T, E + 1))
    from torch.overrides import _get_current_function_mode_stack

    assert seen == [function] and F.scaled_dot_product_attention is function
    assert _get_current_function_mode_stack() == []


# The technique as such


def test_a_model_without_attention_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = dict(model.__dict__)
    with pytest.raises(tw.UnsupportedModelError, match="scaled_dot_product_attention") as caught:
        tw.fast_attention(model)
    assert caught.value.fix
    assert dict(model.__dict__) == before
    tw.apply(model, [tw.FastAttention()], strict=False)
    assert tw.wrappers_of(model) == {}


@pytest.mark.parametrize(("field", "value"), [("backend", "cuda"), ("fallback", "raise"), ("cache", "static")])
def test_settings_out_of_range_are_refused(field: str, value: str) -> None:
    with pytest.raises(tw.ConfigError, match=value):
        tw.FastAttention(**{field: value})
    with pytest.raises(tw.ConfigError, match="block_q"):
        tw.fast_attention(own(), block_q=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tune": "always"}, "'always' is not accepted"), ({"tune": "measure", "backend": "cpu"}, "tune='measure' would have no effect"),
        ({"tune": "off", "tune_dir": "/nowhere"}, "tune_dir='/nowhere' would have no effect"),
        ({"block_m": 64}, "block_m=64 would have no effect"), ({"backend": "triton", "block_n": 40}, "block_n=40"),
        ({"backend": "triton", "num_warps": 64}, "out of range"), ({"deterministic": 1}, "deterministic"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(tw.ConfigError, match=words):
        tw.FastAttention(**options)


def test_what_is_measured_is_kept_and_chosen_by(tmp_path: Any) -> None:
    model, inputs = tw.fast_attention(own(), tune="measure", tune_dir=str(tmp_path)), x(B, T, E)
    with torch.no_grad():
        model(inputs)
    assert list(tmp_path.iterdir()) and "measured" in tw.handle_of(model, "fast_attention").explain()
    other = tw.fast_attention(own(), tune_dir=str(tmp_path))
    with torch.no_grad():
        other(inputs)
    assert "measured" in tw.fast_attention.explain(other)


def test_a_wrapped_model_can_be_tuned_on_a_call(tmp_path: Any) -> None:
    model = tw.fast_attention(own(), tune_dir=str(tmp_path))
    with torch.no_grad():
        assert "measured" in tw.fast_attention.tune(model, x(B, T, E))
    handle = tw.handle_of(model, "fast_attention")
    assert handle.service.backend.tune == "table"
    with pytest.raises(ZeroDivisionError), handle.tuning():
        raise ZeroDivisionError
    assert handle.service.backend.tune == "table"
    with pytest.raises(tw.ConfigError, match="nothing to choose"):
        tw.fast_attention.tune(tw.fast_attention(own(), backend="eager"), x(B, T, E))


def test_a_named_back_end_is_used_for_every_call() -> None:
    model = tw.fast_attention(own(), backend="eager")
    model(x(B, T, E))
    handle = tw.handle_of(model, "fast_attention")
    assert {key.split()[1] for key in handle.stats()["served"]} == {"eager"}
    assert "asked for" in handle.explain()


def test_explain_says_what_served_which_calls_and_why() -> None:
    model = tw.fast_attention(own())
    handle = tw.handle_of(model, "fast_attention")
    assert handle.explain() == "No call yet."
    model(x(B, T, E))
    model(x(B, 1, E))
    lines = handle.explain().splitlines()
    assert len(lines) == 2
    assert all("2 calls of 2 modules" in line and "cpu" in line for line in lines)
    assert "2 modules that use" in str(tw.describe(model))


@pytest.mark.parametrize("make", [encoder, own])
def test_copies_and_pickles(make: Any) -> None:
    model, inputs = tw.fast_attention(make()), x(B, T, E)
    expected = model(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))) if make is encoder else (copy.deepcopy(model),):
        assert torch.equal(other(inputs), expected)
        tw.unwrap(other)
        assert list(tw.wrappers_of(model)) == ["fast_attention"]


def test_a_plan_brings_it_back(tmp_path: Any) -> None:
    model, inputs = tw.fast_attention(own(), backend="eager", cache="keep"), x(B, T, E)
    expected = model(inputs)
    tw.plan_of(model).save(tmp_path)
    other = tw.Plan.load(tmp_path).apply(own())
    assert tw.wrappers_of(other) == tw.wrappers_of(model)
    assert torch.equal(other(inputs), expected)


def test_settings_hold_in_the_recomputation_of_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    model, inputs = tw.fast_attention(own(), backend="eager"), x(B, T, E).requires_grad_()
    checkpoint(model, inputs, use_reentrant=False).sum().backward()
    assert {key.split()[1] for key in tw.handle_of(model, "fast_attention").stats()["served"]} == {"eager"}
    assert sum(tw.handle_of(model, "fast_attention").stats()["served"].values()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "padding", "causal-bool-padding"])
def test_encoders_are_one_graph(how: str) -> None:
    torch._dynamo.reset()
    model, inputs = tw.fast_attention(encoder()), x(B, T, E)
    options = {**STACKS[how], "is_causal": how.startswith("causal")}
    with torch.no_grad():
        expected = model(inputs, **options)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(inputs, **options), expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_modules_that_call_the_function_are_equal_when_compiled() -> None:
    torch._dynamo.reset()
    model, inputs = tw.fast_attention(own()), x(B, T, E)
    assert torch.equal(torch.compile(model, backend="eager")(inputs), model(inputs))
    torch._dynamo.reset()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_of_long_rows_is_given_as_where_their_keys_lie(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    layer, length, seen = nn.MultiheadAttention(16, 2, batch_first=True).eval(), 160, []
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[0, 100:] = True
    options = {"attn_mask": torch.ones(length, length).triu(1).bool(), "is_causal": True} if causal else {}
    inputs, whole = torch.randn(2, length, 16), Service.attend
    monkeypatch.setattr(Service, "attend", lambda *args, **given: seen.append(given["mask"]) or whole(*args, **given))
    with torch.no_grad():
        expected = layer(inputs, inputs, inputs, key_padding_mask=padding, need_weights=False, **options)[0]
        got = tw.fast_attention(layer)(inputs, inputs, inputs, key_padding_mask=padding, need_weights=False, **options)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert [mask.kv_end.tolist() for mask in seen] == [[100, length]] and seen[0].key_mask is None
