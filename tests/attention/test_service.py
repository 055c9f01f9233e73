"""The record of a model's calls: what was served by what and why, and what was not."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch

from torchwrap.attention.attend import attend
from torchwrap.attention.cooperative.cache import TieredCache
from torchwrap.attention.cooperative.machine import machine_for
from torchwrap.attention.cooperative.tensors import TieredTensor
from torchwrap.attention.cooperative.tiers import Room
from torchwrap.attention.masks.mask import TileMask
from torchwrap.attention.service import Service
from torchwrap.core.errors import TorchwrapWarning, UnsupportedModelError


def qkv(rows: int = 5, keys: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((4, rows), (2, keys), (2, keys)))  # type: ignore[return-value]


def test_results_are_those_of_attend_and_every_kind_of_call_has_a_line() -> None:
    service, (q, k, v) = Service(), qkv()
    mask = TileMask.causal(2, 5, 9)
    assert torch.equal(service.attend("a", q, k, v, mask=mask), attend(q, k, v, mask=mask))
    assert torch.equal(service.attend("b", q, k, v, softcap=3.0, scale=0.2), attend(q, k, v, softcap=3.0, scale=0.2))
    service.attend("b", q, k, v, softcap=3.0, scale=0.2)
    assert service.stats() == {
        "served": {"a cpu chunked, causal, float32": 1, "b cpu chunked, unmasked, softcap, float32": 2}, "left": {},
    }  # fmt: skip
    lines = service.explain().splitlines()
    assert lines[1].startswith("chunked, unmasked, softcap, float32: cpu: 2 calls of 1 modules (cpu: first that can, on cpu")


def test_asking_for_the_reason_does_not_touch_the_generator() -> None:
    q, k, v = qkv()
    results = []
    for served in (True, False):
        torch.manual_seed(4)
        call = Service().attend if served else lambda _, *args, **options: attend(*args, **options)
        results.append((call("a", q, k, v, dropout=0.4), torch.rand(3)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_keys_on_two_sides_are_called_what_they_are() -> None:
    machine = machine_for(torch.device("cpu"))
    cache = TieredCache([Room(4, 2, 2, 16, True)], machine=machine)
    q, k, v = qkv(rows=1)
    cache.append(0, k, v)
    tiered = TieredTensor(cache, 0, "keys"), TieredTensor(cache, 0, "values")
    service, before = Service(), TieredTensor.materialisations
    torch.testing.assert_close(service.attend("a", q, *tiered), attend(q, k, v), rtol=1e-5, atol=1e-6)
    assert TieredTensor.materialisations == before
    assert "cooperative" in service.explain() and "on the host" in service.explain()
    cache.release()


def test_what_is_left_warns_once_for_each_reason() -> None:
    service = Service()
    with pytest.warns(TorchwrapWarning, match=r"weights.*Do that"):
        service.leave("a", "it wants weights", "Do that.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        service.leave("b", "it wants weights", "Do that.")
    with pytest.warns(TorchwrapWarning, match="another"):
        service.leave("a", "another reason", "Do that.")
    assert service.stats()["left"] == {"a it wants weights": 1, "b it wants weights": 1, "a another reason": 1}
    assert "the model's own attention: 2 calls of 2 modules (it wants weights)" in service.explain()


@pytest.mark.parametrize("fallback", ["error", "silent"])
def test_what_is_left_may_raise_or_be_silent(fallback: str) -> None:
    service = Service(fallback=fallback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if fallback == "silent":
            service.leave("a", "a reason", "Do that.")
            assert service.stats()["left"] == {"a a reason": 1}
        else:
            with pytest.raises(UnsupportedModelError, match="a reason") as caught:
                service.leave("a", "a reason", "Do that.")
            assert (caught.value.where, caught.value.fix) == ("a", "Do that.")
            assert service.stats()["left"] == {}


def test_counts_of_many_threads_add_up_and_copies_count_by_themselves() -> None:
    service, (q, k, v) = Service(), qkv()
    threads = [threading.Thread(target=lambda: [service.attend("a", q, k, v) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(service.stats()["served"].values()) == 200
    for other in (copy.deepcopy(service), pickle.loads(pickle.dumps(service))):
        other.attend("a", q, k, v)
        assert sum(other.stats()["served"].values()) == 201
    assert sum(service.stats()["served"].values()) == 200


def test_the_memory_of_masks_without_a_rule_is_in_the_record() -> None:
    service, q = Service(), torch.randn(1, 2, 64, 8)
    service.attend("rule", q, q, q, mask=TileMask.causal(1, 64, 64))
    assert "mask" not in service.reasons[next(key for key in service.reasons)]
    service.attend("table", q, q, q, mask=torch.rand(1, 1, 64, 64) < 0.5)
    service.attend("tiles", q, q, q, mask=TileMask.from_dense(torch.rand(1, 1, 64, 64) < 0.5))
    service.attend("added", q, q, q, mask=torch.zeros(64, 64))
    said = service.explain()
    assert said.count("a mask without a rule, kept as 3 tiles in ") == 2 and "a mask of floats, 16.00 KiB as it was given" in said
