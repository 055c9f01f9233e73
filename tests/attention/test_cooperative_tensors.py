"""Handles of keys and values in two memories: `attend` knows them, and every other operation gets the right numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import OneMemory
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask
from torchwrap.core import errors


@pytest.fixture
def held() -> tuple[TieredCache, torch.Tensor, torch.Tensor]:
    """A cache of 30 tokens, most of them on the host, and what is in it."""
    torch.manual_seed(0)
    cache = TieredCache([Room(8, 4)] * 2, machine=OneMemory())
    keys, values = torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 6)
    for index in range(2):
        cache.append(index, keys, values)
    return cache, keys, values


def handles(cache: TieredCache, index: int = 0) -> tuple[TieredTensor, TieredTensor]:
    return TieredTensor(cache, index, "keys"), TieredTensor(cache, index, "values")


@pytest.mark.parametrize("kind", ["tiles", "dense"])
def test_attend_goes_to_the_cache(held: tuple[TieredCache, torch.Tensor, torch.Tensor], kind: str) -> None:
    cache, keys, values = held
    q, mask = torch.randn(2, 4, 3, 8), TileMask.causal(1, 3, 30)
    given = mask if kind == "tiles" else mask.rectangles((0, 3), (0, 30))
    before = TieredTensor.materialisations
    out, lse = attend(q, *handles(cache), mask=given, sinks=torch.ones(4), return_lse=True)
    expected, expected_lse = attend(q, keys, values, mask=mask, sinks=torch.ones(4), return_lse=True)
    assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(lse, expected_lse, atol=1e-6)
    assert TieredTensor.materialisations == before
    assert torch.equal(attend(q, *handles(cache), mask=given, sinks=torch.ones(4)), out)


def test_passing_one_on_keeps_it_a_handle(held: tuple[TieredCache, torch.Tensor, torch.Tensor]) -> None:
    keys, _ = handles(held[0])
    before = TieredTensor.materialisations
    for same in (keys.detach(), keys.clone(), keys.contiguous(), keys[:, :, :30], keys[:, :, 0:]):
        assert isinstance(same, TieredTensor) and same.layer_index == 0
    assert keys.shape == (2, 2, 30, 8) and keys.dtype == torch.float32 and "keys of layer 0" in repr(keys)
    assert TieredTensor.materialisations == before


def test_any_other_operation_gathers_and_says_so_once(held: tuple[TieredCache, torch.Tensor, torch.Tensor]) -> None:
    cache, keys, values = held
    mine, theirs = handles(cache)
    before = TieredTensor.materialisations
    with pytest.warns(errors.TorchwrapWarning, match="keys of layer 0 gathers 3840 bytes"):
        assert torch.equal(mine * 2, keys * 2)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(theirs[:, :, 3:7], values[:, :, 3:7])
        assert torch.equal(mine.gathered(), keys)
    assert cache.gathers == 3
    assert TieredTensor.materialisations == before + 3


def test_a_handle_from_before_a_change_is_refused(held: tuple[TieredCache, torch.Tensor, torch.Tensor]) -> None:
    cache, _, _ = held
    keys, values = handles(cache)
    cache.crop(29)
    with pytest.raises(errors.ConfigError, match=r"before the cache changed.*layer 0"):
        attend(torch.randn(2, 4, 1, 8), keys, values)


def test_keys_and_values_of_different_layers_are_refused(held: tuple[TieredCache, torch.Tensor, torch.Tensor]) -> None:
    cache, plain, _ = held
    q = torch.randn(2, 4, 1, 8)
    for values in (handles(cache, 1)[1], plain):
        with pytest.raises(errors.ConfigError, match="not of one layer"):
            attend(q, handles(cache)[0], values)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"bias": torch.zeros(30)}, "bias"), ({"dropout": 0.5}, "dropout"), ({"mask": torch.zeros(1, 30)}, "a mask of floats")],
)
def test_what_the_host_cannot_attend_is_refused(
    held: tuple[TieredCache, torch.Tensor, torch.Tensor], given: dict[str, torch.Tensor | float], said: str
) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=f"does not serve {said}"):
        attend(torch.randn(2, 4, 1, 8), *handles(held[0]), **given)  # type: ignore[call-overload]


def test_a_layer_that_holds_nothing_has_no_handle() -> None:
    with pytest.raises(errors.ConfigError, match="holds nothing yet"):
        TieredTensor(TieredCache([Room(8, 4)], machine=OneMemory()), 0, "keys")


def test_tokens_of_another_shape_are_refused(held: tuple[TieredCache, torch.Tensor, torch.Tensor]) -> None:
    cache, keys, values = held
    with pytest.raises(errors.ConfigError, match=r"\(1, 2, 8, 6\), the cache \(2, 2, 8, 6\)"):
        cache.append(0, keys[:1], values[:1])
    assert cache.layers[0].length == 30
